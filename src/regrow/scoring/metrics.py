"""The importance metrics by name, and which statistics each of them needs."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from regrow.core.axes import Axis, AxisGraph
from regrow.core.evidence import Need
from regrow.core.scores import Scores, Statistics
from regrow.scoring.activations import wanda_sp, wifv
from regrow.scoring.fisher import fisher
from regrow.scoring.gradients import taylor
from regrow.scoring.weights import magnitude


class Metric(Protocol):
    """An importance metric: a function from weights and, where it needs them, statistics to scores."""

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        axes: AxisGraph,
        statistics: Statistics | None,
        *,
        units: Sequence[Axis] | None = None,
    ) -> Scores:
        """Score the units of the given axes.

        Args:
            weights: Parameter name → tensor.
            axes: The network's axes.
            statistics: What was collected on the sources; ``None`` scores by the weights alone.
            units: The axes to score; ``axes.units()`` if none are named.
        """
        ...


METRICS: Mapping[str, tuple[Metric, Need]] = {
    "wifv": (wifv, Need.ACTIVATIONS),
    "wanda_sp": (wanda_sp, Need.ACTIVATIONS),
    "taylor": (taylor, Need.GRADIENTS),
    "fisher": (fisher, Need.FISHER),
    "magnitude": (magnitude, Need.WEIGHTS),
}
"""Name → (metric, the statistics that it needs)."""
