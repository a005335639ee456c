"""Save and restore everything that running a network may change: tensors, attributes, containers, closures, caches.

A run may change more than tensors: modules store activations on themselves, hooks append to lists, functions cache
results. Runs on fake data would leave tensors without numbers in all these places.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from regrow.tracing.reachable import Reachable, is_plain_object


def find_tensors(value: object) -> Iterator[Tensor]:
    """Yield every tensor in a value: a network with its lists, dicts and objects, or any of these.

    Args:
        value: Where to search.

    >>> [x.shape for x in find_tensors({"a": [torch.ones(2)], "b": (torch.ones(3), 1)})]
    [torch.Size([2]), torch.Size([3])]
    """
    visited = Reachable(code=False)
    visited.visit(value)
    yield from visited.tensors


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a model by name; tied tensors appear under each of their names.

    Args:
        model: The model.
    """
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def select_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return those of some parameters and buffers that a model has, by name.

    Args:
        model: The model.
        names: Any names of parameters and buffers.
    """
    result: dict[str, Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = module._parameters.get(leaf, module._buffers.get(leaf))
        if tensor is not None:
            result[name] = tensor
    return result


def describe_state(model: nn.Module) -> dict[tuple[str, str], object]:
    """Return a description of each attribute of each module: shapes and dtypes of tensors, plain values themselves.

    Two runs of a network are comparable only if this is the same before both.

    Args:
        model: The network.
    """
    return {
        (path, name): _form(value, 3)
        for path, module in model.named_modules()
        for held in (vars(module), module._parameters, module._buffers)
        for name, value in held.items()
        if name not in _OF_MODULES
    }


_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _form(value: Any, depth: int) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and depth:
        return len(value), *(_form(one, depth - 1) for one in list(value.values())[:_MOST])
    if isinstance(value, list | tuple | deque) and depth:
        return len(value), *(_form(one, depth - 1) for one in list(value)[:_MOST])
    if depth and not isinstance(value, nn.Module) and is_plain_object(value):
        return type(value).__name__, *(_form(one, depth - 1) for one in vars(value).values())
    return type(value).__name__


_MOST = 64


def code_of(model: nn.Module) -> tuple[object, ...]:
    """Return what runs in a network: the class of each module, the functions it has instead of methods, and its hooks.

    Equal for a copy of the network; not equal once a module was exchanged, a ``forward`` replaced or a hook added.

    Args:
        model: The network.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> before = code_of(net)
    >>> net[1] = nn.GELU()
    >>> code_of(net) == before
    False
    """
    return tuple(
        (path, type(module), *((name, *map(_function, _functions(value))) for name, value in vars(module).items()))
        for path, module in model.named_modules(remove_duplicate=False)
    )


def _functions(value: Any) -> list[Any]:
    """Return an attribute's functions: itself, or those that it lists."""
    return [*filter(callable, value.values() if isinstance(value, Mapping) else [value])]


def _function(value: Any) -> Any:
    """Return the function itself behind methods and partials, which copies of a network have anew."""
    while (inner := getattr(value, "__func__", None) or getattr(value, "func", None)) is not None:
        value = inner
    return value if isinstance(value, FunctionType | type) else type(value)


@contextmanager
def preserve_state(model: nn.Module, outside: bool = False, entries: bool = False) -> Iterator[None]:
    """Context manager that afterwards undoes what a run may have changed in a network and the objects it reaches.

    It restores attributes, parameters, buffers, lists, dicts and other objects (the same objects in the same places),
    variables of hooks and other functions that modules hold, dicts and lists of the Python modules that define them,
    cached functions, and the state of the CPU's random generator.

    Args:
        model: The network.
        outside: Whether to leave out what only the network itself holds, as for a copy that is thrown away.
        entries: Whether to restore the values of buffers and other tensors too (not those of parameters).
    """
    known = _REACHED.get() if outside else None
    reached = known or Reachable(inside=not outside)
    if known is None:
        reached.visit(model)
    plain = [x for x in reached.tensors if entries and not isinstance(x, nn.Parameter) and not x.is_meta]
    saved = [(x, x._version, x.detach().clone()) for x in plain]
    token = _REACHED.set(reached)
    try:
        with torch.random.fork_rng(devices=()):
            yield
    finally:
        _REACHED.reset(token)
        reached.restore(inside=not outside)
        with torch.no_grad():
            for tensor, version, old in saved:
                if tensor._version != version:
                    tensor.detach().copy_(old)


_REACHED: ContextVar[Reachable | None] = ContextVar("reached", default=None)
"""What a network reaches whose state is preserved: its copies reach the same outside of themselves."""


class Snapshot:
    """The contents of everything that can be reached from a value.

    Args:
        value: The value, for example a module.
    """

    def __init__(self, value: object) -> None:
        self._places = Reachable()
        self._places.visit(value)

    def is_unchanged(self) -> bool:
        """Whether everything still has its contents."""
        return self._places.is_unchanged()

    def restore(self) -> None:
        """Restore the contents: the same objects in the same places; the entries of tensors stay."""
        self._places.restore()
