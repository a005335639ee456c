"""Run networks in float64, casts to shorter floats included, so that a network's own casts hide no error."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from regrow.axes import Example


@contextmanager
def made_in_double(double: bool) -> Iterator[None]:
    """Context manager in which torch's default dtype is float64, if ``double``, so that new tensors are too.

    Args:
        double: Whether to change the default dtype.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class CastsToDouble(TorchFunctionMode):
    """Torch function mode that turns every cast to a shorter float into one to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(widen_dtype, args), tree_map(widen_dtype, kwargs or {})
        return _EXACT.get(func, func)(*args, **kwargs)


def widen_dtype(value: object) -> Any:
    """Return float64 for a shorter floating-point dtype; any other argument of an operation unchanged.

    Args:
        value: An argument of an operation.
    """
    short = isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if short else value


def as_double(value: object) -> Any:
    """Return a floating-point tensor in float64; any other value unchanged.

    Args:
        value: A tensor, or anything else.
    """
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def example_in_double(example: Example) -> Example:
    """Return an example with its floating-point tensors in float64.

    Args:
        example: The example.
    """
    return Example(tree_map(as_double, example.args), tree_map(as_double, dict(example.kwargs)))


def grouped_product(x: Tensor, weight: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Compute torch's grouped matrix product in float64, for which torch has no kernel.

    Args:
        x: The rows of all groups, one group behind the other, ``[rows, in]``.
        weight: One matrix per group, ``[groups, in, out]``.
        offs: The end of each group's rows, ``[groups]``; the rows behind the last are 0 in the result.
        bias: Ignored.
        out_dtype: Ignored.
    """
    ends = offs.tolist()
    parts = [x[start:end] @ w for start, end, w in zip([0, *ends], ends, weight, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - (ends[-1] if ends else 0), weight.shape[-1])])


_EXACT: Mapping[Any, Any] = {
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double),
    **dict.fromkeys(
        (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None)), grouped_product
    ),
}
