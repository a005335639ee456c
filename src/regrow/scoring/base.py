"""Base methods, as others wrap them: a metric made comparable between axes, and the allocation that goes with it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from regrow.axes import Axis, AxisGraph
from regrow.scores import Scores, Statistics
from regrow.scoring.combine import normalise
from regrow.scoring.metrics import METRICS


@dataclass(frozen=True)
class Base:
    """A base method.

    Args:
        metric: Its name in ``regrow.scoring.METRICS``.
        allocation: The name of the allocation it uses.
        options: Of the metric; without any, its scores are standardised per axis.
        spare: The shares of the blocks at the beginning and at the end that it leaves whole.
    """

    metric: str
    allocation: str
    options: Mapping[str, Any] = field(default_factory=dict)
    spare: tuple[float, float] = (0.0, 0.0)

    def score(
        self, weights: Mapping[str, Tensor], axes: AxisGraph, statistics: Statistics | None, units: Sequence[Axis]
    ) -> Scores:
        """Scores that can be compared between axes; without statistics, the factor of the metric that needs none."""
        metric: Callable[..., Scores] = METRICS[self.metric][0]
        found = metric(weights, axes, statistics, units=units, **self.options)
        return found if self.options else normalise(found, "zscore")


BASES: Mapping[str, Base] = {
    "flap": Base("wifv", "ranked", {"pool": "standardised"}),
    "wanda_sp": Base("wanda_sp", "uniform", {"pool": "standardised"}),
    "llm_pruner": Base("taylor", "uniform", spare=(0.125, 0.0625)),
    "magnitude": Base("magnitude", "uniform"),
}
"""The name of a method → what is wrapped of it."""
