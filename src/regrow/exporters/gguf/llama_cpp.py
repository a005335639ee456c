"""Describe a Llama-like network and its tokenizer in llama.cpp's terms, and reject what llama.cpp would do differently.

llama.cpp does not read the rule by which a tokenizer splits text; it knows rules by name. The rules here were compared
with it. Any other is rejected, since a file that splits text in another way gives bad text and no error.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrow.exporters import ExportError
from regrow.nets.language import ATTENTION_LAYERS, MLP_LAYERS, DecoderLayer, decoder_layers
from regrow.nets.loaded import ModelError
from regrow.tracing.branches import PlaceholderModule

# The transformers classes whose logits were compared with llama.cpp's.
CHECKED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# The kinds of rotary position embedding whose frequencies do not depend on the text's length.
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_TOP_LEVEL = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_ZERO_MLP_WIDTH = 32  # the width of the MLP of zeros that is written where the network has none
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # GGUF's numbers for token types

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Steps of a pre-tokenizer → llama.cpp's name of the rule (``words``: GPT-2's regular expression in ByteLevel).
RULES: Mapping[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "bytes"): "llama-bpe",
    (rf"{_WORDS}|\p{{N}}|{_REST}", "bytes"): "qwen2",
}
_NOT_PLAIN = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")  # settings of other BPEs
WHOLE_WORDS = {"llama-bpe"}  # rules for which llama.cpp keeps a word that is a token as it is, before any merge


@dataclass(frozen=True)
class Decoder:
    """A Llama-like network described in llama.cpp's terms."""

    name: str  # what the file calls the model
    embedding: Tensor  # [vocabulary, width]
    norm: Tensor  # the gain of the last norm, [width]
    head: Tensor  # [vocabulary, width]; the embedding itself if they are tied
    layers: Sequence[DecoderLayer]  # with their sizes in the file: where the network has no part, that of one of zeros
    head_dim: int  # channels of each head
    scale: float  # by which rotary embeddings multiply queries times keys, see query_scale
    epsilon: float  # of all norms
    base: float  # of the rotary frequencies
    factors: Tensor | None  # what the usual rotary frequencies are divided by, [head_dim / 2]; None: they are the usual
    context: int  # the longest text in tokens
    notes: tuple[str, ...]  # what a user of the file must know

    @property
    def architecture(self) -> str:
        """llama.cpp's architecture: ``"llama"`` if all layers are alike and without bias, else ``"deci"``."""
        alike = len({(layer.heads, layer.kv_heads, layer.width) for layer in self.layers}) == 1
        biased = any(linear.bias is not None for layer in self.layers for linear in layer.linear.values())
        dropped = any(len(layer.linear) < len(PARTS) for layer in self.layers)
        return "llama" if alike and not biased and not dropped else "deci"


def describe_decoder(model: nn.Module) -> Decoder:
    """Describe a network in llama.cpp's terms, or raise ExportError if llama.cpp cannot run it, or would differ."""
    try:
        described = decoder_layers(model)
    except ModelError as error:
        raise ExportError(str(error)) from None
    net = cast(Any, model)
    _check_supported(net)
    config, rotary = net.config, net.model.rotary_emb
    fitted = [_fit_layer(i, layer) for i, layer in enumerate(described)]
    layers = [layer for layer in fitted if layer is not None]
    if not layers:
        raise ExportError("every layer was dropped, so there is nothing for llama.cpp to run")
    attending = [layer for layer in layers if ATTENTION_LAYERS[0] in layer.linear]
    dim = 2 * rotary.inv_freq.numel()  # the channels of a head that are rotated
    dims = {layer.head_dim for layer in attending}
    if dims - {dim}:
        sizes = f"{', '.join(map(str, sorted(dims)))} channels, of which {dim} are rotated"
        remedy = "cut neither head channels nor rotary pairs"
        raise ExportError(f"heads have {sizes}; llama.cpp takes one size for all, rotated whole: {remedy}")
    if not layers[0].heads:
        layers[0] = replace(layers[0], heads=1, kv_heads=1)  # llama.cpp reads from it how large a head is
    notes = []
    if dropped := len(described) - len(layers):
        notes.append(f"{dropped} layers that do nothing are left out, so layers have other numbers")
    context, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if window and window < context:
        context = int(window)
        notes.append(f"llama.cpp looks back without end, the network {window} tokens; so the longest text is that long")
    # Sine and cosine may be scaled (yarn): once in the query, once in the key.
    scale = float(rotary.attention_scaling) ** 2
    if any(query_scale(layer, scale) != 1 for layer in attending):
        notes.append("attention divides by another number than √d; the queries' weights take up the quotient")
    base = float(config.rope_parameters["rope_theta"])
    usual = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factors = usual / rotary.inv_freq.detach().cpu().double()
    return Decoder(
        name=str(getattr(getattr(net, "origin", None), "name", "") or type(net).__name__),
        embedding=net.model.embed_tokens.weight,
        norm=net.model.norm.weight,
        head=net.lm_head.weight,
        layers=layers,
        head_dim=dim,
        scale=scale,
        epsilon=_common_epsilon(net, layers),
        base=base,
        factors=factors.float() if bool((factors - 1).abs().max() >= 1e-5) else None,
        context=context,
        notes=tuple(notes),
    )


