"""The state of SparseGrow, and the weights that its thresholds mask."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from regrow.allocation.levels import margin
from regrow.core.axes.axis import AxisTensor
from regrow.protection.factors import Factors
from regrow.protection.guards import Guards
from regrow.training.learner import Context
from regrow.training.state import derived


class ThresholdedWeight(NamedTuple):
    """A weight with thresholds, for :meth:`SparseGrowState.thresholded`."""

    weight: Tensor
    threshold: Tensor  # per unit, or one; detached
    kept: Tensor  # which entries stay: those from the threshold up, and owned ones; bool, of the weight's shape


@dataclass(frozen=True)
class SparseGrowState:
    """The state of SparseGrow; tensors are by name of a parameter or a weight."""

    owned: Mapping[str, AxisTensor] = field(default_factory=dict)  # which entries earlier tasks own
    threshold: Mapping[str, AxisTensor] = field(default_factory=dict)  # t, below which entries of a weight are masked
    old: Mapping[str, AxisTensor] = field(default_factory=dict)  # units that existed before the growth in this task
    factors: Factors = field(default_factory=dict)  # of earlier tasks
    anchor: Mapping[str, AxisTensor] = field(default_factory=dict)  # parameters at the end of the last task
    rows: Mapping[str, AxisTensor] = field(default_factory=dict)  # the replay memory: inputs and labels
    base: dict[str, int] = field(default_factory=dict)  # the initial size of every axis
    steps: int = 0  # of training, so far
    unguarded: int = 0  # steps since guards were last applied
    lr: float = 0.0  # of the last step
    free: dict[str, float] = field(default_factory=dict)  # the fraction of directions that a layer's gate lets through
    seen: int = 0  # examples offered to the memory
    recalled: int = 0  # draws from the memory
    frozen: Mapping[str, tuple[Tensor, Tensor]] = derived(dict)  # entries not trained in this task, and their values
    guards: Guards = derived(dict)
    unmasked: Mapping[str, Tensor] = derived(dict)  # 1 where thresholds may not mask a weight, as ``owned``, else 0

    def thresholded(self, context: Context) -> Iterator[ThresholdedWeight]:
        """Yield each weight that has thresholds, with these and its mask; the first two may be changed in place."""
        parameters = context.parameters()
        for name in context.weights:
            if name in self.threshold:
                weight, threshold = parameters[name], self.threshold[name].values.detach()
                kept = (margin(weight.detach(), threshold) >= 0) | self.owned[name].values
                yield ThresholdedWeight(weight, threshold, kept)
