"""Copy networks and examples without their numbers, and infer what operations give on such fake tensors.

Fake tensors infer results too, but check each operation for other needs (data, other devices, symbols, casts), and many
of their kernels are written in Python. The operations here are those that most of a network consists of, for operands
on one device; fake tensors handle all others, and whatever fails here.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from operator import is_not
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from regrow.core.axes import Example
from regrow.tracing.known_forms import is_plain
from regrow.tracing.model_state import copy_tensor, find_tensors, state_of
from regrow.tracing.nodes import leaves_of, map_arguments

M = TypeVar("M", bound=nn.Module)


def meta_copy(model: M, shapes: Mapping[str, tuple[int, ...]]) -> tuple[M, FakeTensorMode]:
    """Return a copy of a model with fake parameters and buffers, and its fake mode; ``shapes``: name → other shape.

    Tensors that are neither parameters nor buffers keep their values, which are shared with the model.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, object] = {}
    for name, tensor in state_of(model).items():
        if name in shapes or id(tensor) not in memo:
            memo[id(tensor)] = fake_like(mode, shapes.get(name, tensor.shape), tensor)

    def share(tensor: Tensor) -> Tensor:
        """Return a tensor that shares the values of one that is neither parameter nor buffer; of a fake one, a copy."""
        shared = tensor.detach()
        return fake_like(mode, tensor.shape, shared) if isinstance(tensor, FakeTensor) else shared

    return copy_model(model, share, memo), mode


def fake_like(mode: FakeTensorMode, shape: tuple[int, ...], like: Tensor) -> FakeTensor:
    """Return a fake tensor of a shape with the dtype and device of ``like``; a parameter if ``like`` is one."""
    fake = FakeTensor(mode, torch.empty(shape, dtype=like.dtype, device="meta"), like.device)
    if isinstance(like, nn.Parameter):  # what nn.Parameter makes of a subclass, without running operations
        fake.requires_grad_(like.requires_grad)
        fake._is_param = True
    return fake


def parameter_faker(mode: FakeTensorMode) -> Callable[[nn.Parameter], nn.Parameter]:
    """Return a function that makes a fake parameter of the shape, dtype and device of a real one."""

    def empty(parameter: nn.Parameter) -> nn.Parameter:
        """Return a fake parameter like one; a fake one itself."""
        fake = fake_like(mode, parameter.shape, parameter)
        return parameter if isinstance(parameter, FakeTensor) else fake  # type: ignore[return-value]

    return empty


def copy_model(model: M, change: Callable[[Tensor], Tensor] = copy_tensor, memo: dict[int, object] | None = None) -> M:
    """Deep-copy a model, with each tensor replaced by ``change(tensor)``; non-leaf tensors are allowed.

    Attributes that cannot be copied (a lock, an open file) are shared, as is what ``memo`` (id → copy) already holds.

    >>> net = nn.Linear(2, 1)
    >>> net.last = net(torch.ones(1, 2))
    >>> copy_model(net, lambda x: x.detach().double()).last.dtype
    torch.float64
    """
    return _Copier(change, {} if memo is None else memo).copy_module(model)


def clone_model(model: M) -> M:
    """Deep-copy a model with all of its tensors, like ``copy.deepcopy``, but also one that holds non-leaf tensors."""
    return copy_model(model)


