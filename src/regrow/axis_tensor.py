"""Tensors that lie along axes of a network: plans cut and widen them, as they do its parameters."""

from dataclasses import dataclass

from torch import Tensor

from regrow.axes import Dim


@dataclass
class AxisTensor:
    """A tensor whose dimensions are dimensions of the network, such as a mask, an anchor or learned thresholds.

    Args:
        values: The tensor. Entries that a plan adds are 0 (``False``).
        dims: Its dimensions, as in ``AxisGraph.shapes``; plain numbers for those that no plan changes.
        lr: The learning rate of a tensor that is trained; ``None``: it is not trained.
    """

    values: Tensor
    dims: tuple[Dim, ...]
    lr: float | None = None
