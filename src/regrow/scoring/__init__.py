"""How much each unit matters: one pass over the sources → statistics → scores.

Every metric is called with (weights, axes, statistics, *, units) and gives its weight-only factor for
``statistics=None``, so that a method can take any of them as its base.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from regrow.axes import Axis, AxisGraph
from regrow.method import Need
from regrow.scores import Scores, Statistics
from regrow.scoring.activations import energy, wanda_sp, wifv
from regrow.scoring.collect import collect
from regrow.scoring.combine import normalise, over_sources, percentile
from regrow.scoring.compensate import means
from regrow.scoring.curvature import curvature
from regrow.scoring.gradients import cross_entropy, taylor
from regrow.scoring.massive import Massive, massive
from regrow.scoring.paths import PATHS, peak_to_peak, product_of_norms, through
from regrow.scoring.weights import magnitude, random, readers, scorable, weights_of


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

__all__ = [
    "METRICS",
    "PATHS",
    "Massive",
    "Metric",
    "collect",
    "cross_entropy",
    "curvature",
    "energy",
    "magnitude",
    "massive",
    "means",
    "normalise",
    "over_sources",
    "peak_to_peak",
    "percentile",
    "product_of_norms",
    "random",
    "readers",
    "scorable",
    "taylor",
    "through",
    "wanda_sp",
    "weights_of",
    "wifv",
]
