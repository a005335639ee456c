"""Save and restore everything that running a network may change: tensors, attributes, containers, closures, caches.

A run may change more than tensors: modules store activations on themselves, hooks append to lists, functions cache
results. Runs on fake data would leave tensors without numbers in all these places.
"""

import sys
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import _lru_cache_wrapper, lru_cache, partial
from itertools import chain
from operator import is_
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

# Packages whose objects (locks, loggers, devices) are not searched: a network's code does not write into them.
_FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "builtins"}

# Types of values that hold nothing else.
LEAVES = frozenset((int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size))


@dataclass(eq=False)
class Snapshot:
    """Everything reachable from a value (a module, say), with its contents when the snapshot was made."""

    value: object
    inside: bool = True  # whether to save attributes of modules and objects
    code: bool = True  # whether to follow functions and classes
    seen: set[int] = field(default_factory=set)  # ids of what was visited
    tensors: list[Tensor] = field(default_factory=list)  # all that are reachable; their entries are not saved
    holders: list[tuple[Any, list[Any]]] = field(default_factory=list)  # (container, class or closure cell, contents)
    attributes: list[tuple[Any, list[Any]]] = field(default_factory=list)  # (vars of a module or object, contents)
    caches: list[tuple[Any, int]] = field(default_factory=list)  # (cached function, number of its entries)

    def __post_init__(self) -> None:
        pending = [self.value]
        while pending:  # without recursion, which deep structures would exceed
            value = pending.pop()
            if type(value) not in LEAVES and id(value) not in self.seen:
                self.seen.add(id(value))
                pending += reversed(list(self._parts(value)))

    def is_unchanged(self) -> bool:
        """Whether everything still has its contents: the same objects; entries of tensors are not compared."""
        return all(_has_contents(holder, old) for holder, old in (*self.holders, *self.attributes)) and all(
            cache.cache_info().currsize == size for cache, size in self.caches
        )

    def restore(self, inside: bool = True) -> None:
        """Restore changed contents in place, and clear caches that grew; ``inside``: attributes of objects too."""
        for holder, old in (*self.holders, *(self.attributes if inside else ())):
            if not _has_contents(holder, old):
                _restore_contents(holder, old)
        for cache, size in self.caches:
            if cache.cache_info().currsize != size:
                cache.cache_clear()

    def _parts(self, value: Any) -> Iterator[Any]:
        """Save the contents of a value, and yield what it refers to."""
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, dict | list | set | deque):
            self.holders.append((value, _contents(value)))
            yield from dict.values(value) if isinstance(value, dict) else value
        elif isinstance(value, tuple | frozenset):
            yield from value
        elif isinstance(value, FunctionType):
            yield from self._parts_of_function(value) if self.code else ()
        elif isinstance(value, MethodType):
            yield from (value.__self__, value.__func__)
        elif isinstance(value, partial):
            yield from (value.func, value.args, value.keywords)
        elif isinstance(value, _lru_cache_wrapper):
            self.caches.append((value, value.cache_info().currsize))
        elif isinstance(value, nn.Module) or is_plain_object(value):
            yield from self._parts_of_class(type(value)) if self.code else ()
            if self.inside:
                self.attributes.append((vars(value), _contents(vars(value))))
            yield from vars(value).values()

    def _parts_of_function(self, function: FunctionType) -> Iterator[Any]:
        """Save the closure of a function; yield its variables, defaults, and the globals it may change."""
        for cell in function.__closure__ or ():
            self.holders.append((cell, _contents(cell)))
            yield from _contents(cell)
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        for name in names_in(function.__code__):
            value = function.__globals__.get(name)
            near = isinstance(value, FunctionType) and value.__module__ == function.__module__
            if near or isinstance(value, _lru_cache_wrapper) or type(value) in (dict, list, set, deque):
                yield value

    def _parts_of_class(self, kind: type) -> Iterator[Any]:
        """Save the attributes of a class and its own bases; yield their functions, tensors and containers."""
        for base in kind.__mro__:
            if _is_foreign(base) or id(base) in self.seen:
                continue
            self.seen.add(id(base))
            self.holders.append((base, _contents(base)))
            for value in _class_attributes(base).values():
                inner = getattr(value, "fget", None) or getattr(value, "__func__", None) or value
                if isinstance(inner, FunctionType | _lru_cache_wrapper | Tensor | dict | list | set | deque):
                    yield inner


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object with attributes, of a class outside torch, numpy and the standard library."""
    return not isinstance(value, type) and hasattr(value, "__dict__") and not _is_foreign(type(value))


def _is_foreign(kind: type) -> bool:
    """Whether a class is one of torch, numpy or the standard library."""
    return kind.__module__.partition(".")[0] in _FOREIGN


def _class_attributes(kind: type) -> dict[str, Any]:
    """Return name → value of a class's own attributes, without those that begin with two underscores."""
    return {name: value for name, value in vars(kind).items() if not name.startswith("__")}


