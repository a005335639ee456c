"""An input to trace a network with, found by looking at the network."""

import inspect
from typing import Any

import torch
from torch import nn

from regrow.axes import Example

TOKENS = 16
PIXELS = 224


def text_example(model: nn.Module, vocabulary: int) -> Example:
    """A short row of different tokens, ``[1, 16]`` int64, without a key-value cache where the model has one.

    Args:
        model: The language model; its device is where the tokens go.
        vocabulary: How many tokens it knows.
    """
    # Multiples of a prime: spread over the vocabulary, and not the low ids that are special tokens.
    tokens = ((torch.arange(1, TOKENS + 1) * 7919) % vocabulary)[None].to(device_of(model))
    accepted = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = tokens
    return Example((tokens,), kwargs)


def image_example(model: nn.Module, *shape: int) -> Example:
    """One image of grey noise, ``[1, *shape]``, in the model's dtype and on its device; the same each time."""
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    parameter = next(model.parameters(), noise)
    return Example((noise.to(parameter.device, parameter.dtype),))


def guessed_example(model: nn.Module) -> Example | None:
    """An input that suits the first layer with weights, or ``None`` if that layer says nothing about its input.

    >>> guessed_example(nn.Sequential(nn.Linear(3, 2))).args[0].shape
    torch.Size([1, 3])
    """
    for layer in model.modules():
        match layer:
            case nn.Embedding():
                return text_example(model, layer.num_embeddings)
            case nn.Linear():
                return image_example(model, layer.in_features)
            case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
                spatial = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
                rank = next(rank for kind, rank in spatial.items() if isinstance(layer, kind))
                sides = (16, 112, 112) if rank == 3 else (PIXELS,) * rank
                return image_example(model, layer.in_channels, *sides)
            case _ if any(True for _ in layer.parameters(recurse=False)):
                return None
    return None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
