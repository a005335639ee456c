"""What two modules have in common if one runs the same operations as the other, on its own parameters."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.tracing.block_numbers import FIRST
from regrow.tracing.reachable import is_plain_object

Numbers = Mapping[nn.Module, Mapping[str, int]]
"""Module → the attributes that number it."""

PLAIN = frozenset((int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size))
"""Types whose values are compared."""


def numbers_of(module: nn.Module) -> dict[str, int]:
    """Return the integers that number a module, where nothing but the module itself answers for the name.

    Args:
        module: The module.
    """
    own = {name: value for name in FIRST if type(value := vars(module).get(name)) is int}
    return {name: value for name, value in own.items() if not hasattr(type(module), name)}


def structure_of(module: nn.Module, numbers: Numbers) -> tuple[object, ...]:
    """Return what tells a module from others: classes, attributes and tensors.

    Args:
        module: The module.
        numbers: Module → attributes to leave out, since reads of them are seen.

    Raises:
        TypeError: If it has hooks, a random generator, or an attribute that cannot be compared.
    """
    places: dict[int, int] = {}
    parts: list[object] = []
    objects: dict[int, object] = {}
    for path, one in module.named_modules():
        for name, value in vars(one).items():
            if name in _HOOKS and value:
                raise TypeError
            if name in ("_parameters", "_buffers"):
                for leaf, x in value.items():
                    parts.append((path, leaf, None if x is None else _tensor(x, places.setdefault(id(x), len(places)))))
            elif name == "_modules":
                parts.append((path, tuple([(leaf, child is None) for leaf, child in value.items()])))
            elif name not in _HOOKS and name not in numbers.get(one, ()):
                parts.append((path, name, _attribute(value, objects)))
        parts.append(type(one))
    return tuple(parts)


_HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))


def _tensor(x: Tensor, place: int) -> object:
    return (type(x), isinstance(x, nn.Parameter), x.shape, x.stride(), x.dtype, x.device, x.requires_grad, place)


def _attribute(value: Any, objects: dict[int, object]) -> object:
    """Return the contents of a plain attribute or object (a configuration), and the identity of any other.

    Args:
        value: The value.
        objects: ``id`` of an object → its contents; completed in place.
    """
    kind = type(value)
    if kind in PLAIN:
        return (kind, value)
    if kind is tuple or kind is list:
        return (kind, *[_attribute(one, objects) for one in value])
    if kind is dict:
        return (kind, *[(name, _attribute(one, objects)) for name, one in value.items()])
    if kind is set:
        return (kind, frozenset(value))
    if isinstance(value, random.Random) or kind.__module__.startswith("numpy.random"):
        raise TypeError  # what it gives next is not seen
    if id(value) not in objects:
        objects[id(value)] = (kind, id(value))
        if is_plain_object(value) and not isinstance(value, Tensor | nn.Module) and not callable(value):
            objects[id(value)] = (kind, *[(name, _attribute(one, objects)) for name, one in vars(value).items()])
    return objects[id(value)]