@lru_cache(maxsize=20_000)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Return the global names and attributes that code may read, inner functions included."""
    inner = (names_in(const) for const in code.co_consts if isinstance(const, CodeType))
    return tuple(dict.fromkeys(name for names in (code.co_names, *inner) for name in names))


_UNSET = object()  # the contents of an empty closure cell, and the value of a missing attribute


def _contents(holder: Any) -> list[Any]:
    """Return what a container, class or cell holds; of a mapping or class, key and value in turn."""
    if isinstance(holder, dict):
        return list(chain.from_iterable(dict.items(holder)))  # bypasses overridden methods
    if isinstance(holder, CellType):
        try:
            return [holder.cell_contents]
        except ValueError:
            return [_UNSET]
    return _contents(_class_attributes(holder)) if isinstance(holder, type) else list(holder)


def _has_contents(holder: Any, old: list[Any]) -> bool:
    """Whether a container, class or cell holds the objects that :func:`_contents` returned."""
    now = _contents(holder)
    return len(now) == len(old) and all(map(is_, now, old))


def _restore_contents(holder: Any, old: list[Any]) -> None:
    """Put back, in place, what :func:`_contents` returned for a container, class or cell."""
    if isinstance(holder, CellType):
        if old[0] is _UNSET:
            del holder.cell_contents
        else:
            holder.cell_contents = old[0]
    elif isinstance(holder, type):
        now, entries = _class_attributes(holder), dict(zip(old[::2], old[1::2], strict=True))
        for name in now.keys() - entries.keys():
            delattr(holder, name)
        for name, value in entries.items():
            if now.get(name, _UNSET) is not value:
                setattr(holder, name, value)
    elif isinstance(holder, dict):
        kind = OrderedDict if isinstance(holder, OrderedDict) else dict
        kind.clear(holder)
        for key, value in zip(old[::2], old[1::2], strict=True):
            kind.__setitem__(holder, key, value)
    else:
        holder.clear()
        put_back = holder.update if isinstance(holder, set) else holder.extend
        put_back(old)


def find_tensors(value: object) -> Iterator[Tensor]:
    """Yield each tensor in a value once: a network with its lists, dicts and objects, or any of these.

    >>> [x.shape for x in find_tensors({"a": [torch.ones(2)], "b": (torch.ones(3), 1)})]
    [torch.Size([2]), torch.Size([3])]
    """
    yield from Snapshot(value, code=False).tensors


class OutputError(TypeError):
    """Raised for an output of a network in which not every tensor can be found."""


def output_tensors(value: object) -> list[Tensor]:
    """Return the tensors in a network's output: entries of collections, attributes and slots of other objects.

    Raises :class:`OutputError` if there are none, or some have no order (in a set, say).

    >>> import dataclasses, torch
    >>> Pair = dataclasses.make_dataclass("Pair", ["first", "rest"], slots=True)
    >>> [len(x) for x in output_tensors(Pair(torch.ones(2), {"a": [torch.ones(3)]}))]
    [2, 3]
    """
    result: list[Tensor] = []
    _collect_tensors(value, result, set())
    if not result:
        raise OutputError(f"it returns no tensor (a {type(value).__name__}); return tensors, also inside of objects")
    return result


def _collect_tensors(value: object, result: list[Tensor], visited: set[int]) -> None:
    """Append the tensors in a value to ``result``; raise OutputError where they have no order, as in a set."""
    if isinstance(value, Tensor):
        result.append(value)
        return
    without = (str, bytes, bytearray, range, nn.Module, type)
    if id(value) in visited or isinstance(value, without) or type(value).__module__ == "numpy":
        return
    visited.add(id(value))
    if isinstance(value, Iterator | Set | FunctionType | MethodType | partial):
        name = type(value).__name__
        raise OutputError(f"it returns a {name}, in which tensors have no place to compare; return a list or tuple")
    parts: Iterable[object]
    if isinstance(value, Collection):
        parts = value.values() if isinstance(value, Mapping) else value
    else:
        state = object.__getstate__(value)
        states = state if isinstance(state, tuple) else (state,)  # attributes, and slots if there are any
        parts = [part for entries in states for part in (entries or {}).values()]
    for part in parts:
        _collect_tensors(part, result, visited)


def copy_tensor(x: Tensor) -> Tensor:
    """Return a copy of a tensor without a gradient history."""
    return x.detach().clone()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a model by name; tied tensors appear under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def select_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return name → parameter or buffer, for those of ``names`` that a model has now."""
    state = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        with suppress(AttributeError):
            module = model.get_submodule(path)
            tensor = module._parameters.get(leaf, module._buffers.get(leaf))
            if tensor is not None:
                state[name] = tensor
    return state