def _check_supported(net: Any) -> None:
    """Raise ExportError unless llama.cpp has all parts of the network, and its class was compared (``CHECKED``)."""
    name = type(net).__name__
    for path, _ in (*net.named_parameters(), *net.named_buffers()):
        module = path.rpartition(".")[0]
        inside = module.split(".", 3)[-1] if path.startswith("model.layers.") else ""
        if path not in _TOP_LEVEL and inside not in {*PARTS, *NORMS} and not module.startswith("model.rotary_emb"):
            raise ExportError(f"{name} holds {path}, for which llama.cpp's llama and deci have no place")
    if name not in CHECKED or not type(net).__module__.startswith("transformers.models."):
        raise ExportError(f"{name} was not compared with llama.cpp; {', '.join(CHECKED)} of transformers were")
    if net.config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"the MLP's function is {net.config.hidden_act!r}; llama.cpp computes SiLU there")
    rope = net.config.rope_parameters.get("rope_type", "default")
    if rope not in FIXED_ROPE_TYPES:
        known = ", ".join(FIXED_ROPE_TYPES)
        raise ExportError(f"rope_type {rope!r} depends on the length of the text; llama.cpp files can hold {known}")


def query_scale(layer: DecoderLayer, rotary: float) -> float:
    """Return what queries are multiplied by for llama.cpp, which divides attention scores by √d; near 1 it is 1.

    ``rotary``: by what the network's rotary embedding scales the product of query and key (:attr:`Decoder.scale`).
    """
    scale = rotary * (float(cast(Any, layer.module).self_attn.scaling) * math.sqrt(layer.head_dim))
    return scale if abs(scale - 1) > 1e-6 else 1.0


def _fit_layer(i: int, layer: DecoderLayer) -> DecoderLayer | None:
    """Return layer number ``i`` as the file has it; ``None`` if it does nothing; ExportError if unlike Llama's."""
    module = layer.module
    if isinstance(module, PlaceholderModule) and module.placeholder.gives == "input":
        return None
    for part, norm, present in zip(("self_attn", "mlp"), NORMS, (layer.heads, layer.width), strict=True):
        if present and not hasattr(getattr(module, norm, None), "variance_epsilon"):
            raise ExportError(f"layer {i} has no {norm} in front of its {part}, which llama.cpp puts there")
        other = getattr(module, part, None)
        if not present and not (isinstance(other, PlaceholderModule) and other.placeholder.gives == "zero"):
            raise ExportError(f"layer {i} has a {part} that is neither like Llama's nor dropped")
    if not layer.heads:
        return layer if layer.width else None
    dim = layer.head_dim
    q, k, v, o = (layer.linear[path] for path in ATTENTION_LAYERS)
    heads, kv = layer.heads * dim, layer.kv_heads * dim
    if (q.out_features, o.in_features) != (heads, heads) or (k.out_features, v.out_features) != (kv, kv):
        raise ExportError(f"layer {i}: queries, keys and values have heads of other sizes; llama.cpp takes one size")
    groups = cast(Any, module).self_attn.num_key_value_groups
    if dim % 2 or not layer.kv_heads or layer.kv_heads * groups != layer.heads:
        raise ExportError(f"layer {i}: {layer.heads} query heads of {dim} channels for {layer.kv_heads} of keys")
    return replace(layer, width=layer.width or _ZERO_MLP_WIDTH)


def _common_epsilon(net: Any, layers: Sequence[DecoderLayer]) -> float:
    """Return the epsilon of all norms (of ``layers``, and the last); ExportError if they differ: a file has one."""
    norms = [net.model.norm]
    for layer in layers:
        parts = zip(NORMS, (ATTENTION_LAYERS, MLP_LAYERS), strict=True)
        norms += [getattr(layer.module, name) for name, paths in parts if paths[0] in layer.linear]
    epsilons = sorted({float(norm.variance_epsilon) for norm in norms})
    if len(epsilons) > 1:
        values = f"{epsilons[0]:g} to {epsilons[-1]:g}"
        raise ExportError(f"norms have different ε ({values}), of which GGUF has one for all")
    return epsilons[0]


