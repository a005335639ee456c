"""Describe a Llama-like network in llama.cpp's terms, and reject what llama.cpp would compute differently."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from regrow.exporters.written import ExportError
from regrow.nets.blocks import ATTENTION, DecoderLayer, blocks
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
    """A layer as it is written to the file.

    Args:
        module: The layer of the network.
        block: The layer's sizes and linear layers.
        heads: Query heads in the file: those of the network, or one with zero weights.
        kv_heads: Key-value heads in the file.
        width: MLP neurons in the file: those of the network, or some with zero weights.
        scale: The factor on queries, since llama.cpp always divides scores by √d.
    """

    module: nn.Module
    block: DecoderLayer
    heads: int
    kv_heads: int
    width: int
    scale: float


@dataclass(frozen=True)
class Decoder:
    """A Llama-like network described in llama.cpp's terms.

    Args:
        name: The network's name, or that of its class.
        embedding: The token embedding, ``[vocabulary, width]``.
        norm: The gain of the last norm, ``[width]``.
        head: The weight of the output layer, ``[vocabulary, width]``; ``embedding`` itself if they are tied.
        layers: The layers in the file.
        head_dim: Channels per head.
        epsilon: The epsilon of all norms.
        base: The base of the rotary frequencies.
        factors: What the usual rotary frequencies are divided by, one per pair, ``[head_dim / 2]``; ``None`` if they
            are the usual ones.
        context: The longest text in tokens.
        notes: What a user of the file must know.
    """

    name: str
    embedding: Tensor
    norm: Tensor
    head: Tensor
    layers: Sequence[GgufLayer]
    head_dim: int
    epsilon: float
    base: float
    factors: Tensor | None
    context: int
    notes: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's architecture: ``"llama"`` if all layers are alike and without bias, else ``"deci"``."""
        alike = len({(one.heads, one.kv_heads, one.width) for one in self.layers}) == 1
        biased = any(linear.bias is not None for one in self.layers for linear in one.block.linear.values())
        dropped = any(len(one.block.linear) < len(PARTS) for one in self.layers)
        return "llama" if alike and not biased and not dropped else "deci"


def describe_decoder(model: nn.Module) -> Decoder:
    """Describe a network in llama.cpp's terms, or raise ExportError if llama.cpp cannot run it.

    Args:
        model: The network.

    Raises:
        ExportError: If llama.cpp cannot represent something, or would compute it differently; names it.
    """
    try:
        found = blocks(model)
    except ModelError as error:
        raise ExportError(str(error)) from None
    net = cast(Any, model)
    _check_kind(net)
    rotary = net.model.rotary_emb
    # Sine and cosine may be scaled (yarn): once in the query, once in the key.
    more = float(rotary.attention_scaling) ** 2
    layers = [_layer(i, net.model.layers[i], block, more) for i, block in enumerate(found)]
    kept = [one for one in layers if one is not None]
    if not kept:
        raise ExportError("every layer was dropped, so there is nothing for llama.cpp to run")
    dims = {one.block.head_dim for one in kept if one.block.heads}
    dim = 2 * rotary.inv_freq.numel()
    if dims - {dim}:
        raise ExportError(
            f"heads have {', '.join(map(str, sorted(dims)))} channels, of which {dim} are rotated; llama.cpp takes one "
            "size for all, rotated whole: cut neither head channels nor rotary pairs"
        )
    if kept[0].heads == 0:
        # llama.cpp reads from the first layer how large a head is.
        kept[0] = GgufLayer(kept[0].module, kept[0].block, 1, 1, kept[0].width, 1)
    notes = []
    if len(kept) < len(layers):
        notes.append(f"{len(layers) - len(kept)} layers that do nothing are left out, so layers have other numbers")
    config = net.config
    context, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    if window and window < context:
        context = int(window)
        notes.append(f"llama.cpp looks back without end, the network {window} tokens; so the longest text is that long")
    if any(abs(one.scale - 1) > 1e-6 for one in kept):
        notes.append("attention divides by another number than √d; the queries' weights take up the quotient")
    base, factors = _rotation(config, rotary, dim)
    return Decoder(
        name=str(getattr(getattr(net, "origin", None), "name", "") or type(net).__name__),
        embedding=net.model.embed_tokens.weight,
        norm=net.model.norm.weight,
        head=net.lm_head.weight,
        layers=kept,
        head_dim=dim,
        epsilon=_epsilon(net, kept),
        base=base,
        factors=factors,
        context=context,
        notes=tuple(notes),
    )


