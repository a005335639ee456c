"""Describe a Llama-like network in llama.cpp's terms, and reject what llama.cpp would compute differently."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrow.exporters.written import ExportError
from regrow.nets.language import ATTENTION, DecoderLayer, decoder_layers
from regrow.nets.loaded import ModelError
from regrow.tracing.branches import PlaceholderModule

CHECKED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""The transformers classes whose logits were compared with llama.cpp's."""

STEADY = ("default", "linear", "llama3", "yarn")
"""The kinds of rotary position embedding whose frequencies do not depend on the text's length."""

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
_TOP = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_EMPTY = 32
"""The width of the MLP of zeros that is written where the network has none."""


@dataclass(frozen=True)
class GgufLayer:
    """A layer as it is written to the file."""

    module: nn.Module  # the layer of the network
    block: DecoderLayer  # the layer's sizes and linear layers
    heads: int  # query heads in the file: those of the network, or one with zero weights
    kv_heads: int  # key-value heads in the file
    width: int  # MLP neurons in the file: those of the network, or some with zero weights
    scale: float = 1.0  # the factor on queries, since llama.cpp always divides scores by √d

    @property
    def has_attention(self) -> bool:
        """Whether the network's layer has its attention."""
        return bool(self.block.heads)

    @property
    def has_mlp(self) -> bool:
        """Whether the network's layer has its MLP."""
        return bool(self.block.width)


@dataclass(frozen=True)
class Decoder:
    """A Llama-like network described in llama.cpp's terms."""

    name: str  # the network's name, or that of its class
    embedding: Tensor  # the token embedding, ``[vocabulary, width]``
    norm: Tensor  # the gain of the last norm, ``[width]``
    head: Tensor  # the weight of the output layer, ``[vocabulary, width]``; ``embedding`` itself if they are tied
    layers: Sequence[GgufLayer]  # the layers in the file
    head_dim: int  # channels per head
    epsilon: float  # the epsilon of all norms
    base: float  # the base of the rotary frequencies
    # what the usual rotary frequencies are divided by, one per pair, ``[head_dim / 2]``; ``None`` if they are the usual
    # ones
    factors: Tensor | None
    context: int  # the longest text in tokens
    notes: tuple[str, ...]  # what a user of the file must know

    @property
    def architecture(self) -> str:
        """llama.cpp's architecture: ``"llama"`` if all layers are alike and without bias, else ``"deci"``."""
        alike = len({(layer.heads, layer.kv_heads, layer.width) for layer in self.layers}) == 1
        biased = any(linear.bias is not None for layer in self.layers for linear in layer.block.linear.values())
        dropped = any(len(layer.block.linear) < len(PARTS) for layer in self.layers)
        return "llama" if alike and not biased and not dropped else "deci"


def describe_decoder(model: nn.Module) -> Decoder:
    """Describe a network in llama.cpp's terms, or raise ExportError if llama.cpp cannot run it, or would differ."""
    try:
        found = decoder_layers(model)
    except ModelError as error:
        raise ExportError(str(error)) from None
    net = cast(Any, model)
    _check_kind(net)
    config, rotary = net.config, net.model.rotary_emb
    # Sine and cosine may be scaled (yarn): once in the query, once in the key.
    scale = float(rotary.attention_scaling) ** 2
    described = [
        _layer(i, module, block, scale)
        for i, (module, block) in enumerate(zip(net.model.layers, found, strict=True))
    ]
    layers = [layer for layer in described if layer is not None]
    if not layers:
        raise ExportError("every layer was dropped, so there is nothing for llama.cpp to run")
    dims = {layer.block.head_dim for layer in layers if layer.has_attention}
    dim = 2 * rotary.inv_freq.numel()
    if dims - {dim}:
        raise ExportError(
            f"heads have {', '.join(map(str, sorted(dims)))} channels, of which {dim} are rotated; llama.cpp takes one "
            "size for all, rotated whole: cut neither head channels nor rotary pairs"
        )
    if not layers[0].heads:
        layers[0] = replace(layers[0], heads=1, kv_heads=1)  # llama.cpp reads from it how large a head is
    notes = []
    if len(layers) < len(described):
        dropped = len(described) - len(layers)
        notes.append(f"{dropped} layers that do nothing are left out, so layers have other numbers")
    context, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if window and window < context:
        context = int(window)
        notes.append(f"llama.cpp looks back without end, the network {window} tokens; so the longest text is that long")
    if any(abs(layer.scale - 1) > 1e-6 for layer in layers):
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
        epsilon=_epsilon(net, layers),
        base=base,
        factors=factors.float() if bool((factors - 1).abs().max() >= 1e-5) else None,
        context=context,
        notes=tuple(notes),
    )