def describe_state(model: nn.Module) -> dict[tuple[str, str], object]:
    """Return (module path, attribute) → description: shape and dtype of a tensor, a plain value itself.

    Two runs of a network are comparable only if this is the same before both.
    """
    return {
        (path, name): _describe_value(value, 3)
        for path, module in model.named_modules()
        for attributes in (vars(module), module._parameters, module._buffers)
        for name, value in attributes.items()
        if name not in _OF_MODULES
    }


# Attributes that every module has.
_OF_MODULES = frozenset(vars(nn.Module()))


def _describe_value(value: Any, depth: int) -> Any:
    """Return a comparable description of a value, to ``depth`` levels of containers and objects."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping | list | tuple | deque) and depth:
        parts = list(value.values() if isinstance(value, Mapping) else value)[:_MOST_ENTRIES]
        return len(value), *(_describe_value(part, depth - 1) for part in parts)
    if depth and not isinstance(value, nn.Module) and is_plain_object(value):
        return type(value).__name__, *(_describe_value(part, depth - 1) for part in vars(value).values())
    return type(value).__name__


_MOST_ENTRIES = 64  # of a container, that are described


def describe_code(model: nn.Module) -> tuple[object, ...]:
    """Return what runs in a network: the class of each module, the functions it has instead of methods, and its hooks.

    Equal for a copy of the network; not equal once a module was exchanged, a ``forward`` replaced or a hook added.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> before = describe_code(net)
    >>> net[1] = nn.GELU()
    >>> describe_code(net) == before
    False
    """
    rows: list[object] = []
    for path, module in model.named_modules(remove_duplicate=False):
        rows += [path, type(module)]
        for name, value in vars(module).items():
            functions = filter(callable, value.values() if isinstance(value, Mapping) else [value])
            rows.append((name, *map(_unwrap_function, functions)))
    return tuple(rows)


def _unwrap_function(value: Any) -> Any:
    """Return the function behind methods and partials, which a copy has anew; of another callable, its class."""
    while (inner := getattr(value, "__func__", None) or getattr(value, "func", None)) is not None:
        value = inner
    return value if isinstance(value, FunctionType | type) else type(value)


@contextmanager
def preserve_state(model: nn.Module, outside: bool = False, entries: bool = False) -> Iterator[None]:
    """Context manager that restores what a run may change in a network and the objects it reaches.

    It restores attributes, parameters, buffers, lists, dicts and other objects (the same objects in the same places),
    variables of hooks and other functions that modules hold, dicts and lists of the Python modules that define them,
    cached functions, and the state of the CPU's random generator. ``outside``: only what lies outside the network's own
    attributes. ``entries``: the entries of buffers and other tensors too, but not of parameters.
    """
    reached = (_REACHED.get() if outside else None) or Snapshot(model, inside=not outside)
    plain = [x for x in reached.tensors if entries and not isinstance(x, nn.Parameter) and not x.is_meta]
    saved = [(x, x._version, copy_tensor(x)) for x in plain]
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


# The snapshot of the network whose state is preserved now: its copies reach the same objects outside themselves.
_REACHED: ContextVar[Snapshot | None] = ContextVar("reached", default=None)
