"""Build the architecture of a saved model again, without its weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.nets import ModelError, Origin, build, replace_attention
from regrow.nets.errors import first_line
from regrow.store.errors import StoreError
from regrow.store.modules import drop, insert
from regrow.store.pretrained import (
    check_configuration,
)
from regrow.store.shapes import SHAPES, Shapes
from regrow.store.state import check

Builder = Callable[[], Any]


def build_checked(
    folder: Path, shapes: Shapes, model: nn.Module | Builder | None, dtype: torch.dtype | None
) -> nn.Module:
    """Return the architecture that a record describes, of its depth, after checking that it fits the record.

    Args:
        folder: The model folder.
        shapes: The record of the folder.
        model: The caller's own network, a function that builds it, or ``None`` to build it from the record.
        dtype: The dtype to build a transformers model in; as recorded if ``None``.

    Raises:
        StoreError: If it cannot be built, or is another architecture; names the folder.
    """
    try:
        net = build_network(folder, shapes, model, dtype)
        insert(net, shapes.inserted)
        drop(net, shapes.placeholders)
        check(net, shapes)
    except (ModelError, StoreError) as error:
        text = " ".join(str(error).split())
        text = text if len(text) < 400 else text[:399] + "…"
        raise StoreError(text if text.startswith(str(folder)) else f"{folder}: {text}") from None
    return net


def build_network(
    folder: Path, shapes: Shapes, model: nn.Module | Builder | None, dtype: torch.dtype | None
) -> nn.Module:
    """Return the architecture that a record describes: newly built, or the one that the caller passes.

    Args:
        folder: The model folder.
        shapes: The record of the folder.
        model: The caller's own network, a function that builds it, or ``None`` to build it from the record.
        dtype: The dtype to build a transformers model in; as recorded if ``None``.
    """
    origin = shapes.origin
    if origin.kind == "transformers":
        check_configuration(origin, folder, len(shapes.tensors))
        if dtype is not None:
            origin = replace(origin, config={**origin.config, "dtype": str(dtype).removeprefix("torch.")})
    if origin.kind == "torchvision" and (odd := [k for k, v in origin.config.items() if isinstance(v, str | dict)]):
        raise StoreError(f"the setting {odd[0]!r} would fetch files; take it out of {SHAPES}")
    if isinstance(model, nn.Module):
        return replace_attention(model, {*shapes.tensors, *shapes.ties})
    if model is None and origin.kind == "callable":
        raise StoreError(
            f"this model is built by your own code ({origin.reference or 'a module'}), which is not run unasked; "
            "pass the function that builds it: load(folder, model=function)"
        )
    if model is not None and not callable(model):
        raise StoreError(f"model must be a network or the function that builds it, got a {type(model).__name__}")
    try:
        with torch.random.fork_rng(devices=[]):
            made = build(origin) if model is None else model()
    except ModelError:
        raise
    except Exception as error:
        raise StoreError(f"building the architecture failed: {first_line(error)}") from None
    made = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(made, nn.Module):
        raise StoreError(f"model= gave a {type(made).__name__}, not a torch.nn.Module")
    return replace_attention(made, {*shapes.tensors, *shapes.ties})


def build_fresh(origin: Origin) -> nn.Module | None:
    """Build the unchanged architecture, to compare a network with; ``None`` if no function to build it is known.

    The random state of the caller is restored.

    A user's own code is called only if the function was passed in this process; a recorded name is never imported.

    Args:
        origin: How to build the architecture.
    """
    if origin.kind == "callable" and origin.builder is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            return build(origin)
    except ModelError as error:
        if origin.kind == "callable":
            return None
        raise StoreError(f"the model could not be built again: {error}") from None
