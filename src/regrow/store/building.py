"""Build the architecture of a saved model again, and tell whether that gives back what was saved."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.errors import first_line
from regrow.core.names import names_code
from regrow.nets import ModelError, Origin, build, replace_attention
from regrow.nets.language import origin_of
from regrow.store import probe
from regrow.store.attributes import unregistered_tensors
from regrow.store.errors import StoreError
from regrow.store.pretrained import check_configuration, is_pretrained
from regrow.store.shapes import DTYPES, SHAPES, Kind, Shapes
from regrow.store.state import check, drop, insert, named_tensors, restore

Builder = Callable[[], Any]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def build_checked(
    folder: Path, shapes: Shapes, model: nn.Module | Builder | None, dtype: torch.dtype | None
) -> nn.Module:
    """Return the architecture that a record describes, of its depth, after checking that it fits the record."""
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
    """Return the architecture that a record describes: newly built, or the one that the caller passes."""
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


def describe_origin(model: nn.Module) -> Origin:
    """Return how an architecture is built, as far as the network says.

    >>> describe_origin(nn.Linear(1, 2)).reference
    ''
    """
    if isinstance(known := getattr(model, "origin", None), Origin):
        return known
    if is_pretrained(model):
        return origin_of(model, type(model).__name__)
    kind = type(model)
    reference = f"{kind.__module__}:{kind.__qualname__}"
    parameters = inspect.signature(kind).parameters.values()
    needed = any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    importable = kind.__module__.partition(".")[0] not in ("__main__", "torch", "torchvision")
    return Origin(
        "callable", reference if importable and not needed and names_code(reference) else "", {}, kind.__name__
    )


def unsaved_change(model: nn.Module, fresh: nn.Module, shapes: Shapes, folder: Path) -> str:
    """Return the first attribute that no file stores, if loading would fail because of it; else ``""``."""
    kept = {place.replace(":", ".").removeprefix(".") for place in shapes.attributes}
    changed = next((place for place in differences(model, fresh) if place not in kept), "")
    if not changed:
        return ""
    places = {name: here.tensor for name, here in named_tensors(model).items()} | unregistered_tensors(model)
    own: dict[str, Tensor] = {}
    for name, stored in shapes.tensors.items():
        tensor = places[name].detach().to("cpu", DTYPES[stored.dtype])
        own[name] = tensor if stored.kind is Kind.PARAMETER else tensor.clone()
    restore(fresh, shapes, own)
    try:
        probe.check_probe(fresh.eval(), folder / probe.FILE, stored={DTYPES[s.dtype] for s in shapes.tensors.values()})
    except StoreError:
        return changed
    return ""


def differences(model: nn.Module, fresh: nn.Module) -> Iterator[str]:
    """Yield the attributes of modules that differ from a newly built network, except tensors and numbers.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> net[1] = nn.Tanh()
    >>> list(differences(net, nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
    ['1 (a Tanh, not a ReLU)']
    """
    others = dict(fresh.named_modules())
    usual = vars(nn.Module()).keys() | {"origin", "tokenizer"}
    for path, module in model.named_modules():
        other = others.get(path)
        if other is None:
            continue
        if type(module) is not type(other):
            yield f"{path or 'the model'} (a {type(module).__name__}, not a {type(other).__name__})"
            continue
        dot = f"{path}." if path else ""
        now, before = ({k: v for k, v in vars(one).items() if k not in usual} for one in (module, other))
        yield from (f"{dot}{name}" for name in {**before, **now} if not _alike(now, before, name))
        yield from (f"{dot}{name}" for name in _HOOKS if len(vars(module)[name]) != len(vars(other)[name]))


def _alike(now: Mapping[str, Any], before: Mapping[str, Any], name: str) -> bool:
    """Whether an attribute is the same in two networks, as far as that can be decided."""
    if (name in now) != (name in before):
        return False
    a, b = now[name], before[name]
    if isinstance(a, Tensor | nn.Module) or (type(a) in (int, float) and type(b) is type(a)):
        return True  # what files keep
    if type(a) is not type(b):
        return False
    if callable(a) and hasattr(a, "__qualname__"):
        return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)
    if "__eq__" not in {name for kind in type(a).__mro__[:-1] for name in vars(kind)}:
        return True  # equal to nothing but itself
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):  # tensors in lists
        return True
