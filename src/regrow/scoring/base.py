"""Complete pruning baselines that other methods wrap: a metric, how it is normalised, and its allocation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from regrow.core.axes import Axis, AxisGraph
from regrow.core.scores import Scores, Statistics
from regrow.scoring.combine import normalise
from regrow.scoring.metrics import METRICS
from regrow.scoring.spaces import OUTER_BLOCKS


@dataclass(frozen=True)
class Base:
    """Settings of a pruning baseline that another method can wrap: its metric, allocation and protected blocks.

    Args:
        metric: Its name in :data:`regrow.scoring.METRICS`.
        allocation: The name of its allocation in :data:`regrow.allocation.ALLOCATIONS`.
        options: Keyword arguments of the metric; without any, its scores are z-scored per axis.
        spare: The fractions of blocks at the beginning and at the end of the network that are not pruned.
    """

    metric: str
    allocation: str
    options: Mapping[str, str] = field(default_factory=dict)
    spare: tuple[float, float] = (0.0, 0.0)

    def score(
        self, weights: Mapping[str, Tensor], axes: AxisGraph, statistics: Statistics | None, units: Sequence[Axis]
    ) -> Scores:
        """Return scores that are comparable between axes; without statistics, scores by the weights alone.

        Args:
            weights: Parameter name → tensor.
            axes: The network's axes.
            statistics: What was collected on the sources, or ``None``.
            units: The axes to score.
        """
        metric: Callable[..., Scores] = METRICS[self.metric][0]
        scores = metric(weights, axes, statistics, units=units, **self.options)
        return scores if self.options else normalise(scores, "zscore")


BASES: Mapping[str, Base] = {
    "flap": Base("wifv", "ranked", {"pool": "standardised"}),
    "wanda_sp": Base("wanda_sp", "uniform", {"pool": "standardised"}),
    "llm_pruner": Base("taylor", "uniform", spare=OUTER_BLOCKS),
    "magnitude": Base("magnitude", "uniform"),
    "fisher": Base("fisher", "uniform", spare=OUTER_BLOCKS),
}
"""Name of a pruning method → its settings as a baseline that can be wrapped."""