class _Copier:
    """Copies modules and values as ``copy.deepcopy`` does, but faster, and tensors by a function."""

    def __init__(self, change: Callable[[Tensor], Tensor], memo: dict[int, object]) -> None:
        self.change, self.memo = change, memo

    def copy_module(self, module: nn.Module) -> Any:
        """Copy a module five times as fast as ``copy.deepcopy``, unless its class defines its own way of copying."""
        kind = type(module)
        special = any(getattr(kind, name) is not usual for name, usual in _USUAL.items())
        state = None if special or hasattr(kind, "__deepcopy__") else module.__getstate__()
        if id(module) in self.memo or type(state) is not dict:
            return self.copy_other(module)
        self.memo[id(module)] = copied = kind.__new__(kind)
        copied.__setstate__({name: self.copy_value(value) for name, value in state.items()})
        return copied

    def copy_value(self, value: Any) -> Any:
        """Copy an attribute of a module, with all that it holds."""
        kind = type(value)
        if kind in _WHOLE:
            return value
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, Tensor):
            return self.copy_tensor(value)
        if isinstance(value, nn.Module):
            return self.copy_module(value)
        if kind is tuple or kind is set:
            members = kind(map(self.copy_value, value))
            if kind is set or any(map(is_not, members, value)):
                return self.memo.setdefault(id(value), members)
            return value
        if kind is list:
            items: list[object] = []
            self.memo[id(value)] = items  # before its items: a list may hold itself
            items.extend(map(self.copy_value, value))
            return items
        if kind is dict or kind is OrderedDict:
            mapping: dict[object, object] = kind()
            self.memo[id(value)] = mapping
            mapping.update((self.copy_value(key), self.copy_value(part)) for key, part in value.items())
            return mapping
        return self.copy_other(value)

    def copy_tensor(self, tensor: Tensor) -> Tensor:
        """Copy a tensor by the function; a parameter's copy is a parameter."""
        copied = self.change(tensor)
        if isinstance(tensor, nn.Parameter) and not isinstance(copied, nn.Parameter | FakeTensor):
            copied = nn.Parameter(copied, tensor.requires_grad)
        self.memo[id(tensor)] = copied
        return copied

    def copy_other(self, value: Any) -> Any:
        """Copy an object by ``copy.deepcopy``; return the object itself where that fails, but raise for a module."""
        for tensor in find_tensors(value):
            if id(tensor) not in self.memo:
                self.copy_tensor(tensor)
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:
            if isinstance(value, nn.Module):
                raise
            self.memo[id(value)] = value
            return value


# Methods that a class of modules overrides to define its own way of being copied.
_USUAL = {name: getattr(nn.Module, name) for name in ("__reduce__", "__reduce_ex__", "__getstate__")}

# Types of values that a copy shares with the model.
_WHOLE = frozenset((int, float, bool, str, type(None), type, FunctionType, torch.dtype, torch.device))


def leaves_in(example: Example) -> list[Any]:
    """Return the tensors and other values in an example, in the order of the placeholders of a recording."""
    return tree_leaves((example.args, dict(example.kwargs)))


def map_tensors(example: Example, change: Callable[[Tensor], Tensor]) -> Example:
    """Return an example with each tensor replaced by ``change(tensor)``, which may have another shape."""
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
    """Return a copy of a model on fake tensors, and the example on fake tensors of the same mode."""
    copied, mode = meta_copy(model, {})
    return copied, fake_example(example, mode)


def infer_result(func: object, args: tuple[object, ...], kwargs: dict[str, object], mode: FakeTensorMode) -> object:
    """Return an operation's result on fake tensors, faster than torch; ``NotImplemented`` if no rule applies."""
    rule = _RULES.get(func)
    if (rule is None and func not in _KERNELS) or torch._C._is_any_autocast_enabled():
        return NotImplemented
    tensors = [x for x in leaves_of((args, kwargs)) if isinstance(x, Tensor)]
    operands = [x for x in tensors if is_plain(x) and x.fake_mode is mode]
    if len({x.fake_device for x in operands}) != 1 or len(operands) < len(tensors):
        return NotImplemented
    device, dtype = operands[0].fake_device, operands[0].dtype
    with no_python_dispatcher():
        if rule is not None and dtype.is_floating_point and all(x.dtype is dtype for x in operands):
            result = rule(*args, **kwargs)
            if isinstance(result, Tensor):
                return result
            if result is not None:
                make: Callable[..., Tensor] = torch.empty_strided if len(result) > 1 else torch.empty
                return FakeTensor(mode, make(*result, dtype=dtype, device="meta"), device)
        return _infer_by_kernel(func, args, kwargs, mode, device) if func in _KERNELS else NotImplemented


