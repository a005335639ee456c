"""Example inputs for tracing a network: of a given shape, or guessed from its first layer."""

import inspect
import logging
import re
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from regrow.core.axes import Example
from regrow.core.sources import device_of
from regrow.nets.loaded import ModelError

TOKENS = 16
PIXELS = 224
MOST = 2**28
"""The most entries that an example input may have."""

_log = logging.getLogger("regrow")


def text_example(model: nn.Module, vocabulary: int, shape: Sequence[int] = (1, TOKENS)) -> Example:
    """Return an example input for a language model: a short row of different tokens, int64, without a cache."""
    # Multiples of a prime: spread over the vocabulary, and not the low ids that are special tokens.
    tokens = ((torch.arange(1, prod(shape) + 1) * 7919) % vocabulary).view(*shape).to(device_of(model))
    accepted = inspect.signature(model.forward).parameters
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = tokens
    return Example((tokens,), kwargs)


def image_example(model: nn.Module, *shape: int) -> Example:
    """Return one image of noise, ``[1, *shape]``, in the model's dtype and on its device; always the same."""
    return _noise(model, (1, *shape))


def shaped_example(model: nn.Module, shape: Sequence[int]) -> Example:
    """Return an example input of a given shape: tokens if the network starts with an embedding, else noise.

    >>> shaped_example(nn.Linear(3, 2), (5, 3)).args[0].shape, shaped_example(nn.Embedding(7, 2), (1, 4)).args[0].dtype
    (torch.Size([5, 3]), torch.int64)
    """
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            return text_example(model, layer.num_embeddings, shape)
        if any(True for _ in layer.parameters(recurse=False)):
            break
    return _noise(model, shape)


def read_shape(text: str) -> tuple[int, ...]:
    """Parse an input shape as users write it on the command line.

    >>> read_shape("1x3x32x32")
    (1, 3, 32, 32)
    """
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", text) or not 0 < prod(map(int, text.split("x"))) <= MOST:
        raise ModelError(f"an input is sizes joined by x, batch first, like 1x3x32x32; got {text!r:.60}")
    return tuple(map(int, text.split("x")))


def written_shape(example: Example) -> str:
    """Return the shapes of an input's tensors in the form that :func:`read_shape` parses, joined by commas.

    >>> written_shape(Example((torch.ones(1, 3, 8, 8),)))
    '1x3x8x8'
    """
    values = [x for value in example.args for x in (value if isinstance(value, list | tuple) else [value])]
    return ", ".join("x".join(map(str, x.shape)) for x in values if isinstance(x, torch.Tensor))


def say_guess(example: Example) -> None:
    """Log which example input was guessed, since multiply–accumulates are counted for it."""
    _log.warning(
        "example input: %s (guessed; set it with --input 1x3x32x32, or give an image source)", written_shape(example)
    )


def guessed_example(model: nn.Module, pixels: int = 0) -> Example | None:
    """Guess an input from the first layer with weights; ``None`` if that layer does not determine it.

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
                rank = layer.weight.dim() - 2
                sides = (16, 112, 112) if rank == 3 else (pixels or PIXELS,) * rank
                return image_example(model, layer.in_channels, *sides)
            case _ if any(True for _ in layer.parameters(recurse=False)):
                return None
    return None


def _noise(model: nn.Module, shape: Sequence[int]) -> Example:
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    parameter = next(model.parameters(), noise)
    return Example((noise.to(parameter.device, parameter.dtype),))


def takes(model: nn.Module, example: Example) -> bool:
    """Whether a network in eval mode runs on an input without an error."""
    try:
        with torch.no_grad():
            model(*example.args, **example.kwargs)
    except Exception:  # whatever it raises, it does not run
        return False
    return True