def _check_kind(net: Any) -> None:
    """Raise ExportError unless the network's class was compared with llama.cpp and has no other parts."""
    name = type(net).__name__
    for path, _ in (*net.named_parameters(), *net.named_buffers()):
        module = path.rpartition(".")[0]
        inside = module.split(".", 3)[-1] if path.startswith("model.layers.") else ""
        if path not in _TOP and inside not in {*PARTS, *NORMS} and not module.startswith("model.rotary_emb"):
            raise ExportError(f"{name} holds {path}, for which llama.cpp's llama and deci have no place")
    if name not in CHECKED or not type(net).__module__.startswith("transformers.models."):
        raise ExportError(f"{name} was not compared with llama.cpp; {', '.join(CHECKED)} of transformers were")
    if net.config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"the MLP's function is {net.config.hidden_act!r}; llama.cpp computes SiLU there")
    rope = net.config.rope_parameters.get("rope_type", "default")
    if rope not in STEADY:
        raise ExportError(
            f"rope_type {rope!r} depends on the length of the text; llama.cpp files can hold {', '.join(STEADY)}"
        )


def _layer(i: int, module: nn.Module, block: DecoderLayer, scale: float) -> GgufLayer | None:
    """Return a layer as it will be written; ``None`` for one that does nothing."""
    if isinstance(module, PlaceholderModule) and module.placeholder.gives == "input":
        return None
    net, dim = cast(Any, module), block.head_dim
    for part, norm, present in zip(("self_attn", "mlp"), NORMS, (block.heads, block.width), strict=True):
        if present and not hasattr(getattr(net, norm, None), "variance_epsilon"):
            raise ExportError(f"layer {i} has no {norm} in front of its {part}, which llama.cpp puts there")
        other = getattr(net, part, None)
        if not present and not (isinstance(other, PlaceholderModule) and other.placeholder.gives == "zero"):
            raise ExportError(f"layer {i} has a {part} that is neither like Llama's nor dropped")
    if not block.heads:
        return GgufLayer(module, block, 0, 0, block.width) if block.width else None
    q, k, v, o = (block.linear[path] for path in ATTENTION)
    heads, kv = block.heads * dim, block.kv_heads * dim
    if (q.out_features, o.in_features) != (heads, heads) or (k.out_features, v.out_features) != (kv, kv):
        raise ExportError(f"layer {i}: queries, keys and values have heads of other sizes; llama.cpp takes one size")
    if dim % 2 or not block.kv_heads or block.kv_heads * net.self_attn.num_key_value_groups != block.heads:
        raise ExportError(f"layer {i}: {block.heads} query heads of {dim} channels for {block.kv_heads} of keys")
    scale *= float(net.self_attn.scaling) * math.sqrt(dim)
    return GgufLayer(module, block, block.heads, block.kv_heads, block.width or _EMPTY, scale)


def _epsilon(net: Any, layers: Sequence[GgufLayer]) -> float:
    """Return the epsilon of all norms; raise ExportError if they differ, since a file has one for all."""
    norms = [net.model.norm]
    for layer in layers:
        for name, present in zip(NORMS, (layer.has_attention, layer.has_mlp), strict=True):
            norms += [getattr(layer.module, name)] if present else []
    epsilons = sorted({float(norm.variance_epsilon) for norm in norms})
    if len(epsilons) > 1:
        raise ExportError(
            f"norms have different ε ({epsilons[0]:g} to {epsilons[-1]:g}), of which GGUF has one for all"
        )
    return epsilons[0]
