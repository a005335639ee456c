"""The state of a network besides its code: named tensors, ties, and the numbers in module attributes.

Tensors may lie outside parameters and buffers: as plain attributes, or in lists and dicts, which are not stored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from regrow.store.shapes import Kind, Number, Shapes
from regrow.store.tensors import as_bytes
from regrow.tracing import attributes as named

USUAL = frozenset(vars(nn.Module()))
"""Attributes that every module has: its parameters, buffers, submodules and hooks."""
_DEEPEST = 4


@dataclass(frozen=True)
class Held:
    """A tensor of a network, and whether it is a parameter, a buffer or another kind."""

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
    for name, held in tensors.items():
        t = held.tensor
        if held.kind is Kind.DERIVED:
            continue
        numbers = t.numel() and not t.is_meta and not isinstance(t, FakeTensor)
        memory = (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) if numbers else id(t)
        owner = first.setdefault((held.kind, memory), name)
        if owner != name:
            result[name] = owner
    return result


def attribute_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return dotted name → tensor, for every tensor that a module holds as a plain attribute.

    >>> net = nn.Linear(2, 2)
    >>> net.scale = torch.ones(2)
    >>> list(attribute_tensors(net))
    ['scale']
    """
    return {name: value for name, value in _attributes(model) if isinstance(value, Tensor)}


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return place → tensor, for every tensor inside a list, tuple or dict that a module holds.

    >>> net = nn.Linear(2, 2)
    >>> net.anchors = [torch.ones(2)]
    >>> list(packed_tensors(net))
    ['anchors[0]']
    """
    return {
        f"{name}{key}": tensor
        for name, value in _attributes(model)
        if isinstance(value, list | tuple | dict)
        for key, tensor in _inside(value, _DEEPEST)
    }


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name → tensor, for every tensor that a network holds under a name."""
    held = {name: held.tensor for name, held in named_tensors(model).items()}
    return held | attribute_tensors(model)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        yield from ((dot + name, value) for name, value in vars(module).items() if name not in USUAL)


def _inside(value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if isinstance(part, Tensor):
            yield f"[{key!r}]", part
        elif isinstance(part, list | tuple | dict) and depth:
            yield from ((f"[{key!r}]{place}", tensor) for place, tensor in _inside(part, depth - 1))


def replace_tensors(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Replace tensors, in place, wherever modules hold them outside their parameters and buffers."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in USUAL and any(id(tensor) in new for _, tensor in _inside([value], _DEEPEST + 1)):
                vars(module)[name] = _replace(value, new)


def _replace(value: Any, new: Mapping[int, Tensor]) -> Any:
    match value:
        case Tensor():
            return new.get(id(value), value)
        case list():
            value[:] = [_replace(part, new) for part in value]
        case dict():
            value.update({key: _replace(part, new) for key, part in value.items()})
        case tuple() if type(value) is tuple:
            return tuple(_replace(part, new) for part in value)
    return value


def find_numbers(model: nn.Module) -> dict[str, Number]:
    """Return ``module:attribute`` → value, for every module attribute that is a number or a tuple of integers.

    >>> find_numbers(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))["1:normalized_shape"]
    (3,)
    """
    return {place: number for place, number in settable_numbers(model).items() if number is not None}


def settable_numbers(model: nn.Module) -> dict[str, Number | None]:
    """Return :func:`find_numbers`, with the attributes that are ``None`` and may become one (a default epsilon).

    >>> settable_numbers(nn.RMSNorm(3))
    {':normalized_shape': (3,), ':eps': None}
    """
    result: dict[str, Number | None] = {}
    for path, module in model.named_modules():
        for name, value in (*vars(module).items(), *named.config_counts(module)):
            if _is_number(value):
                result[f"{path}:{name}"] = tuple(value) if isinstance(value, list) else value
            elif value is None and name not in USUAL:
                result[f"{path}:{name}"] = None
    return result


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return bool(value) and all(type(part) is int for part in value)
    return type(value) in (int, float)


def same_number(a: Number | None, b: Number | None) -> bool:
    """Whether two numbers are equal, or both NaN."""
    return a == b or (a != a and b != b)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, on whatever devices."""
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
        return False
    return torch.equal(as_bytes(a), as_bytes(b))


def restore(model: nn.Module, shapes: Shapes, tensors: Mapping[str, Tensor]) -> None:
    """Give a newly built and checked network the recorded tensors and numbers, in place."""
    before = {name: held.tensor for name, held in named_tensors(model).items()}
    made = {name: tensors[name] for name in shapes.tensors}
    for name, stored in shapes.tensors.items():
        if stored.kind is Kind.PARAMETER:
            made[name] = nn.Parameter(tensors[name], stored.trains)
    made |= {name: made[first] for name, first in shapes.ties.items()}
    # Assigned as a user would, not through the dictionaries: some modules keep a second list of their weights.
    for name in (*made, *shapes.dropped):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, made.get(name))
    replace_tensors(model, {id(old): made[name] for name, old in before.items() if name in made})
    present = settable_numbers(model)
    for place, number in shapes.attributes.items():
        if place in present and not same_number(number, present[place]):
            path, name = place.split(":")
            module = model.get_submodule(path)
            held_as = type(named.get_attribute(module, name))
            several = isinstance(number, tuple) and present[place] is not None
            named.set_attribute(module, name, held_as(number) if several else number)
