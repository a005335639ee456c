"""Read the layer sizes of a Llama-like decoder, in the terms that inference servers use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from regrow.nets.loaded import ModelError

ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))


@dataclass(frozen=True)
class DecoderLayer:
    """The sizes and linear layers of one layer of a Llama-like decoder.

    Args:
        heads: Query heads; 0 if the attention was dropped.
        kv_heads: Key-value heads.
        head_dim: Channels per head.
        width: Hidden neurons of the MLP; 0 if it was dropped.
        linear: Path within the layer → linear layer, for those that exist.
    """

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    linear: Mapping[str, nn.Linear]


def blocks(model: nn.Module) -> list[DecoderLayer]:
    """Return the layers of a Llama-like decoder (separate q, k, v layers, gated MLP), of any width."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ModelError(f"{type(model).__name__} is no Llama-like decoder: it has no model.layers")
    return [_block(layer, f"{type(model).__name__}, layer {i}") for i, layer in enumerate(layers)]


def _block(layer: nn.Module, name: str) -> DecoderLayer:
    modules = dict(layer.named_modules())
    linear = {path: module for path in (*ATTENTION, *MLP) if isinstance(module := modules.get(path), nn.Linear)}
    for parts in (ATTENTION, MLP):
        there = [path for path in parts if path in linear]
        if there and len(there) < len(parts):
            missing = next(path for path in parts if path not in linear)
            raise ModelError(f"{name} is no Llama-like one: it has {there[0]} and no {missing}")
    attention: Any = modules.get("self_attn")
    head_dim = int(getattr(attention, "head_dim", 0))
    heads, kv_heads = (linear[path].out_features // head_dim if path in linear else 0 for path in ATTENTION[:2])
    width = linear[MLP[0]].out_features if MLP[0] in linear else 0
    return DecoderLayer(heads, kv_heads, head_dim, width, linear)
