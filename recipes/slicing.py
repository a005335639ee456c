"""SliceGPT's slicing of the residual stream, for Llama-like decoders, as it would compute after the cut.

Ashkboos et al., SliceGPT, ICLR 2024: before and after each attention and MLP the stream is rotated onto its principal
components, and the last ones are left out. A network in these coordinates computes what the network in the old ones
does if its stream is projected onto the components that stay; this is computed here, so shapes do not change, and
the stored parameters are counted instead. The embedding stays tied, as that is fewer parameters than two sliced ones:
its rows are rotated by one matrix, and the output of the last block is rotated back by another.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class SlicedLayer(nn.Module):
    """A decoder layer whose stream is projected after its attention and after its MLP; the projections: [d, d]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.after_attention, self.after_mlp = layer, Tensor(), Tensor()

    def attend(self, stream: Tensor, **options: Any) -> Tensor:
        """Return the stream after attention, not projected."""
        return stream + self.layer.self_attn(hidden_states=self.layer.input_layernorm(stream), **options)[0]

    def feed(self, stream: Tensor) -> Tensor:
        """Return the stream after the MLP, not projected."""
        return stream + self.layer.mlp(self.layer.post_attention_layernorm(stream))

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """Return the stream after the layer."""
        stream = self.attend(hidden_states, **options) @ self.after_attention
        return self.feed(stream) @ self.after_mlp


class SlicedEmbedding(nn.Module):
    """An embedding whose vectors are projected: [d, d]."""

    def __init__(self, embedding: nn.Module, projection: Tensor) -> None:
        super().__init__()
        self.embedding, self.projection = embedding, projection

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the projected vectors of tokens."""
        return self.embedding(tokens) @ self.projection


def project(streams: Iterable[Tensor], width: int, normalised: bool) -> Tensor:
    """Return the projection onto the first principal components of streams, ``[batch, tokens, d]`` each: [d, d].

    ``normalised``: whether each token has the same weight, as behind an RMS norm.
    """
    products: Any = 0
    for stream in streams:
        rows = stream.flatten(0, 1).double()
        rows = rows / rows.square().mean(1, keepdim=True).sqrt() if normalised else rows
        products = products + rows.T @ rows
    components = torch.linalg.eigh(products).eigenvectors[:, -width:]
    return (components @ components.T).float()


def find_width(model: nn.Module, keep: float) -> int:
    """Return the width of the stream at which a sliced network stores ``keep`` of the weights of linear layers.

    Those are w = k / d of each weight, two k × k matrices per layer for the shortcuts, and two k × d for the embedding.
    """
    layers, d = model.model.layers, model.config.hidden_size
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    a, b = 2 * len(layers), weights / d + 2 * d  # a k² + b k = keep · weights
    return math.floor((-b + math.sqrt(b * b + 4 * a * keep * weights)) / (2 * a))


def slice_stream(model: nn.Module, batches: Iterable[Tensor], keep: float, normalised: bool) -> nn.Module:
    """Return a copy that computes as SliceGPT's network does; ``batches``: tokens ``[batch, tokens]`` of one shape."""
    network, width, options = copy.deepcopy(model).eval(), find_width(model, keep), dict[str, Any]()
    body = network.model

    def take(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        options.update(given)
        streams.append(args[0] if args else options.pop("hidden_states"))
        raise StopIteration

    streams: list[Tensor] = []
    handle = body.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            try:
                body(batch, use_cache=False)
            except StopIteration:
                continue
        handle.remove()
        options.pop("hidden_states", None)
        body.embed_tokens = SlicedEmbedding(body.embed_tokens, project(streams, width, normalised))
        streams = [stream @ body.embed_tokens.projection for stream in streams]
        for i, layer in enumerate(body.layers):
            sliced = SlicedLayer(layer)
            streams = [sliced.attend(stream, **options) for stream in streams]
            sliced.after_attention = project(streams, width, normalised)
            streams = [sliced.feed(stream @ sliced.after_attention) for stream in streams]
            sliced.after_mlp = project(streams, width, normalised)
            streams = [stream @ sliced.after_mlp for stream in streams]
            body.layers[i] = sliced
    return network
