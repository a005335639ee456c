"""The metrics by name, and what each has to be given."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from regrow.axes import Axis, AxisGraph
from regrow.method import Need
from regrow.scores import Scores, Statistics
from regrow.scoring.activations import wanda_sp, wifv
from regrow.scoring.gradients import taylor
from regrow.scoring.weights import magnitude


class Metric(Protocol):
    """A measure of units, from weights and (if there are any) statistics."""

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        axes: AxisGraph,
        statistics: Statistics | None,
        *,
        units: Sequence[Axis] | None = None,
    ) -> Scores:
        """Score the units of some axes."""
        ...


METRICS: Mapping[str, tuple[Metric, Need]] = {
    "wifv": (wifv, Need.ACTIVATIONS),
    "wanda_sp": (wanda_sp, Need.ACTIVATIONS),
    "taylor": (taylor, Need.GRADIENTS),
    "magnitude": (magnitude, Need.WEIGHTS),
}
"""Name → (metric, what it has to be given)."""
