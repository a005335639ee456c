"""Copy networks and examples without their numbers: such copies need no memory, and run on fake tensors."""

import copy
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from operator import is_not
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from regrow.core.axes import Example
from regrow.tracing.model_state import find_tensors, state_of

M = TypeVar("M", bound=nn.Module)


def meta_copy(model: M, shapes: Mapping[str, tuple[int, ...]]) -> tuple[M, FakeTensorMode]:
    """Return a copy of a model with fake parameters and buffers, in other shapes where given, and its fake mode.

    Tensors that are neither parameters nor buffers keep their numbers, which are shared.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, object] = {}
    for name, tensor in state_of(model).items():
        if name in shapes or id(tensor) not in memo:
            memo[id(tensor)] = without_numbers(mode, shapes.get(name, tensor.shape), tensor)

    def other(tensor: Tensor) -> Tensor:
        made = tensor.detach()
        return without_numbers(mode, tensor.shape, made) if isinstance(tensor, FakeTensor) else made

    return copy_model(model, other, memo), mode


def without_numbers(mode: FakeTensorMode, shape: tuple[int, ...], like: Tensor) -> FakeTensor:
    """Return a fake tensor or parameter of a shape, with the dtype, device and kind of another one."""
    made = FakeTensor(mode, torch.empty(shape, dtype=like.dtype, device="meta"), like.device)
    if isinstance(like, nn.Parameter):  # what nn.Parameter makes of a subclass, without running operations
        made.requires_grad_(like.requires_grad)
        made._is_param = True
    return made


def empty_parameters(mode: FakeTensorMode) -> Callable[[nn.Parameter], nn.Parameter]:
    """Return a function from a parameter to one of its shape, dtype and device that is fake."""

    def empty(parameter: nn.Parameter) -> nn.Parameter:
        made = without_numbers(mode, parameter.shape, parameter)
        return parameter if isinstance(parameter, FakeTensor) else made  # type: ignore[return-value]

    return empty


def copy_model(model: M, made: Callable[[Tensor], Tensor], memo: dict[int, object] | None = None) -> M:
    """Deep-copy a model with each tensor replaced by what a function returns for it; non-leaf tensors are allowed.

    Attributes that cannot be copied (a lock, an open file) are shared.

    >>> net = nn.Linear(2, 1)
    >>> net.last = net(torch.ones(1, 2))
    >>> copy_model(net, lambda x: x.detach().double()).last.dtype
    torch.float64
    """
    return _Copy(made, {} if memo is None else memo).module(model)


def clone_model(model: M) -> M:
    """Deep-copy a model with all of its tensors, like ``copy.deepcopy``, but also one that holds non-leaf tensors."""
    return copy_model(model, lambda x: x.detach().clone())


class _Copy:
    def __init__(self, made: Callable[[Tensor], Tensor], memo: dict[int, object]) -> None:
        self.made, self.memo = made, memo

    def module(self, module: nn.Module) -> Any:
        """Copy a module five times as fast as ``copy.deepcopy``, unless its class defines its own way of copying."""
        kind = type(module)
        special = any(getattr(kind, name) is not usual for name, usual in _USUAL.items())
        state = None if special or hasattr(kind, "__deepcopy__") else module.__getstate__()
        if id(module) in self.memo or type(state) is not dict:
            return self.other(module)
        self.memo[id(module)] = made = kind.__new__(kind)
        made.__setstate__({name: self.value(value) for name, value in state.items()})
        return made

    def value(self, value: Any) -> Any:
        kind = type(value)
        if kind in _WHOLE:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if kind is tuple or kind is set:
            members = kind(map(self.value, value))
            if kind is set or any(map(is_not, members, value)):
                return self.memo.setdefault(id(value), members)
            return value
        if kind not in (dict, OrderedDict, list, deque):
            return self.other(value)
        if isinstance(value, dict):
            entries: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
            self.memo[id(value)] = entries
            entries.update((self.value(key), self.value(part)) for key, part in value.items())
            return entries
        parts: deque[Any] | list[Any] = deque(maxlen=value.maxlen) if isinstance(value, deque) else []
        self.memo[id(value)] = parts
        parts.extend(map(self.value, value))
        return parts

    def tensor(self, tensor: Tensor) -> Tensor:
        made = self.made(tensor)
        if isinstance(tensor, nn.Parameter) and not isinstance(made, nn.Parameter | FakeTensor):
            made = nn.Parameter(made, tensor.requires_grad)
        self.memo[id(tensor)] = made
        return made

    def other(self, value: Any) -> Any:
        for tensor in find_tensors(value):
            if id(tensor) not in self.memo:
                self.tensor(tensor)
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:
            if isinstance(value, nn.Module):
                raise
            self.memo[id(value)] = value
            return value


_USUAL = {name: getattr(nn.Module, name) for name in ("__reduce__", "__reduce_ex__", "__getstate__")}
"""Methods that a class of modules overrides to define its own way of being copied."""

_WHOLE = frozenset((int, float, bool, str, type(None), type, FunctionType, torch.dtype, torch.device))
"""Types of values that a copy shares with the model."""


def leaves_in(example: Example) -> list[Any]:
    """Return the tensors and other values in an example, in the order of the placeholders of a recording."""
    return tree_leaves((example.args, dict(example.kwargs)))


def map_tensors(example: Example, change: Callable[[Tensor], Tensor]) -> Example:
    """Return an example with every tensor changed."""
    return Example(*tree_map_only(Tensor, change, (example.args, dict(example.kwargs))))


def fake_example(example: Example, mode: FakeTensorMode) -> Example:
    """Return an example with its tensors as fake tensors of a mode."""
    return map_tensors(example, mode.from_tensor)


def cast_example(example: Example, model: nn.Module) -> Example:
    """Return an example with floating-point tensors in the model's dtype, if the model has only one."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        return example
    (dtype,) = dtypes
    return map_tensors(example, lambda x: x.to(dtype) if x.is_floating_point() else x)


def fake_copy(model: M, example: Example) -> tuple[M, Example]:
    """Return a copy of a model without numbers, and an example for it."""
    copied, mode = meta_copy(model, {})
    return copied, fake_example(example, mode)