def describe_tokenizer(tokenizer: Any | None, rows: int) -> tuple[dict[str, Any], list[str]]:
    """Convert a tokenizer of transformers to GGUF's metadata; raise ExportError if llama.cpp would split otherwise.

    Returned are: ``KEY`` → argument of ``gguf.GGUFWriter.add_KEY``, in the order of the file; and notes for the user.
    ``tokenizer``: ``None``: the file gets no vocabulary. ``rows``: the number of rows of the embedding.
    """
    if tokenizer is None:
        note = "there is no tokenizer: llama.cpp takes and gives token numbers, not text"
        return {"tokenizer_model": "no_vocab"}, [note]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} is not backed by a tokenizer.json, of which GGUF is made")
    data = json.loads(backend.to_str())
    model = data["model"]
    faults = [f"is {model.get('type')}"] if model.get("type") != "BPE" else []
    faults += [f"has the setting {name!r}" for name in _NOT_PLAIN if model.get(name)]
    if faults:
        raise ExportError(f"the tokenizer {faults[0]}; GGUF files are written for BPE of bytes: export to transformers")
    notes = []
    if any(token.get("lstrip") or token.get("rstrip") for token in data["added_tokens"]):
        notes.append("some special tokens swallow spaces beside them, which llama.cpp does not do")
    if normalizer := data.get("normalizer"):
        if normalizer.get("type") != "NFC":
            raise ExportError(f"the tokenizer rewrites text ({json.dumps(normalizer):.120}); llama.cpp does not")
        notes.append("the tokenizer puts text into Unicode form NFC first; llama.cpp expects it to be so")
    tokens, types = _list_tokens(data, rows)
    adds_bos, adds_eos = _find_added_tokens(tokenizer)
    metadata = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": _find_rule(data),
        "token_list": tokens,
        "token_types": types,
        "token_merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        **{f"{role}_token_id": getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")},
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "add_space_prefix": False,
    }
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        metadata["chat_template"] = template.encode("utf-8", "replace").decode()
    return {key: value for key, value in metadata.items() if value not in (None, [], "")}, notes


def _list_tokens(data: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return (texts, GGUF types) of the tokens in a ``tokenizer.json``, one per embedding row; or raise ExportError."""
    tokens = {number: (text, NORMAL) for text, number in data["model"]["vocab"].items()}
    for token in data["added_tokens"]:
        tokens[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    if tokens and max(tokens) >= rows:
        sizes = f"{max(tokens) + 1} tokens, the embedding {rows} rows"
        raise ExportError(f"the tokenizer has {sizes}; give the one it was for")
    texts, types = zip(*(tokens.get(n, (f"[PAD{n}]", UNUSED)) for n in range(rows)), strict=True)
    if len({*texts}) < rows or "" in texts:
        raise ExportError("two tokens have the same text, or one has none; llama.cpp takes no such tokenizer")
    return list(texts), list(types)


def _find_rule(data: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the rule by which a ``tokenizer.json`` splits text; ExportError if it has none."""
    splitting = data.get("pre_tokenizer")
    rule = RULES.get(tuple(map(_describe_step, _flatten_steps(splitting))), "")
    if not rule:
        problem = "the tokenizer splits text by a rule of which we know no name in llama.cpp"
        raise ExportError(f"{problem} ({json.dumps(splitting):.120}); known are {', '.join(sorted(RULES.values()))}")
    ignores_merges = bool(data["model"].get("ignore_merges"))
    if ignores_merges != (rule in WHOLE_WORDS):
        how = "takes" if ignores_merges else "does not take"
        raise ExportError(f"the tokenizer {how} words that are tokens before any merge, unlike {rule!r} in llama.cpp")
    return rule


def _flatten_steps(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a pre-tokenizer, which may be nested sequences or ``None``, as a flat list."""
    if step and step.get("type") == "Sequence":
        return [flat for part in step["pretokenizers"] for flat in _flatten_steps(part)]
    return [step] if step else []


def _describe_step(step: Mapping[str, Any]) -> str:
    """Return a step of a pre-tokenizer as the keys of ``RULES`` write it; ``"? TYPE"`` for one that is in none."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "words" if step.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return f"? {step.get('type')}"


def _find_added_tokens(tokenizer: Any) -> tuple[bool, bool]:
    """Return (adds BOS before text, adds EOS after it) of a tokenizer; raise ExportError if it adds others."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    before, after = (full[: starts[0]], full[starts[0] + len(bare) :]) if starts else (full, [])
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise ExportError(f"the tokenizer puts tokens around text ({full} for {bare}) that llama.cpp would not")
    return bool(before), bool(after)
