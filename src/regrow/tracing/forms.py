"""Infer shape, strides, dtype and device of an operation's result quickly, without running fake tensors.

Fake tensors infer them too, but check each operation for other needs (data, other devices, symbols, casts), and many of
their kernels are written in Python: half a millisecond to five. The operations here are those that most of a network
consists of, for operands on one device; fake tensors handle all others, and whatever fails here.
"""

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

T = TypeVar("T")


def map_arguments(value: object, kind: type[T], change: Callable[[T], object]) -> Any:
    """Return an operation's nested arguments with every instance of a type replaced.

    Args:
        value: Lists, tuples and dicts of anything.
        kind: The type.
        change: Returns the replacement.

    >>> map_arguments((1, [2, "x"], {"y": 3}), int, str)
    ('1', ['2', 'x'], {'y': '3'})
    """
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, list):
        return [map_arguments(one, kind, change) for one in value]
    if isinstance(value, tuple):
        return tuple([map_arguments(one, kind, change) for one in value])
    return {name: map_arguments(one, kind, change) for name, one in value.items()} if isinstance(value, dict) else value


def infer_result(func: object, args: tuple[object, ...], kwargs: dict[str, object], mode: FakeTensorMode) -> object:
    """Infer by a rule the shape and dtype that an operation gives, faster than torch; ``NotImplemented`` without one.

    Args:
        func: The operation.
        args: Its positional arguments; tensors are fake.
        kwargs: Its arguments by name.
        mode: The mode of the fake tensors.
    """
    rule = _RULES.get(func)
    if (rule is None and func not in _KERNELS) or torch._C._is_any_autocast_enabled():
        return NotImplemented
    given: list[Tensor] = []
    map_arguments((args, kwargs), Tensor, given.append)
    if not given or any(
        type(x) is not FakeTensor or x.fake_mode is not mode or x.layout is not torch.strided for x in given
    ):
        return NotImplemented
    device, dtype = given[0].fake_device, given[0].dtype  # type: ignore[attr-defined]
    if any(x.fake_device != device for x in given):  # type: ignore[attr-defined]
        return NotImplemented
    with no_python_dispatcher():
        if rule is not None and dtype.is_floating_point and all(x.dtype is dtype for x in given):
            result = rule(*args, **kwargs)
            if isinstance(result, Tensor):
                return result
            if result is not None:
                shape, *stride = result
                form = (
                    torch.empty_strided(shape, *stride, dtype=dtype, device="meta") if stride else _plain(shape, dtype)
                )
                return FakeTensor(mode, form, device)
        return _by_kernel(func, args, kwargs, mode, device) if func in _KERNELS else NotImplemented


