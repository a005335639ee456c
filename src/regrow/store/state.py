"""The state of a network besides its code: named tensors, ties, and the numbers in module attributes.

Tensors may lie outside parameters and buffers: as plain attributes, or in lists and dicts, which are not stored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from regrow.store.shapes import Number, Shapes, TensorKind
from regrow.store.tensors import as_bytes
from regrow.tracing import attributes as named

# Attributes that every module has: its parameters, buffers, submodules and hooks.
MODULE_VARS = frozenset(vars(nn.Module()))
_MAX_DEPTH = 4  # of containers in a list or dict, in which tensors are looked for


@dataclass(frozen=True)
class HeldTensor:
    """A tensor of a network, and whether it is a parameter, a buffer or another kind."""

    tensor: Tensor
    kind: TensorKind


def named_tensors(model: nn.Module) -> dict[str, HeldTensor]:
    """Return name → tensor and kind, for every parameter and buffer; one with several names is under each of them."""
    result: dict[str, HeldTensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                result[dot + leaf] = HeldTensor(parameter, TensorKind.PARAMETER)
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                kind = TensorKind.DERIVED if leaf in module._non_persistent_buffers_set else TensorKind.BUFFER
                result[dot + leaf] = HeldTensor(buffer, kind)
    return result


def find_ties(tensors: Mapping[str, HeldTensor]) -> dict[str, str]:
    """Return further name → first name, of tied tensors (the same object or memory); derived buffers are left out.

    >>> net = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    >>> net["b"].weight = net["a"].weight
    >>> find_ties(named_tensors(net))
    {'b.weight': 'a.weight'}
    """
    first: dict[Any, str] = {}
    result = {}
    for name, held in tensors.items():
        t = held.tensor
        if held.kind is TensorKind.DERIVED:
            continue
        has_memory = t.numel() and not t.is_meta and not isinstance(t, FakeTensor)
        memory = (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) if has_memory else id(t)
        owner = first.setdefault((held.kind, memory), name)
        if owner != name:
            result[name] = owner
    return result


def attribute_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return dotted name → tensor, for every tensor that a module holds as a plain attribute, outside its buffers.

    >>> net = nn.Linear(2, 2)
    >>> net.scale = torch.ones(2)
    >>> list(attribute_tensors(net))
    ['scale']
    """
    return {name: value for name, value in _own_attributes(model) if isinstance(value, Tensor)}


def container_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return ``dotted.attribute[key]`` → tensor, for every tensor in a list, tuple or dict that a module holds.

    >>> net = nn.Linear(2, 2)
    >>> net.anchors = [torch.ones(2)]
    >>> list(container_tensors(net))
    ['anchors[0]']
    """
    return {
        f"{name}{key}": tensor
        for name, value in _own_attributes(model)
        if isinstance(value, list | tuple | dict)
        for key, tensor in _tensors_in(value, _MAX_DEPTH)
    }


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name → tensor, for every parameter, buffer and plain attribute of a network."""
    held = {name: held.tensor for name, held in named_tensors(model).items()}
    return held | attribute_tensors(model)


def _own_attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of modules' own attributes: those that a bare ``nn.Module`` does not have."""
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        yield from ((dot + name, value) for name, value in vars(module).items() if name not in MODULE_VARS)


def _tensors_in(value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (``[key]`` or ``[key][key]``…, tensor) of a list, tuple or dict, and of ``depth`` levels of those in it."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if isinstance(part, Tensor):
            yield f"[{key!r}]", part
        elif isinstance(part, list | tuple | dict) and depth:
            yield from ((f"[{key!r}]{keys}", tensor) for keys, tensor in _tensors_in(part, depth - 1))


def replace_tensors(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Replace tensors that modules hold outside parameters and buffers, in place; ``new``: ``id(old)`` → new tensor."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            held = () if name in MODULE_VARS else _tensors_in([value], _MAX_DEPTH + 1)
            if any(id(tensor) in new for _, tensor in held):
                vars(module)[name] = _replace(value, new)


def _replace(value: Any, new: Mapping[int, Tensor]) -> Any:
    """Return a value with each tensor replaced by ``new[id(tensor)]``, if any; lists and dicts change in place."""
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
    """Return ``module:attribute`` → value, of each module attribute that is a number or a list or tuple of integers.

    Numbers of heads, groups and experts in a module's configuration are ``module:config.name``.

    >>> find_numbers(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))["1:normalized_shape"]
    (3,)
    """
    return {place: number for place, number in settable_numbers(model).items() if number is not None}


def settable_numbers(model: nn.Module) -> dict[str, Number | None]:
    """Return what :func:`find_numbers` does, and attributes that are ``None``: a number may replace them (an epsilon).

    >>> settable_numbers(nn.RMSNorm(3))
    {':normalized_shape': (3,), ':eps': None}
    """
    result: dict[str, Number | None] = {}
    for path, module in model.named_modules():
        for name, value in (*vars(module).items(), *named.config_counts(module)):
            if _is_number(value):
                result[f"{path}:{name}"] = tuple(value) if isinstance(value, list) else value
            elif value is None and name not in MODULE_VARS:
                result[f"{path}:{name}"] = None
    return result


def _is_number(value: Any) -> bool:
    """Whether an attribute is an int, a float, or a non-empty list or tuple of ints."""
    if isinstance(value, tuple | list):
        return bool(value) and all(type(part) is int for part in value)
    return type(value) in (int, float)


def same_number(a: Number | None, b: Number | None) -> bool:
    """Whether two numbers are equal, or both NaN."""
    return a == b or (a != a and b != b)


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal shape, dtype and bits, on whatever devices; ``False`` on the meta device."""
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
        return False
    return torch.equal(as_bytes(a), as_bytes(b))


def restore(model: nn.Module, shapes: Shapes, tensors: Mapping[str, Tensor]) -> None:
    """Give a newly built network that fits ``shapes`` its tensors (name → tensor, uncopied) and numbers, in place."""
    before = {name: held.tensor for name, held in named_tensors(model).items()}
    new = {name: tensors[name] for name in shapes.tensors}
    for name, stored in shapes.tensors.items():
        if stored.kind is TensorKind.PARAMETER:
            new[name] = nn.Parameter(tensors[name], stored.trains)
    new |= {name: new[first] for name, first in shapes.ties.items()}
    # Assigned as a user would, not through the dictionaries: some modules keep a second list of their weights.
    for name in (*new, *shapes.dropped):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, new.get(name))
    replace_tensors(model, {id(old): new[name] for name, old in before.items() if name in new})
    present = settable_numbers(model)
    for key, number in shapes.attributes.items():
        if key in present and not same_number(number, present[key]):
            path, name = key.split(":")
            module = model.get_submodule(path)
            if isinstance(number, tuple) and present[key] is not None:  # a list stays a list
                number = type(named.get_attribute(module, name))(number)
            named.set_attribute(module, name, number)
