"""Networks in float64: every cast to a shorter float goes there too, so that a network's own casts hide no fault."""

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
    """Have tensors that a network makes without saying in which precision be of float64, like all its others."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class CastsToDouble(TorchFunctionMode):
    """Has every cast to a shorter float go to float64 instead, in a network that is run as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(widen_dtype, args), tree_map(widen_dtype, kwargs or {})
        return _EXACT.get(func, func)(*args, **kwargs)


def widen_dtype(value: object) -> Any:
    """An argument of an operation in float64: shorter precisions become that, other arguments stay."""
    short = isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if short else value


def as_double(value: object) -> Any:
    """A tensor in float64, if it is one of real numbers."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def example_in_double(example: Example) -> Example:
    """An example in float64."""
    return Example(tree_map(as_double, example.args), tree_map(as_double, dict(example.kwargs)))


def grouped_product(x: Tensor, weight: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Torch's grouped product, which has no kernel for float64: rows up to each offset times that group's matrix."""
    ends = offs.tolist()
    parts = [x[start:end] @ w for start, end, w in zip([0, *ends], ends, weight, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - (ends[-1] if ends else 0), weight.shape[-1])])


_EXACT: Mapping[Any, Any] = {
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double),
    **dict.fromkeys(
        (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None)), grouped_product
    ),
}