def _check_kind(net: Any) -> None:
    """Raise ExportError unless the network's class was compared with llama.cpp and has no other parts."""
    name = type(net).__name__
    places = {*PARTS, *NORMS}
    for path, _ in (*net.named_parameters(), *net.named_buffers()):
        module = path.rpartition(".")[0]
        inside = module.split(".", 3)[-1] if path.startswith("model.layers.") else ""
        if path not in _TOP and inside not in places and not module.startswith("model.rotary_emb"):
            raise ExportError(f"{name} holds {path}, for which llama.cpp's llama and deci have no place")
    if name not in CHECKED or not type(net).__module__.startswith("transformers.models."):
        raise ExportError(f"{name} was not compared with llama.cpp; {', '.join(CHECKED)} of transformers were")
    config = net.config
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"the MLP's function is {config.hidden_act!r}; llama.cpp computes SiLU there")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in STEADY:
        raise ExportError(
            f"rope_type {kind!r} depends on the length of the text; llama.cpp files can hold {', '.join(STEADY)}"
        )


def _layer(i: int, module: nn.Module, block: DecoderLayer, more: float) -> GgufLayer | None:
    """Return a layer as it will be written; ``None`` for one that does nothing."""
    if isinstance(module, PlaceholderModule) and module.placeholder.gives == "input":
        return None
    net, dim = cast(Any, module), block.head_dim
    for part, norm, there in zip(("self_attn", "mlp"), NORMS, (block.heads, block.width), strict=True):
        placeholders = getattr(net, part, None)
        if there and not hasattr(getattr(net, norm, None), "variance_epsilon"):
            raise ExportError(f"layer {i} has no {norm} in front of its {part}, which llama.cpp puts there")
        if not there and not (isinstance(placeholders, PlaceholderModule) and placeholders.placeholder.gives == "zero"):
            raise ExportError(f"layer {i} has a {part} that is neither like Llama's nor dropped")
    if not block.heads and not block.width:
        return None
    if not block.heads:
        return GgufLayer(module, block, 0, 0, block.width, 1)
    q, k, v, o = (block.linear[path] for path in ATTENTION)
    heads, kv = block.heads * dim, block.kv_heads * dim
    if (q.out_features, o.in_features) != (heads, heads) or (k.out_features, v.out_features) != (kv, kv):
        raise ExportError(f"layer {i}: queries, keys and values have heads of other sizes; llama.cpp takes one size")
    if dim % 2 or not block.kv_heads or block.kv_heads * net.self_attn.num_key_value_groups != block.heads:
        raise ExportError(f"layer {i}: {block.heads} query heads of {dim} channels for {block.kv_heads} of keys")
    scale = float(net.self_attn.scaling) * math.sqrt(dim) * more
    return GgufLayer(module, block, block.heads, block.kv_heads, block.width or _EMPTY, scale)


def _rotation(config: Any, rotary: Any, dim: int) -> tuple[float, Tensor | None]:
    """Return the base of the rotary frequencies, and the factors by which base^(−2i/d) is divided, if any."""
    base = float(config.rope_parameters["rope_theta"])
    usual = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    factors = usual / rotary.inv_freq.detach().cpu().double()
    if bool((factors - 1).abs().max() < 1e-5):
        return base, None
    return base, factors.float()


def _epsilon(net: Any, layers: Sequence[GgufLayer]) -> float:
    """Return the epsilon of all norms.

    Raises:
        ExportError: If they differ, since a file has one for all.
    """
    parts = [(one, name) for one in layers for name, there in zip(NORMS, parts_present(one), strict=True) if there]
    norms = [*(getattr(one.module, name) for one, name in parts), net.model.norm]
    found = sorted({float(norm.variance_epsilon) for norm in norms})
    if len(found) > 1:
        raise ExportError(f"norms have different ε ({found[0]:g} to {found[-1]:g}), of which GGUF has one for all")
    return found[0]


def parts_present(layer: GgufLayer) -> tuple[bool, bool]:
    """Return whether the network's layer has its attention, and whether it has its MLP.

    Args:
        layer: The layer.
    """
    return bool(layer.block.heads), bool(layer.block.width)
