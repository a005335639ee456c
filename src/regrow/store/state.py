"""The state of a network besides its code: named tensors, ties, and the numbers in module attributes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from regrow.core.axes.operations import Placeholder, lies_in
from regrow.core.change import Insertion
from regrow.nets import Origin
from regrow.store.attributes import (
    attribute_tensors,
    check_attribute,
    check_place,
    is_place,
    packed_tensors,
    replace_tensors,
)
from regrow.store.errors import StoreError
from regrow.store.shapes import DTYPES, MOST, Kind, Number, Shapes, Stored
from regrow.store.tensors import as_bytes
from regrow.tracing import attributes as named
from regrow.tracing.branches import find_placeholders, insert_placeholders
from regrow.tracing.stacks import StackError, find_insertions, insert_copies


@dataclass(frozen=True)
class Held:
    """A tensor of a network, and whether it is a parameter, a buffer or another kind.

    Args:
        tensor: The tensor itself.
        kind: Its kind: parameter, buffer, derived buffer or attribute.
    """

    tensor: Tensor
    kind: Kind


def named_tensors(model: nn.Module) -> dict[str, Held]:
    """Return every parameter and buffer under each of its names."""
    result: dict[str, Held] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                result[dot + leaf] = Held(parameter, Kind.PARAMETER)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                kind = Kind.DERIVED if leaf in module._non_persistent_buffers_set else Kind.BUFFER
                result[dot + leaf] = Held(buffer, kind)
    return result


def find_ties(tensors: Mapping[str, Held]) -> dict[str, str]:
    """Return, for every further name of a tied tensor, its first name.

    >>> net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    >>> net["b"].weight = net["a"].weight
    >>> find_ties(named_tensors(net))
    {'b.weight': 'a.weight'}
    """
    first: dict[Any, str] = {}
    result = {}
    for name, here in tensors.items():
        t = here.tensor
        if here.kind is Kind.DERIVED:
            continue
        numbers = t.numel() and not t.is_meta and not isinstance(t, FakeTensor)
        place = (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) if numbers else id(t)
        owner = first.setdefault((here.kind, place), name)
        if owner != name:
            result[name] = owner
    return result


def find_numbers(model: nn.Module) -> dict[str, Number]:
    """Return ``module:attribute`` → value, for every module attribute that is a number or a tuple of integers.

    >>> find_numbers(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))["1:normalized_shape"]
    (3,)
    """
    return {
        f"{path}:{name}": tuple(value) if isinstance(value, list) else value
        for path, module in model.named_modules()
        for name, value in (*vars(module).items(), *named.counts(module))
        if _is_number(value)
    }


def settable_places(model: nn.Module) -> set[str]:
    """Return ``module:attribute`` of attributes that are ``None`` and may become a number (a default epsilon).

    >>> settable_places(nn.RMSNorm(3))
    {':eps'}
    """
    every = vars(nn.Module())
    return {
        f"{path}:{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if value is None and name not in every
    }


def describe(model: nn.Module, fresh: nn.Module | None, origin: Origin, dtype: torch.dtype | None) -> Shapes:
    """Return the record of a network: how it differs from its newly built architecture, without files."""
    placeholders, inserted = find_placeholders(model), find_insertions(model)
    if fresh is not None:
        insert(fresh, inserted)
        drop(fresh, placeholders)
    now, before = named_tensors(model), named_tensors(fresh) if fresh is not None else {}
    tied = find_ties(now)
    tensors = {}
    for name, here in now.items():
        old = before.get(name)
        if name in tied or (here.kind is Kind.DERIVED and old is not None and _same(here.tensor, old.tensor)):
            continue
        shape = tuple(here.tensor.shape)
        tensors[name] = Stored(
            _dtype(name, here, dtype),
            shape,
            here.kind,
            here.kind is not Kind.PARAMETER or here.tensor.requires_grad,
            tuple(old.tensor.shape) if old is not None and old.tensor.shape != shape else None,
            fresh is not None and old is None,
        )
    for name, tensor in _unregistered_tensors(model, fresh).items():
        tensors[name] = Stored(
            _dtype(name, Held(tensor, Kind.ATTRIBUTE), None), tuple(tensor.shape), Kind.ATTRIBUTE, tensor.requires_grad
        )
    attributes = find_numbers(model)
    if fresh is not None:
        fixed, empty = find_numbers(fresh), settable_places(fresh)
        attributes = {
            place: number
            for place, number in attributes.items()
            if place in empty or (place in fixed and not _equal(number, fixed[place]))
        }
    dropped = tuple(name for name in before if name not in now)
    shapes = Shapes(
        origin, tensors, attributes, tied, dropped, fresh is not None, placeholders=placeholders, inserted=inserted
    )
    if fresh is not None:
        check(fresh, shapes)
    return shapes


def check(fresh: nn.Module, shapes: Shapes) -> None:
    """Raise StoreError unless a newly built network, with its modules dropped, fits the record."""
    there = named_tensors(fresh)
    for name, stored in shapes.tensors.items():
        if stored.kind is Kind.ATTRIBUTE and is_place(name):
            check_place(fresh, name, stored.shape)
        elif stored.kind is Kind.ATTRIBUTE:
            check_attribute(fresh, name)
        else:
            _check_tensor(fresh, there.get(name), name, stored, shapes.compared)
    for name, first in shapes.ties.items():
        if first not in shapes.tensors or name in shapes.tensors:
            raise StoreError(f"{name!r} is tied to {first!r}, which is not stored; restore shapes.json")
        _check_tensor(fresh, there.get(name), name, shapes.tensors[first], shapes.compared)
    known = {*shapes.tensors, *shapes.ties, *shapes.dropped}
    for name, here in there.items():
        if name not in known and here.kind is not Kind.DERIVED:
            raise StoreError(f"the architecture has a tensor {name!r} that is not stored; restore shapes.json")
    for name in shapes.dropped:
        if name not in there:
            raise StoreError(f"the architecture has no tensor {name!r} to drop; restore shapes.json")
    fixed, empty = find_numbers(fresh), settable_places(fresh)
    for place, value in shapes.attributes.items():
        # Without a comparison everything is listed, numbers too that a module first sets when it runs.
        if place in empty:
            _check_number(place, value, value)
        elif place in fixed or shapes.compared:
            _check_number(place, value, fixed.get(place))


def restore(model: nn.Module, shapes: Shapes, tensors: Mapping[str, Tensor]) -> None:
    """Give a newly built and checked network the recorded tensors and numbers, in place."""
    before = {name: held.tensor for name, held in named_tensors(model).items()} | packed_tensors(model)
    made = {name: tensors[name] for name in shapes.tensors}
    for name, stored in shapes.tensors.items():
        if stored.kind is Kind.PARAMETER:
            made[name] = nn.Parameter(tensors[name], stored.trains)
    made |= {name: made[first] for name, first in shapes.ties.items()}
    # Assigned as a user would, not through the dictionaries: some modules keep a second list of their weights.
    places = {name for name, stored in shapes.tensors.items() if stored.kind is Kind.ATTRIBUTE and is_place(name)}
    for name in (*made, *shapes.dropped):
        if name not in places:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, made.get(name))
    replace_tensors(model, {id(old): made[name] for name, old in before.items() if name in made})
    packed = packed_tensors(model)
    if lost := next((name for name in places if not _same(packed[name], made[name])), ""):
        raise StoreError(f"{lost!r} is in a mapping or tuple whose entries cannot be replaced; make it a buffer")
    fixed, empty = find_numbers(model), settable_places(model)
    for place, number in shapes.attributes.items():
        path, name = place.split(":")
        if place in empty:
            setattr(model.get_submodule(path), name, number)
        elif place in fixed and not _equal(number, fixed[place]):
            module = model.get_submodule(path)
            held_as = type(named.get_attribute(module, name))
            named.set_attribute(module, name, held_as(number) if isinstance(number, tuple) else number)


def _check_tensor(fresh: nn.Module, here: Held | None, name: str, stored: Stored, compared: bool) -> None:
    if here is None:
        path, _, leaf = name.rpartition(".")
        module = dict(fresh.named_modules(remove_duplicate=False)).get(path)
        registered = {} if module is None else {**module._parameters, **module._buffers}
        if leaf not in registered or (compared and not stored.added):
            raise StoreError(
                f"the architecture has no place for the tensor {name!r}; it was built by other code or settings"
            )
        return
    shape = tuple(here.tensor.shape)
    if here.kind is not stored.kind:
        raise StoreError(f"{name!r} is a {here.kind} in the architecture, {stored.kind} in the record")
    if stored.added or (compared and shape != (stored.was or stored.shape)):
        expected = "no such tensor" if stored.added else (stored.was or stored.shape)
        raise StoreError(
            f"the architecture has {name!r} with shape {shape}, the record says {expected}; "
            "it was built by other code or settings, or shapes.json was changed"
        )
    if len(shape) != len(stored.shape):
        raise StoreError(f"{name!r} has {len(shape)} dimensions in the architecture, {len(stored.shape)} in the record")


def _check_number(place: str, value: Number, old: Number | None) -> None:
    if old is None or isinstance(value, tuple) != isinstance(old, tuple):
        raise StoreError(f"the architecture has no number {place!r}; it was built by other code or settings")
    news, olds = (v if isinstance(v, tuple) else (v,) for v in (value, old))
    if len(news) != len(olds):
        raise StoreError(f"{place!r} holds {len(olds)} numbers in the architecture, {len(news)} in the record")
    for new, was in zip(news, olds, strict=True):
        if math.isfinite(was) and not math.isfinite(new):
            raise StoreError(f"{place!r} is {new} in the record; restore shapes.json")
        if (was > 0 and new < 0 and isinstance(was, int)) or (abs(was) < MOST <= abs(new)):
            raise StoreError(f"{place!r} is {new} in the record; a size is from 0 to {MOST - 1}: restore shapes.json")


def _unregistered_tensors(model: nn.Module, fresh: nn.Module | None) -> dict[str, Tensor]:
    """Return the tensors in attributes, lists and mappings that a newly built network does not have so."""
    own = {id(here.tensor): name for name, here in named_tensors(model).items()}
    before = {} if fresh is None else {id(here.tensor): name for name, here in named_tensors(fresh).items()}
    built = attribute_tensors(fresh) if fresh is not None else {}
    packed = packed_tensors(fresh) if fresh is not None else {}
    loose = {place: tensor for place, tensor in packed_tensors(model).items() if id(tensor) not in own}
    for place, tensor in loose.items():
        if fresh is not None and (place not in packed or packed[place].shape != tensor.shape):
            raise StoreError(
                f"{place} is a tensor in a list or mapping of a module, where a newly built network has none of its "
                "shape; make it a buffer (register_buffer), or delete it"
            )
    return {place: one for place, one in loose.items() if fresh is None or not _same(one, packed[place])} | {
        name: tensor
        for name, tensor in attribute_tensors(model).items()
        if name not in built
        or not (_same(tensor, built[name]) or (id(tensor) in own and own[id(tensor)] == before.get(id(built[name]))))
    }


def _dtype(name: str, here: Held, dtype: torch.dtype | None) -> str:
    tensor = here.tensor
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise StoreError(f"{name!r} is on the meta device or sparse and has no numbers to save; load the model first")
    if dtype is not None and tensor.is_floating_point() and here.kind is not Kind.DERIVED:
        return str(dtype).removeprefix("torch.")
    known = str(tensor.dtype).removeprefix("torch.")
    if known not in DTYPES:
        raise StoreError(f"{name!r} has the dtype {known}, which is not stored; cast the model first")
    return known


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(type(part) is int for part in value)
    return type(value) in (int, float)


def _equal(a: Number, b: Number) -> bool:
    return a == b or (a != a and b != b)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, on whatever devices."""
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
        return False
    return torch.equal(as_bytes(a), as_bytes(b))


def insert(fresh: nn.Module, inserted: Mapping[str, tuple[Insertion, ...]]) -> None:
    """Insert copies of blocks into a newly built network, in place."""
    try:
        for path, insertions in inserted.items():
            for insertion in insertions:
                insert_copies(fresh, path, insertion)
    except StackError as error:
        raise StoreError(f"{error}; it was built by other code or settings") from None


def drop(fresh: nn.Module, placeholders: Mapping[str, Placeholder]) -> None:
    """Replace modules of a newly built network by placeholders, in place."""
    known = dict(fresh.named_modules())
    for path in placeholders:
        nested = any(lies_in(path, other) for other in placeholders if other != path)
        if not path or path not in known or nested:
            raise StoreError(f"the architecture has no module {path!r} to drop; it was built by other code or settings")
    insert_placeholders(fresh, placeholders)
