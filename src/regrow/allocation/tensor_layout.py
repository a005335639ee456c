"""Which filters and operations the entries of one parameter belong to, and what they cost."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorLayout:
    """Which filters and operations the entries of one parameter belong to, and their cost.

    Args:
        shape: Its shape.
        makes: The filter that each position of a dimension makes, ``[size]``, and that dimension; ``None``: none.
        reads: The filter that each position of a dimension reads, ``[size]``, and that dimension; ``None``: none.
        ops: The operation that each entry lies in, ``[entries]``, or one for all, ``[1]``.
        price: The cost of each entry, ``[entries]`` float64, or one for all, ``[1]``.
    """

    shape: torch.Size
    makes: tuple[int, Tensor] | None
    reads: tuple[int, Tensor] | None
    ops: Tensor
    price: Tensor

    def spread(self, line: tuple[int, Tensor] | None, none: int) -> Tensor:
        """Return the filter of each entry, ``[entries]``; ``none`` where there is none.

        Args:
            line: ``makes`` or ``reads``.
            none: The index that stands for no filter.
        """
        if line is None:
            return torch.full(self.shape, none, device=self.price.device).reshape(-1)
        return self.along(*line).expand(self.shape).reshape(-1)

    def along(self, dim: int, values: Tensor) -> Tensor:
        """Return values along a dimension, in a shape that is broadcast to the parameter's.

        Args:
            dim: The dimension.
            values: ``[size]``.
        """
        return values.view([-1 if d == dim else 1 for d in range(len(self.shape))])

    def size(self, ops: Tensor, filters: Tensor) -> Tensor:
        """Return the cost of the parameter under masks, a scalar float64.

        Args:
            ops: Mask of operations, with a last entry of 1, ``[operations + 1]``.
            filters: Mask of filters, with a last entry of 1, ``[filters + 1]`` float64.
        """
        if self.makes and self.reads and self.makes[0] == self.reads[0]:
            both = filters.index_select(0, self.makes[1]) * filters.index_select(0, self.reads[1])
            many = both.sum() * (prod(self.shape) / max(1, len(both)))
        else:
            many = filters.new_tensor(float(prod(self.shape)))
            for line in (self.makes, self.reads):
                if line:
                    many = many * filters.index_select(0, line[1]).sum() / max(1, len(line[1]))
        share = ops.index_select(0, self.ops) * self.price
        return share.sum() * many / max(len(self.ops), len(self.price))
