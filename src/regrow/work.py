"""Multiply–accumulates (MACs) of a network per example, independent of the batch size it was traced with."""

from dataclasses import replace
from math import gcd, prod

from torch import Tensor

from regrow.axes import AxisGraph, Work
from regrow.dims import Dim, Product, size_of


def examples(axes: AxisGraph) -> int:
    """Return the batch size of the traced input.

    That is the number of entries of its first list, or the leading size of its first tensor if the network's last
    result has the same; 1 otherwise.

    Args:
        axes: The network's axes.
    """
    given = (*axes.example.args, *axes.example.kwargs.values())
    first = next((value for value in given if isinstance(value, Tensor | list | tuple)), None)
    if isinstance(first, list | tuple):
        return max(1, len(first))
    if first is None or first.dim() < 2 or not first.shape[0]:
        return 1
    results = [shape for step in axes.steps[-1:] for shape in step.shapes if shape]
    last = size_of(results[0][0], axes.sizes()) if results else first.shape[0]
    return first.shape[0] if last == first.shape[0] else 1


def per_example(axes: AxisGraph) -> tuple[Work, ...]:
    """Return the contractions of a network for a single example; those that do not depend on the batch stay whole.

    Args:
        axes: The network's axes.
    """
    many = examples(axes)
    return axes.work if many == 1 else tuple(replace(one, dims=_divided(one.dims, many)) for one in axes.work)


def macs(axes: AxisGraph) -> int:
    """Return the multiply–accumulates of one example: the sum over contractions of the product of their dimensions.

    Kernels are taken as dense: a weight that is 0 costs as much as any other.

    Args:
        axes: The network's axes.
    """
    sizes = axes.sizes()
    return sum(prod(size_of(dim, sizes) for dim in work.dims) for work in per_example(axes))


def _divided(dims: tuple[Dim, ...], many: int) -> tuple[Dim, ...]:
    """Return dimensions divided by ``many`` if their fixed sizes contain that factor; unchanged otherwise.

    >>> _divided((128, "a", 3), 64), _divided((3, "a"), 64)
    ((2, 'a', 3), (3, 'a'))
    """
    left = many

    def without(dim: Dim) -> Dim:
        nonlocal left
        match dim:
            case int():
                shared = gcd(dim, left)
                left //= shared
                return dim // shared
            case Product(parts):
                return Product(tuple(without(part) for part in parts))
        return dim

    result = tuple(without(dim) for dim in dims)
    return result if left == 1 else dims
