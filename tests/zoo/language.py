"""Small language models of transformers, built from their configurations."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from zoo.facts import F_, Fact, Frozen, Has, Hoped, N, NotNeutral, Tied, Widths
from zoo.networks import Net, randomise, tokens

VOCABULARY = 53


SMALL = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


GROUPED = {
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
}


ONE_LAYER = {"num_hidden_layers": 1}
"""For variants of a decoder that another network of the zoo has with two layers."""
MIXER = "backbone.layers.0.mixer"


GEMMA = {"hidden_size": 36, "intermediate_size": 56, "head_dim": 8, "query_pre_attn_scalar": 11, "sliding_window": 4}
GEMMA["layer_types"] = ["sliding_attention", "full_attention"]


def language(name: str, family: str, settings: dict[str, Any], *expect: Fact, attention: str = "sdpa") -> Net:
    """A small causal language model of transformers, built from its configuration."""

    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SMALL | settings, attn_implementation=attention)
        kind = family.removesuffix("Text")
        model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
        return randomise(model)

    return Net(name, build, tokens(VOCABULARY, 2, 7, name="input_ids"), expect)


def rotary(
    kv: int = 3,
    rep: int = 2,
    head: int = 8,
    width: int = 36,
    neurons: int = 56,
    bias: bool = False,
    shared: bool = True,
    layers: int = 2,
) -> tuple:
    """What a decoder with rotary positions, grouped queries, a gated MLP and RMSNorm must have.

    Args:
        kv: Key-value heads.
        rep: Queries per key-value head.
        head: Width of a head.
        width: Of the residual stream.
        neurons: Of the MLP.
        bias: Whether queries, keys and values have biases.
        shared: Whether all layers rotate by the same frequencies, and so share their rotary pairs.
        layers: How many there are.
    """

    def per_layer(i: int) -> Iterable[Fact]:
        layer = f"model.layers.{i}."
        q, k, v, o = (f"{layer}self_attn.{part}_proj.weight:{int(part == 'o')}" for part in "qkvo")
        biases = tuple(f"{layer}self_attn.{part}_proj.bias:0" for part in "qkv") if bias else ()
        mlp = tuple(f"{layer}mlp.{part}_proj.weight:{int(part == 'down')}" for part in ("gate", "up", "down"))
        yield Has(neurons, mlp, alone=True)
        if kv > 1:
            yield Has(kv, (q, k, v, o, *biases), alone=True)
        if rep > 1:
            yield Has(rep, (q, o)) if rep > 2 else Hoped(Has(rep, (q, o)))
        yield Has(head, (v, o))
        if not shared:
            yield Has(head // 2, (q, k), (N, F_))

    pairs = tuple(f"model.layers.{i}.self_attn.{part}_proj.weight:0" for i in range(layers) for part in "qk")
    widths = (neurons,) * layers + (kv if kv > 1 else rep,) * layers
    return (
        *(fact for i in range(layers) for fact in per_layer(i)),
        Widths(widths),
        *((Has(head // 2, pairs, (N, F_)),) if shared else ()),
        Has(
            width,
            (
                "model.embed_tokens.weight:1",
                "model.norm.weight:0",
                *(
                    f"model.layers.{i}.{place}"
                    for i in range(layers)
                    for place in (
                        "input_layernorm.weight:0",
                        "self_attn.q_proj.weight:1",
                        "self_attn.o_proj.weight:0",
                        "mlp.up_proj.weight:1",
                        "mlp.down_proj.weight:0",
                    )
                ),
            ),
            (F_,),
        ),
        Frozen(("model.embed_tokens.weight:0",)),
    )


def per_layer(prefix: str, *facts: tuple[int, tuple[str, ...]]) -> tuple[Fact, ...]:
    """Neutral axes that each of two layers must have, and no other."""
    return tuple(
        Has(size, tuple(f"{prefix}.{i}.{place}" for place in places), alone=True)
        for i in (0, 1)
        for size, places in facts
    )


LANGUAGE = (
    language(
        "llama", "Llama", GROUPED | {"tie_word_embeddings": False}, *rotary(), Has(36, ("lm_head.weight:1",), (F_,))
    ),
    language(
        "llama_tied",
        "Llama",
        GROUPED | {"tie_word_embeddings": True, "attention_bias": True},
        *rotary(bias=True),
        Tied("model.embed_tokens.weight", "lm_head.weight"),
    ),
    language("llama_eager", "Llama", GROUPED | ONE_LAYER, *rotary(layers=1), attention="eager"),
    language(
        "llama_single",
        "Llama",
        GROUPED | {"num_attention_heads": 3, "num_key_value_heads": 3},
        *rotary(rep=1),
    ),
    language("qwen2", "Qwen2", GROUPED | {"head_dim": 8}, *rotary(bias=True)),
    language("qwen3", "Qwen3", GROUPED | ONE_LAYER, *rotary(layers=1)),
    language("mistral", "Mistral", GROUPED | {"sliding_window": 4}, *rotary()),
    language(
        "gemma3",
        "Gemma3Text",
        GEMMA | {"num_attention_heads": 6, "num_key_value_heads": 2},
        *rotary(kv=2, rep=3, shared=False),
        Tied("model.embed_tokens.weight", "lm_head.weight"),
    ),
    language(
        "phi3",
        "Phi3",
        GROUPED,
        Has(3, tuple(f"model.layers.0.self_attn.{place}" for place in ("qkv_proj.weight:0", "o_proj.weight:1"))),
        Has(8, tuple(f"model.layers.0.self_attn.{place}" for place in ("qkv_proj.weight:0", "o_proj.weight:1"))),
        Has(56, ("model.layers.0.mlp.gate_up_proj.weight:0", "model.layers.0.mlp.down_proj.weight:1")),
    ),
    language(
        "mamba",
        "Mamba",
        {"hidden_size": 24, "state_size": 6, "time_step_rank": 5},
        Has(48, tuple(f"{MIXER}.{place}" for place in ("A_log:0", "D:0", "conv1d.weight:0", "out_proj.weight:1"))),
        Has(6, (f"{MIXER}.A_log:1", f"{MIXER}.x_proj.weight:0")),
        Has(5, (f"{MIXER}.x_proj.weight:0", f"{MIXER}.dt_proj.weight:1")),
        attention="eager",
    ),
    language(
        "gemma3_single_kv",
        "Gemma3Text",
        GEMMA | ONE_LAYER | {"num_attention_heads": 3, "num_key_value_heads": 1, "layer_types": ["full_attention"]},
        *rotary(kv=1, rep=3, shared=False, layers=1),
    ),
    language(
        "gpt2",
        "GPT2",
        {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16, "n_inner": 34},
        *per_layer(
            "transformer.h",
            (34, ("mlp.c_fc.weight:1", "mlp.c_fc.bias:0", "mlp.c_proj.weight:0")),
            (3, ("attn.c_attn.weight:1", "attn.c_attn.bias:0", "attn.c_proj.weight:0")),
        ),
        Widths((34, 34, 3, 3)),
        NotNeutral(("transformer.wte.weight:1", "transformer.ln_f.weight:0")),
        Frozen(("transformer.wte.weight:0", "transformer.wpe.weight:0")),
        Tied("transformer.wte.weight", "lm_head.weight"),
    ),
    language(
        "gpt_neox",
        "GPTNeoX",
        {"hidden_size": 24, "intermediate_size": 34, "num_attention_heads": 3, "rotary_pct": 0.5},
        *per_layer(
            "gpt_neox.layers",
            (34, ("mlp.dense_h_to_4h.weight:0", "mlp.dense_h_to_4h.bias:0", "mlp.dense_4h_to_h.weight:1")),
            (
                3,
                (
                    "attention.query_key_value.weight:0",
                    "attention.query_key_value.bias:0",
                    "attention.dense.weight:1",
                ),
            ),
        ),
        Widths((34, 34, 3, 3)),
        NotNeutral(("gpt_neox.embed_in.weight:1",)),
    ),
    language(
        "opt",
        "OPT",
        {"hidden_size": 24, "ffn_dim": 34, "num_attention_heads": 3, "word_embed_proj_dim": 24},
        *per_layer(
            "model.decoder.layers",
            (34, ("fc1.weight:0", "fc1.bias:0", "fc2.weight:1")),
            (
                3,
                (
                    *(f"self_attn.{part}_proj.{kind}:0" for part in "qkv" for kind in ("weight", "bias")),
                    "self_attn.out_proj.weight:1",
                ),
            ),
        ),
        Widths((34, 34, 3, 3)),
        NotNeutral(("model.decoder.embed_tokens.weight:1",)),
        Frozen(("model.decoder.embed_positions.weight:0",)),
    ),
)
