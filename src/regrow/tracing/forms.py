"""Infer shape, strides, dtype and device of an operation's result quickly, without running fake tensors.

Fake tensors infer them too, but check each operation for other needs (data, other devices, symbols, casts), and many of
their kernels are written in Python: half a millisecond to five. The operations here are those that most of a network
consists of, for operands on one device; fake tensors handle all others, and whatever fails here.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from regrow.tracing.nodes import leaves_of, map_arguments, operands_in


class ConstantResults:
    """The nodes of a recording whose values are made of constants alone, and their values once they are needed."""

    def __init__(self) -> None:
        self.known: dict[Node, Any] = {}
        self.calls: list[tuple[Node, Any, Any, Any]] = []

    def add_call(self, node: Node, func: Any, args: Any, kwargs: Any) -> None:
        """Add an operation on constants; it is run when a value is needed."""
        self.known[node] = None
        self.calls.append((node, func, args, kwargs))

    def holds(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an operation works on constants alone, and draws no random numbers."""
        constant = all(node in self.known for node in operands_in((args, kwargs)))
        return constant and torch.Tag.nondeterministic_seeded not in func.tags

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on constants and return its result."""
        with no_python_dispatcher(), unset_fake_temporarily():
            self._catch_up()
            return self._result(func, args, kwargs)

    def forget(self, args: Any, kwargs: Any) -> None:
        """Forget constants that an operation on other tensors too may write into, and all that share their storage."""
        nodes = [node for node in operands_in((args, kwargs)) if node in self.known]
        if not nodes:
            return
        with no_python_dispatcher(), unset_fake_temporarily():
            self._catch_up()
        written = {address for node in nodes for address in _storages(self.known[node])}
        self.known = {node: x for node, x in self.known.items() if written.isdisjoint(_storages(x))}

    def _catch_up(self) -> None:
        """Run the operations that were added since."""
        for node, func, args, kwargs in self.calls:
            self.known[node] = self._result(func, args, kwargs)
        self.calls.clear()

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        values, named = map_arguments((args, kwargs), Node, self.known.__getitem__)
        return func(*values, **named)


def _storages(value: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(value) if isinstance(x, Tensor)}


def infer_result(func: object, args: tuple[object, ...], kwargs: dict[str, object], mode: FakeTensorMode) -> object:
    """Infer what an operation gives by a rule, faster than torch; ``NotImplemented`` without one."""
    rule = _RULES.get(func)
    if (rule is None and func not in _KERNELS) or torch._C._is_any_autocast_enabled():
        return NotImplemented
    tensors = [x for x in leaves_of((args, kwargs)) if isinstance(x, Tensor)]
    operands = [x for x in tensors if type(x) is FakeTensor and x.fake_mode is mode and x.layout is torch.strided]
    if len({x.fake_device for x in operands}) != 1 or len(operands) < len(tensors):
        return NotImplemented
    device, dtype = operands[0].fake_device, operands[0].dtype
    with no_python_dispatcher():
        if rule is None:
            return _by_kernel(func, args, kwargs, mode, device)
        usual = dtype.is_floating_point and all(x.dtype is dtype for x in operands)
        shape = rule(*args, **kwargs) if usual else None
        if shape is None:
            return NotImplemented
        return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), device)


def _by_kernel(func: Any, args: Any, kwargs: Any, mode: FakeTensorMode, device: torch.device) -> Any:
    """Return the result of the operation's kernel for meta tensors."""
    known: dict[int, Tensor] = {}  # an operation may give what it was given

    def form(x: Tensor) -> Tensor:
        made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        known[id(made)] = x
        return made

    operands = map_arguments((args, kwargs), Tensor, form)
    try:
        out = func(*operands[0], **operands[1])
    except Exception:
        return NotImplemented
    return map_arguments(out, Tensor, lambda x: known[id(x)] if id(x) in known else FakeTensor(mode, x, device))


# --- rules return the shape of a contiguous result, or None if they do not apply -------------------------------------


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
    steps, pads, gaps = (list(part) * n if len(part) == 1 else part for part in (stride, padding, dilation))
    sides = [
        (side + 2 * pad - gap * (kernel - 1) - 1) // step + 1
        for side, kernel, step, pad, gap in zip(x.shape[2:], weight.shape[2:], steps, pads, gaps, strict=True)
    ]
    return (x.shape[0], weight.shape[0], *sides) if min(sides) > 0 and min(pads) >= 0 else None


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, *settings: Any) -> Any:
    known = mean is not None and variance is not None
    fits = all(_of(part, x.shape[1:2]) for part in (weight, bias, mean, variance))
    return x.shape if known and fits and x.dim() > 1 and x.is_contiguous() else None


def _layer_norm(x: Tensor, over: Any, weight: Any = None, bias: Any = None, *settings: Any) -> Any:
    last = tuple(x.shape[x.dim() - len(over) :])
    fits = last == tuple(over) and _of(weight, last) and _of(bias, last)
    return x.shape if fits and x.is_contiguous() else None


def _of(x: Tensor | None, shape: Any) -> bool:
    """Whether a tensor has a shape, or is ``None``."""
    return x is None or tuple(x.shape) == tuple(shape)


def _ops(names: str) -> list[Any]:
    split = [(*name.split("."), "default")[:2] for name in names.split()]
    return [getattr(getattr(torch.ops.aten, name), overload) for name, overload in split]


_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_ops("conv1d conv2d conv3d"), _convolution),
    **dict.fromkeys(_ops("batch_norm"), _batch_norm),
    **dict.fromkeys(_ops("layer_norm"), _layer_norm),
}

_KERNELS = frozenset(
    _ops(
        "add.Tensor sub.Tensor mul.Tensor div.Tensor linear addmm matmul mm bmm einsum cat softmax.int mean "
        "mean.dim sum.dim_IntList amax view reshape flatten.using_ints permute transpose.int unsqueeze squeeze.dim "
        "expand slice.Tensor select.int split.Tensor split_with_sizes chunk unbind.int contiguous embedding "
        "gru.input lstm.input rnn_tanh.input rnn_relu.input gru_cell lstm_cell relu gelu silu sigmoid tanh hardswish "
        "hardsigmoid hardtanh leaky_relu softplus elu mish neg rsqrt sqrt exp cos sin square abs pow.Tensor_Scalar "
        "rsub.Scalar dropout relu_ silu_ sigmoid_ tanh_ hardswish_ hardtanh_ leaky_relu_ elu_ add_.Tensor sub_.Tensor "
        "mul_.Tensor div_.Tensor"
    )
)
"""Operations whose meta kernels give the right shape and strides for any device."""
