"""Tensors that modules hold outside their parameters and buffers: as plain attributes, or in lists and dicts."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from regrow.store.errors import StoreError

_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has: its parameters, buffers, submodules and hooks."""
_DEEPEST = 4


def attribute_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return dotted name → tensor, for every tensor that a module holds as a plain attribute.

    >>> import torch
    >>> net = nn.Linear(2, 2)
    >>> net.scale = torch.ones(2)
    >>> list(attribute_tensors(net))
    ['scale']
    """
    return {
        f"{path}.{name}" if path else name: value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor) and name not in _OWN
    }


def packed_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return place → tensor, for every tensor inside a list, tuple or dict that a module holds.

    >>> import torch
    >>> net = nn.Linear(2, 2)
    >>> net.anchors = [torch.ones(2)]
    >>> list(packed_tensors(net))
    ['anchors[0]']
    """
    return {
        f"{path}.{name}{place}" if path else f"{name}{place}": tensor
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, list | tuple | dict) and name not in _OWN
        for place, tensor in _inside(value, _DEEPEST)
    }


def unregistered_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return name or place → tensor, for every tensor that is neither a parameter nor a buffer."""
    return attribute_tensors(model) | packed_tensors(model)


def check_place(model: nn.Module, place: str, shape: tuple[int, ...]) -> None:
    """Raise StoreError unless a tensor of a shape may be put into a list or mapping that a module holds."""
    there = packed_tensors(model).get(place)
    if there is None or there.shape != shape:
        has = "no tensor" if there is None else f"a tensor of shape {tuple(there.shape)}"
        raise StoreError(
            f"the architecture has {has} in the place {place!r}, the record one of shape {shape}; make it in the "
            "function that builds the network"
        )


def is_place(name: str) -> bool:
    """Whether the name of a stored tensor is a place inside a list or mapping, instead of a dotted name.

    >>> is_place("anchors[0]"), is_place("layer.scale")
    (True, False)
    """
    return name.endswith("]")


def check_attribute(model: nn.Module, name: str) -> None:
    """Raise StoreError unless a tensor may be assigned to a plain attribute of this name."""
    path, _, leaf = name.rpartition(".")
    module = dict(model.named_modules()).get(path)
    parts = () if module is None else (*module._parameters, *module._buffers, *module._modules, *_OWN)
    free = module is not None and leaf.isidentifier() and not leaf.startswith("__") and leaf not in parts
    held = (getattr(type(module), leaf, None), vars(module).get(leaf) if free else None)
    if not free or not all(isinstance(value, Tensor | None) for value in held):
        raise StoreError(f"the architecture has no place for a tensor {name!r} as an attribute; restore shapes.json")


def replace_tensors(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Replace tensors, in place, wherever modules hold them outside their parameters and buffers."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in _OWN and any(id(tensor) in new for _, tensor in _inside([value], _DEEPEST + 1)):
                vars(module)[name] = _replace(value, new)


def _inside(value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if isinstance(part, Tensor):
            yield f"[{key!r}]", part
        elif isinstance(part, list | tuple | dict) and depth:
            for place, tensor in _inside(part, depth - 1):
                yield f"[{key!r}]{place}", tensor


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
