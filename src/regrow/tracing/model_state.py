"""Save and restore everything that running a network may change: tensors, attributes, containers, closures, caches.

A run may change more than tensors: modules store activations on themselves, hooks append to lists, functions cache
results. Runs on fake data would leave tensors without numbers in all these places.
"""

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import _lru_cache_wrapper, lru_cache, partial
from operator import is_
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "builtins"}
"""Packages whose objects (locks, loggers, devices) are not searched: a network's code does not write into them."""


@dataclass(eq=False)
class Snapshot:
    """Everything reachable from a value, with its contents when the snapshot was made.

    Args:
        value: The value, for example a module.
        inside: Whether to save what only the value itself holds.
        code: Whether to follow functions and classes.
    """

    value: Any
    inside: bool = True
    code: bool = True
    seen: set[int] = field(default_factory=set)
    tensors: list[Tensor] = field(default_factory=list)
    containers: list[tuple[Any, Any]] = field(default_factory=list)
    attributes: list[tuple[Any, Any]] = field(default_factory=list)
    cells: list[tuple[CellType, Any]] = field(default_factory=list)
    classes: list[tuple[type, dict[str, Any]]] = field(default_factory=list)
    caches: list[tuple[Any, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ask = [self.value]
        while ask:  # without recursion
            value = ask.pop()
            if type(value) not in _LEAVES and id(value) not in self.seen:
                self.seen.add(id(value))
                ask += reversed(list(self._parts(value)))

    def is_unchanged(self) -> bool:
        """Whether everything still has its contents; of tensors, that they are the same objects."""
        return (
            all(_holds(container, old) for container, old in (*self.containers, *self.attributes))
            and all(contents_of(cell) is value for cell, value in self.cells)
            and all(_holds(_attributes(kind), [*old.items()]) for kind, old in self.classes)
            and all(cache.cache_info().currsize == size for cache, size in self.caches)
        )

    def restore(self, inside: bool = True) -> None:
        """Restore everything that has changed; ``inside``: attributes of objects, too."""
        for container, old in (*self.containers, *(self.attributes if inside else ())):
            _refill(container, old)
        for cell, value in self.cells:
            if value is _UNSET and contents_of(cell) is not _UNSET:
                del cell.cell_contents
            elif contents_of(cell) is not value:
                cell.cell_contents = value
        for kind, attributes in self.classes:
            now = _attributes(kind)
            for name in now.keys() - attributes.keys():
                delattr(kind, name)
            for name, value in attributes.items():
                if now.get(name, now) is not value:
                    setattr(kind, name, value)
        for cache, size in self.caches:
            if cache.cache_info().currsize != size:
                cache.cache_clear()

    def _parts(self, one: Any) -> Iterator[Any]:
        if isinstance(one, Tensor):
            self.tensors.append(one)
        elif isinstance(one, dict | list | set | deque):
            yield from self._of_container(one)
        elif isinstance(one, tuple | frozenset):
            yield from one
        elif isinstance(one, FunctionType):
            yield from self._of_function(one) if self.code else ()
        elif isinstance(one, MethodType):
            yield from (one.__self__, one.__func__)
        elif isinstance(one, partial):
            yield from (one.func, one.args, one.keywords)
        elif isinstance(one, _lru_cache_wrapper):
            self.caches.append((one, one.cache_info().currsize))
        elif isinstance(one, nn.Module) or is_plain_object(one):
            yield from self._of_class(type(one)) if self.code else ()
            if self.inside:
                self.attributes.append((vars(one), _contained(vars(one))))
            yield from vars(one).values()

    def _of_container(self, container: Any) -> Iterator[Any]:
        self.containers.append((container, _contained(container)))
        yield from dict.values(container) if isinstance(container, dict) else container

    def _of_function(self, function: FunctionType) -> Iterator[Any]:
        for cell in function.__closure__ or ():
            value = contents_of(cell)
            self.cells.append((cell, value))
            yield value
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        for name in names_in(function.__code__):
            value = function.__globals__.get(name)
            near = isinstance(value, FunctionType) and value.__module__ == function.__module__
            if near or isinstance(value, _lru_cache_wrapper) or type(value) in (dict, list, set, deque):
                yield value

    def _of_class(self, kind: type) -> Iterator[Any]:
        for one in kind.__mro__:
            if _foreign(one) or id(one) in self.seen:
                continue
            self.seen.add(id(one))
            own = _attributes(one)
            self.classes.append((one, own))
            for value in own.values():
                inner = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
                if isinstance(inner, FunctionType | _lru_cache_wrapper | Tensor | dict | list | set | deque):
                    yield inner


_LEAVES = frozenset((int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size))


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object of a class outside torch and the standard library."""
    return not isinstance(value, type) and hasattr(value, "__dict__") and not _foreign(type(value))


def _foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _FOREIGN


def _attributes(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("__")}


@lru_cache(maxsize=20_000)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Return the global names and attributes that code may read, inner functions included."""
    inner = (names_in(const) for const in code.co_consts if isinstance(const, CodeType))
    return tuple(dict.fromkeys(name for names in (code.co_names, *inner) for name in names))


_UNSET = object()


def contents_of(cell: CellType) -> Any:
    """Return the contents of a closure's cell; a marker if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return _UNSET


def _contained(container: Any) -> Any:
    """Return the contents of a container, bypassing methods that its class overrides."""
    return list(dict.items(container)) if isinstance(container, dict) else list(container)


def _holds(container: Any, old: list[Any]) -> bool:
    """Whether a container still has its contents."""
    now = _contained(container)
    if len(now) != len(old):
        return False
    if isinstance(container, dict):
        return all(a[0] is b[0] and a[1] is b[1] for a, b in zip(now, old, strict=True))
    return all(map(is_, now, old))


def _refill(container: Any, old: list[Any]) -> None:
    """Restore the contents of a container."""
    if _holds(container, old):
        return
    if isinstance(container, dict):
        kind = OrderedDict if isinstance(container, OrderedDict) else dict
        kind.clear(container)
        for key, value in old:
            kind.__setitem__(container, key, value)
    else:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(old)


def find_tensors(value: object) -> Iterator[Tensor]:
    """Yield every tensor in a value: a network with its lists, dicts and objects, or any of these.

    >>> [x.shape for x in find_tensors({"a": [torch.ones(2)], "b": (torch.ones(3), 1)})]
    [torch.Size([2]), torch.Size([3])]
    """
    yield from Snapshot(value, code=False).tensors


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a model by name; tied tensors appear under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def select_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return those of some parameters and buffers that a model has, by name."""
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
    """
    reached = (_REACHED.get() if outside else None) or Snapshot(model, inside=not outside)
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


_REACHED: ContextVar[Snapshot | None] = ContextVar("reached", default=None)
"""What a network reaches whose state is preserved: its copies reach the same outside of themselves."""
