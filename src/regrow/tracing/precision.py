"""Run networks in float64, casts to shorter floats included, so that a network's own casts hide no error."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from regrow.core.axes import Example


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


T = TypeVar("T")


def widen_dtype(value: T) -> T | torch.dtype:
    """Return float64 for a shorter floating-point dtype; any other argument of an operation unchanged.

    Args:
        value: An argument of an operation.
    """
    short = isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if short else value


def as_double(value: T) -> T | Tensor:
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


def grouped_product(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute torch's grouped matrix product in float64, for which torch has no kernel.

    Args:
        x: The rows of all groups, one group behind the other, ``[rows, in]``; or one matrix per group.
        weight: One matrix per group, ``[groups, in, out]``; or the columns of all groups, ``[in, columns]``.
        offs: The end of each group's rows (or columns, or of its part of the sum), ``[groups]``; the rows behind the
            last are 0 in the result. ``None``: both factors hold one matrix per group.
        bias: Must be ``None``, as torch requires.
        out_dtype: Without effect: the result is in float64.

    Raises:
        NotImplementedError: If a bias is given.
    """
    if bias is not None:
        raise NotImplementedError("a grouped matrix product takes no bias, in torch neither; add it to the result")
    if offs is None:
        return x @ weight
    ends = offs.tolist()
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    if x.dim() == 3:
        return torch.cat([one @ weight[:, part] for one, part in zip(x, parts, strict=True)], 1)
    if weight.dim() == 2:
        return torch.stack([x[:, part] @ weight[part] for part in parts])
    rows = [x[part] @ one for part, one in zip(parts, weight, strict=True)]
    return torch.cat([*rows, x.new_zeros(len(x) - (ends[-1] if ends else 0), weight.shape[-1])])


_EXACT: Mapping[object, Callable[..., Tensor]] = {
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double),
    **dict.fromkeys(
        (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None)), grouped_product
    ),
}
