"""Tell how a network differs from its newly built architecture, build that again, and check that it fits."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes.operations import Placeholder, lies_in
from regrow.core.change import Insertion
from regrow.core.errors import first_line
from regrow.core.names import names_code
from regrow.nets import ModelError, Origin, build, replace_attention
from regrow.nets.language import origin_of
from regrow.store import probe
from regrow.store.errors import StoreError
from regrow.store.portable import check_configuration, is_pretrained
from regrow.store.shapes import DTYPES, MOST, SHAPES, Kind, Number, Shapes, Stored
from regrow.store.state import (
    USUAL,
    Held,
    all_tensors,
    attribute_tensors,
    find_numbers,
    find_ties,
    is_place,
    named_tensors,
    packed_tensors,
    restore,
    same_number,
    same_tensor,
    settable_numbers,
)
from regrow.tracing.branches import find_placeholders, insert_placeholders
from regrow.tracing.stacks import StackError, find_insertions, insert_copies

Builder = Callable[[], Any]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OTHER_CODE = "it was built by other code or settings"


def describe(model: nn.Module, fresh: nn.Module | None, origin: Origin, dtype: torch.dtype | None) -> Shapes:
    """Return the record of a network: how it differs from its newly built architecture, without files."""
    placeholders, inserted = find_placeholders(model), find_insertions(model)
    if fresh is not None:
        _insert_and_drop(fresh, inserted, placeholders)
    now, before = named_tensors(model), named_tensors(fresh) if fresh is not None else {}
    ties = find_ties(now)
    tensors = {}
    for name, held in now.items():
        old = before.get(name)
        if name in ties or (held.kind is Kind.DERIVED and old is not None and same_tensor(held.tensor, old.tensor)):
            continue
        shape = tuple(held.tensor.shape)
        tensors[name] = Stored(
            _stored_dtype(name, held, dtype),
            shape,
            held.kind,
            held.kind is not Kind.PARAMETER or held.tensor.requires_grad,
            tuple(old.tensor.shape) if old is not None and old.tensor.shape != shape else None,
            fresh is not None and old is None,
        )
    for name, tensor in _unregistered_tensors(model, fresh).items():
        stored_dtype = _stored_dtype(name, Held(tensor, Kind.ATTRIBUTE), None)
        tensors[name] = Stored(stored_dtype, tuple(tensor.shape), Kind.ATTRIBUTE)
    numbers = find_numbers(model)
    if fresh is not None:
        there = settable_numbers(fresh)
        numbers = {place: n for place, n in numbers.items() if place in there and not same_number(n, there[place])}
    dropped = tuple(name for name in before if name not in now)
    shapes = Shapes(
        origin, tensors, numbers, ties, dropped, fresh is not None, placeholders=placeholders, inserted=inserted
    )
    if fresh is not None:
        check(fresh, shapes)
    return shapes


def _unregistered_tensors(model: nn.Module, fresh: nn.Module | None) -> dict[str, Tensor]:
    """Return the tensors in attributes, lists and mappings that a newly built network does not have so."""
    names = {id(held.tensor): name for name, held in named_tensors(model).items()}
    packed = {place: tensor for place, tensor in packed_tensors(model).items() if id(tensor) not in names}
    if fresh is None:
        return packed | attribute_tensors(model)
    fresh_names = {id(held.tensor): name for name, held in named_tensors(fresh).items()}
    fresh_packed, fresh_attributes = packed_tensors(fresh), attribute_tensors(fresh)
    result = {}
    for place, tensor in packed.items():
        if place not in fresh_packed or fresh_packed[place].shape != tensor.shape:
            raise StoreError(
                f"{place} is a tensor in a list or mapping of a module, where a newly built network has none of its "
                "shape; make it a buffer (register_buffer), or delete it"
            )
        if not same_tensor(tensor, fresh_packed[place]):
            result[place] = tensor
    for name, tensor in attribute_tensors(model).items():
        old = fresh_attributes.get(name)
        alias = id(tensor) in names and old is not None and names[id(tensor)] == fresh_names.get(id(old))
        if old is None or not (alias or same_tensor(tensor, old)):
            result[name] = tensor
    return result


def _stored_dtype(name: str, held: Held, dtype: torch.dtype | None) -> str:
    tensor = held.tensor
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise StoreError(f"{name!r} is on the meta device or sparse and has no numbers to save; load the model first")
    if dtype is not None and tensor.is_floating_point() and held.kind is not Kind.DERIVED:
        return str(dtype).removeprefix("torch.")
    known = str(tensor.dtype).removeprefix("torch.")
    if known not in DTYPES:
        raise StoreError(f"{name!r} has the dtype {known}, which is not stored; cast the model first")
    return known


def check(fresh: nn.Module, shapes: Shapes) -> None:
    """Raise StoreError unless a newly built network, with its modules dropped, fits the record."""
    there, packed, modules = named_tensors(fresh), packed_tensors(fresh), dict(fresh.named_modules())
    for name, stored in shapes.tensors.items():
        if stored.kind is not Kind.ATTRIBUTE:
            _check_tensor(fresh, there.get(name), name, stored, shapes.compared)
        elif not is_place(name):
            _check_attribute(modules, name)
        elif name not in packed or packed[name].shape != stored.shape:
            has = f"a tensor of shape {tuple(packed[name].shape)}" if name in packed else "no tensor"
            raise StoreError(
                f"the architecture has {has} in the place {name!r}, the record one of shape {stored.shape}; make it in "
                "the function that builds the network"
            )
    for name, first in shapes.ties.items():
        if first not in shapes.tensors or name in shapes.tensors:
            raise StoreError(f"{name!r} is tied to {first!r}, which is not stored; restore shapes.json")
        _check_tensor(fresh, there.get(name), name, shapes.tensors[first], shapes.compared)
    known = {*shapes.tensors, *shapes.ties, *shapes.dropped}
    for name, held in there.items():
        if name not in known and held.kind is not Kind.DERIVED:
            raise StoreError(f"the architecture has a tensor {name!r} that is not stored; restore shapes.json")
    for name in shapes.dropped:
        if name not in there:
            raise StoreError(f"the architecture has no tensor {name!r} to drop; restore shapes.json")
    numbers = settable_numbers(fresh)
    for place, value in shapes.attributes.items():
        # Without a comparison everything is listed, numbers too that a module first sets when it runs.
        if place in numbers or shapes.compared:
            unset = place in numbers and numbers[place] is None
            _check_number(place, value, value if unset else numbers.get(place))


def _check_tensor(fresh: nn.Module, held: Held | None, name: str, stored: Stored, compared: bool) -> None:
    if held is None:
        path, _, leaf = name.rpartition(".")
        module = dict(fresh.named_modules(remove_duplicate=False)).get(path)
        registered = {} if module is None else {**module._parameters, **module._buffers}
        if leaf not in registered or (compared and not stored.added):
            raise StoreError(f"the architecture has no place for the tensor {name!r}; {_OTHER_CODE}")
        return
    shape = tuple(held.tensor.shape)
    if held.kind is not stored.kind:
        raise StoreError(f"{name!r} is a {held.kind} in the architecture, {stored.kind} in the record")
    if stored.added or (compared and shape != (stored.was or stored.shape)):
        expected = "no such tensor" if stored.added else (stored.was or stored.shape)
        raise StoreError(
            f"the architecture has {name!r} with shape {shape}, the record says {expected}; {_OTHER_CODE}, or "
            "shapes.json was changed"
        )
    if len(shape) != len(stored.shape):
        raise StoreError(f"{name!r} has {len(shape)} dimensions in the architecture, {len(stored.shape)} in the record")


def _check_attribute(modules: Mapping[str, nn.Module], name: str) -> None:
    """Raise StoreError unless a tensor may be assigned to a plain attribute of this name."""
    path, _, leaf = name.rpartition(".")
    module = modules.get(path)
    parts = () if module is None else (*module._parameters, *module._buffers, *module._modules, *USUAL)
    free = module is not None and leaf.isidentifier() and not leaf.startswith("__") and leaf not in parts
    held = (getattr(type(module), leaf, None), vars(module).get(leaf) if free else None)
    if not free or not all(isinstance(value, Tensor | None) for value in held):
        raise StoreError(f"the architecture has no place for a tensor {name!r} as an attribute; restore shapes.json")


def _check_number(place: str, value: Number, old: Number | None) -> None:
    if old is None or isinstance(value, tuple) != isinstance(old, tuple):
        raise StoreError(f"the architecture has no number {place!r}; {_OTHER_CODE}")
    news, olds = (v if isinstance(v, tuple) else (v,) for v in (value, old))
    if len(news) != len(olds):
        raise StoreError(f"{place!r} holds {len(olds)} numbers in the architecture, {len(news)} in the record")
    for new, was in zip(news, olds, strict=True):
        if math.isfinite(was) and not math.isfinite(new):
            raise StoreError(f"{place!r} is {new} in the record; restore shapes.json")
        if (was > 0 and new < 0 and isinstance(was, int)) or (abs(was) < MOST <= abs(new)):
            raise StoreError(f"{place!r} is {new} in the record; a size is from 0 to {MOST - 1}: restore shapes.json")


def _insert_and_drop(
    fresh: nn.Module, inserted: Mapping[str, tuple[Insertion, ...]], placeholders: Mapping[str, Placeholder]
) -> None:
    """Insert copies of blocks into a newly built network, then replace modules by placeholders, in place."""
    try:
        for path, insertions in inserted.items():
            for insertion in insertions:
                insert_copies(fresh, path, insertion)
    except StackError as error:
        raise StoreError(f"{error}; {_OTHER_CODE}") from None
    known = dict(fresh.named_modules())
    for path in placeholders:
        nested = any(lies_in(path, other) for other in placeholders if other != path)
        if not path or path not in known or nested:
            raise StoreError(f"the architecture has no module {path!r} to drop; {_OTHER_CODE}")
    insert_placeholders(fresh, placeholders)


def build_checked(
    folder: Path, shapes: Shapes, model: nn.Module | Builder | None, dtype: torch.dtype | None
) -> nn.Module:
    """Return the architecture that a record describes, of its depth, after checking that it fits the record."""
    try:
        net = build_network(folder, shapes, model, dtype)
        _insert_and_drop(net, shapes.inserted, shapes.placeholders)
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
    """Build the unchanged architecture, to compare a network with; ``None`` if no function to build it is known."""
    # A user's own code is called only if the function was passed in this process; a recorded name is never imported.
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
    changed = next((place for place in _differences(model, fresh) if place not in kept), "")
    if not changed:
        return ""
    present, tensors = all_tensors(model), dict[str, Tensor]()
    for name, stored in shapes.tensors.items():
        tensor = present[name].detach().to("cpu", DTYPES[stored.dtype])
        tensors[name] = tensor if stored.kind is Kind.PARAMETER else tensor.clone()
    restore(fresh, shapes, tensors)
    try:
        probe.check_probe(fresh.eval(), folder / probe.FILE, stored={DTYPES[s.dtype] for s in shapes.tensors.values()})
    except StoreError:
        return changed
    return ""


def _differences(model: nn.Module, fresh: nn.Module) -> Iterator[str]:
    """Yield the attributes of modules that differ from a newly built network, except tensors and numbers."""
    others = dict(fresh.named_modules())
    usual = USUAL | {"origin", "tokenizer"}
    for path, module in model.named_modules():
        other = others.get(path)
        if other is None:
            continue
        if type(module) is not type(other):
            yield f"{path or 'the model'} (a {type(module).__name__}, not a {type(other).__name__})"
            continue
        dot = f"{path}." if path else ""
        now, before = ({k: v for k, v in vars(part).items() if k not in usual} for part in (module, other))
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