def _infer_by_kernel(func: Any, args: Any, kwargs: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """Return an operation's result by its kernel for meta tensors; ``NotImplemented`` if that fails."""
    originals: dict[int, Tensor] = {}  # an operation may give what it was given

    def to_meta(x: Tensor) -> Tensor:
        """Return a meta tensor of a fake tensor's form, and remember which one it is for."""
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        originals[id(meta)] = x
        return meta

    operands, named = map_arguments((args, kwargs), Tensor, to_meta)
    try:
        out = func(*operands, **named)
    except Exception:
        return NotImplemented
    return map_arguments(out, Tensor, lambda x: originals[id(x)] if id(x) in originals else FakeTensor(mode, x, device))


# --- rules return (shape,), (shape, strides), the operand that is returned itself, or None if they do not apply ------


def _infer_entrywise(x: Tensor, *others: Any, **settings: Any) -> Any:
    """Return (shape, strides) of an entrywise operation on dense tensors of one form; ``None`` if they are not."""
    tensors = [y for y in others if isinstance(y, Tensor)]
    if len(tensors) > 1 or not all(isinstance(y, Tensor | int | float | str) for y in others):
        return None
    if any(x.shape != y.shape or x.stride() != y.stride() for y in tensors):
        return None
    dense = x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(x)
    return (x.shape, x.stride()) if dense else None


def _infer_in_place(x: Tensor, *others: Any, **settings: Any) -> Any:
    """Return ``x``, into which an entrywise operation writes; ``None`` if operands have another shape."""
    tensors = [y for y in others if isinstance(y, Tensor)]
    numbers = sum(isinstance(y, int | float) for y in others)
    fits = all(x.shape == y.shape for y in tensors)
    return x if fits and len(tensors) + numbers == len(others) else None


def _infer_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> Any:
    """Return (shape,) of a convolution of contiguous, non-empty tensors with numbers as padding; else ``None``."""
    n = weight.dim() - 2
    if x.dim() != n + 2 or not (x.is_contiguous() and weight.is_contiguous()) or x.shape[1] != weight.shape[1] * groups:
        return None
    if len(weight) % groups or not (x.numel() and weight.numel()):
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    steps, pads, gaps = (list(part) * n if len(part) == 1 else part for part in (stride, padding, dilation))
    sides = [
        (side + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, gap in zip(x.shape[2:], weight.shape[2:], steps, pads, gaps, strict=True)
    ]
    return ((len(x), len(weight), *sides),) if min(sides) > 0 and min(pads) >= 0 else None


def _get_ops(names: str) -> list[Any]:
    """Return the ATen operations of names as ``add.Tensor``, separated by spaces; without an overload the default."""
    split = [(*name.split("."), "default")[:2] for name in names.split()]
    return [getattr(getattr(torch.ops.aten, name), overload) for name, overload in split]


_ENTRYWISE = (
    "relu gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu softplus elu mish neg rsqrt sqrt exp cos "
    "sin square abs pow.Tensor_Scalar rsub.Scalar dropout add.Tensor sub.Tensor mul.Tensor div.Tensor"
)
_IN_PLACE = (
    "relu_ silu_ sigmoid_ tanh_ hardswish_ hardtanh_ leaky_relu_ elu_ add_.Tensor sub_.Tensor mul_.Tensor div_.Tensor"
)
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_get_ops(_ENTRYWISE), _infer_entrywise),
    **dict.fromkeys(_get_ops(_IN_PLACE), _infer_in_place),
    **dict.fromkeys(_get_ops("conv1d conv2d conv3d"), _infer_convolution),
}

# Operations whose meta kernels give the right shape and strides for any device.
_KERNELS = frozenset(
    _get_ops(
        "add.Tensor sub.Tensor mul.Tensor div.Tensor linear addmm matmul mm bmm einsum cat softmax.int mean "
        "mean.dim sum.dim_IntList amax view reshape flatten.using_ints permute transpose.int unsqueeze squeeze.dim "
        "expand slice.Tensor select.int split.Tensor split_with_sizes chunk unbind.int contiguous embedding "
        "batch_norm layer_norm gru.input lstm.input rnn_tanh.input rnn_relu.input gru_cell lstm_cell"
    )
)
