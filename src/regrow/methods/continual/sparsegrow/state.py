"""The state that SparseGrow carries from step to step and from task to task."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.scoring.factors import Gate
from regrow.training.reservoir import Reservoir
from regrow.training.state import derived


@dataclass(frozen=True)
class SparseGrowState:
    """The state of SparseGrow; tensors are by name of a parameter or a weight.

    Args:
        owned: Which entries earlier tasks own.
        threshold: The thresholds t below which entries of a weight are masked.
        old: Which units of a weight existed before the last growth in this task.
        read: Under the gate ``kronecker``: the second moments of a layer's inputs in earlier tasks, summed over tasks.
        bias: The products of these inputs with the constant input of the layer's bias.
        used: The second moments of the gradients of the layer's outputs.
        inputs: The inputs in the replay memory.
        labels: The labels in the replay memory.
        base: The initial size of every axis.
        steps: The number of training steps so far.
        kept: The mean threshold of a weight, and the fraction of its entries above it, after the last epoch.
        free: The fraction of a layer's directions that its gate lets through.
        seen: The number of examples that were offered to the memory.
        recalled: The number of times that examples were drawn from the memory.
        frozen: Which entries of a parameter are not trained in this task, and their values.
        gates: The gate of a layer, by name of its weight.
        last: The layer's parameters after the gate was last applied.
    """

    owned: Mapping[str, AxisTensor] = field(default_factory=dict)
    threshold: Mapping[str, AxisTensor] = field(default_factory=dict)
    old: Mapping[str, AxisTensor] = field(default_factory=dict)
    read: Mapping[str, AxisTensor] = field(default_factory=dict)
    bias: Mapping[str, AxisTensor] = field(default_factory=dict)
    used: Mapping[str, AxisTensor] = field(default_factory=dict)
    inputs: AxisTensor | None = None
    labels: AxisTensor | None = None
    base: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    kept: dict[str, dict[str, float]] = field(default_factory=dict)
    free: dict[str, float] = field(default_factory=dict)
    seen: int = 0
    recalled: int = 0
    frozen: Mapping[str, tuple[Tensor, Tensor]] = derived(dict)
    gates: Mapping[str, Gate] = derived(dict)
    last: dict[str, Tensor] = derived(dict)

    @property
    def memory(self) -> Reservoir:
        """The replay memory as a reservoir."""
        rows = {"inputs": self.inputs, "labels": self.labels}
        return Reservoir({name: one for name, one in rows.items() if one is not None}, self.seen, self.recalled)