def _plain(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _by_kernel(func: Any, args: Any, kwargs: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """Return the result of the operation's kernel for meta tensors."""
    known: dict[int, Tensor] = {}  # an operation may give what it was given

    def form(x: Tensor) -> Tensor:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        known[id(made)] = x
        return made

    given = map_arguments((args, kwargs), Tensor, form)
    try:
        out = func(*given[0], **given[1])
    except Exception:
        return NotImplemented
    return map_arguments(out, Tensor, lambda x: known[id(x)] if id(x) in known else FakeTensor(mode, x, device))


# --- rules return a shape, a shape and strides, the operand that is returned itself, or None if they do not apply ----


def _entrywise(x: Tensor, *numbers: Any, **more: Any) -> Any:
    dense = x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense.default(x)
    return (x.shape, x.stride()) if dense and all(isinstance(n, int | float | str) for n in numbers) else None


def _in_place(x: Tensor, *numbers: Any) -> Any:
    return x if all(isinstance(n, int | float) for n in numbers) else None


def _paired(x: Tensor, y: Any, **more: Any) -> Any:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return _entrywise(x, y) if isinstance(x, Tensor) else None
    if x.shape == y.shape and x.stride() == y.stride():
        return _entrywise(x)
    shape = _broadcast(x.shape, y.shape)
    return (shape,) if shape is not None and x.is_contiguous() and y.is_contiguous() else None


def _broadcast(a: Any, b: Any) -> Any:
    """Return the shape that two shapes broadcast to, if it is one of the two; else ``None``."""
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    padded = (1,) * (len(a) - len(b)) + tuple(b)
    if all(m in (n, 1) for n, m in zip(a, padded, strict=True)):
        return a
    return padded if all(n in (m, 1) for n, m in zip(a, padded, strict=True)) else None


def _paired_in_place(x: Tensor, y: Any, **more: Any) -> Any:
    fits = not isinstance(y, Tensor) or _broadcast(x.shape, y.shape) == x.shape
    return x if fits else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    fits = weight.dim() == 2 and x.shape[-1:] == weight.shape[1:] and _of(bias, weight.shape[:1])
    return ((*x.shape[:-1], weight.shape[0]),) if fits and x.is_contiguous() and x.dim() > 1 else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> Any:
    n = weight.dim() - 2
    if x.dim() != n + 2 or not (x.is_contiguous() and weight.is_contiguous()) or x.shape[1] != weight.shape[1] * groups:
        return None
    if weight.shape[0] % groups or not _of(bias, weight.shape[:1]) or not prod(x.shape) or not prod(weight.shape):
        return None
    steps, pads, gaps = (list(one) * n if len(one) == 1 else one for one in (stride, padding, dilation))
    sides = [
        (side + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, gap in zip(x.shape[2:], weight.shape[2:], steps, pads, gaps, strict=True)
    ]
    return ((x.shape[0], weight.shape[0], *sides),) if min(sides) > 0 and min(pads) >= 0 else None


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *more: Any) -> Any:
    known = mean is not None and variance is not None
    fits = all(_of(one, x.shape[1:2]) for one in (weight, bias, mean, variance))
    return (x.shape,) if known and fits and x.dim() > 1 and x.is_contiguous() else None


def _layer_norm(x: Tensor, over: Any, weight: Any = None, bias: Any = None, *more: Any) -> Any:
    own = tuple(x.shape[x.dim() - len(over) :])
    fits = own == tuple(over) and _of(weight, own) and _of(bias, own)
    return (x.shape,) if fits and x.is_contiguous() else None


def _cat(parts: Any, dim: int = 0) -> Any:
    first = parts[0].shape
    at = dim % len(first) if len(first) else 0
    rest = {(*one.shape[:at], *one.shape[at + 1 :]) for one in parts if one.dim() == len(first)}
    if not len(first) or len(rest) > 1 or any(one.dim() != len(first) or not one.is_contiguous() for one in parts):
        return None
    return ((*first[:at], sum(one.shape[at] for one in parts), *first[at + 1 :]),)


def _of(x: Tensor | None, shape: Any) -> bool:
    """Whether a tensor has a shape, or is ``None``."""
    return x is None or tuple(x.shape) == tuple(shape)


def _ops(names: str) -> list[Any]:
    split = [(*name.split("."), "default")[:2] for name in names.split()]
    return [getattr(getattr(torch.ops.aten, name), overload) for name, overload in split]


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        _ops(
            "relu gelu silu sigmoid tanh hardswish hardsigmoid hardtanh leaky_relu softplus elu mish neg rsqrt sqrt "
            "exp cos sin square abs pow.Tensor_Scalar rsub.Scalar dropout"
        ),
        _entrywise,
    ),
    **dict.fromkeys(_ops("relu_ silu_ sigmoid_ tanh_ hardswish_ hardtanh_ leaky_relu_ elu_"), _in_place),
    **dict.fromkeys(_ops("add.Tensor sub.Tensor mul.Tensor div.Tensor"), _paired),
    **dict.fromkeys(_ops("add_.Tensor sub_.Tensor mul_.Tensor div_.Tensor"), _paired_in_place),
    **dict.fromkeys(_ops("conv1d conv2d conv3d"), _convolution),
    **dict.fromkeys(_ops("linear"), _linear),
    **dict.fromkeys(_ops("batch_norm"), _batch_norm),
    **dict.fromkeys(_ops("layer_norm"), _layer_norm),
    **dict.fromkeys(_ops("cat"), _cat),
}

_KERNELS = frozenset(
    _ops(
        "add.Tensor sub.Tensor mul.Tensor div.Tensor linear addmm matmul mm bmm einsum cat softmax.int mean "
        "mean.dim sum.dim_IntList amax view reshape flatten.using_ints permute transpose.int unsqueeze squeeze.dim "
        "expand slice.Tensor select.int split.Tensor split_with_sizes chunk unbind.int contiguous embedding "
        "gru.input lstm.input rnn_tanh.input rnn_relu.input gru_cell lstm_cell"
    )
)
"""Operations whose meta kernels give the right shape and strides for any device."""
