"""Tensors outside the network that are cut and widened with its axes, such as masks or importance estimates."""

from dataclasses import dataclass

from torch import Tensor

from regrow.core.axes import Dim


@dataclass
class AxisTensor:
    """A tensor that follows the network's axes: ``apply`` cuts and widens it like the network's own parameters.

    Args:
        values: The tensor, such as a mask, an anchor or learned thresholds. Entries that a plan adds are 0 (``False``).
        dims: Its dimensions, as in ``AxisGraph.shapes``: axis keys, or plain numbers for dimensions that no plan
            changes.
        lr: Learning rate of a tensor that is trained; ``None``: it is not trained.
    """

    values: Tensor
    dims: tuple[Dim, ...]
    lr: float | None = None
