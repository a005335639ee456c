"""The settings of SparseGrow, with defaults where its abstracts leave a choice open, and its state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from torch import Tensor

from regrow.core.axis_tensor import AxisTensor
from regrow.scoring.factors import Gate
from regrow.settings.constraints import CheckedSettings, OneOf, Range
from regrow.training.state import derived


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of SparseGrow: growth, thresholds, the gate that protects earlier tasks, and an optional memory.

    Args:
        grow: When axes are widened: ``always``: once in every task, wherever some capacity is used; ``short``: where
            free capacity runs short; ``never``.
        late_phase: The fraction of a task's epochs, at its end, that forms the late phase; growth comes at its start.
        min_free: Under ``grow=short``, an axis grows if less than this fraction of the weights that compute it
            (``kronecker``: and read it) is free.
        width: The number of new units of an axis, as a fraction of its initial size.
        multiple: Numbers of new units are multiples of this.
        cap: The largest allowed size of the network, as a multiple of its initial parameters, at least 1.
        density: The fraction of their inputs that new units read at first.
        fit: Whether new units are scaled to the output spread of the old ones, on data.
        threshold: ``dst``: one per unit, trained by the loss; ``adaptcl``: one per layer, trained by the penalty alone;
            ``none``: no weight is masked.
        alpha: α, the strength of the penalty Σ exp(−t), which raises thresholds.
        new_unit_penalty: The factor on the penalty for new units, where they have thresholds of their own (``dst``).
        gate: How earlier tasks are protected: ``kronecker``: layers move little in directions that earlier tasks used;
            ``hard``: owned entries are frozen; ``none``.
        strength: The strength of the gate ``kronecker``.
        damping: Under that gate, the importance of a hidden unit that earlier tasks did not use, as a fraction of the
            mean: trained freely, it could become active on their inputs.
        group_norm_damping: Behind a norm that rescales each group of units (GroupNorm), new units are active on earlier
            inputs; the gate assumes this fraction of the mean second moment for them.
        samples: The number of examples of each task on which the gate is estimated.
        every: The gate is applied to the joint change of this many steps, which costs a fraction of its time.
        project_new_units: Whether, under that gate, new units are projected away from the inputs that earlier tasks fed
            their layer.
        norms: Running statistics of BatchNorm in later tasks: ``update`` or ``freeze``.
        memory: The number of examples of earlier tasks that are stored and replayed; the paper's abstracts name none.
        strength_factor: With a memory, in class-incremental learning, the factor on the gate's strength, which then
            leaves the output layer alone: old classes must give way to new ones, and the memory limits how far. 1: the
            gate is as strong as without a memory.
        asymmetric_loss: With a memory, in class-incremental learning, whether the loss on the current batch is computed
            over the classes of its task only (ER-ACE, arXiv 2104.05025).
        lr: Learning rate of the thresholds.
        seed: Seed of the new units' weights.
    """

    grow: Annotated[str, OneOf("short", "always", "never")] = "always"
    late_phase: Annotated[float, Range(0, 1)] = 0.3
    min_free: Annotated[float, Range(0, 1)] = 0.3
    width: Annotated[float, Range(0, 1)] = 0.125
    multiple: Annotated[int, Range(1)] = 8
    cap: Annotated[float, Range(1)] = 1.5
    density: Annotated[float, Range(0, 1)] = 0.5
    fit: bool = True
    threshold: Annotated[str, OneOf("dst", "adaptcl", "none")] = "dst"
    alpha: float = 1e-4
    new_unit_penalty: float = 10.0
    gate: Annotated[str, OneOf("kronecker", "hard", "none")] = "kronecker"
    strength: Annotated[float, Range(0)] = 15.0
    damping: Annotated[float, Range(0)] = 0.1
    group_norm_damping: Annotated[float, Range(0)] = 0.1
    samples: Annotated[int, Range(1)] = 2000
    every: Annotated[int, Range(1)] = 4
    project_new_units: bool = True
    norms: Annotated[str, OneOf("update", "freeze")] = "update"
    memory: Annotated[int, Range(0)] = 0
    strength_factor: Annotated[float, Range(0, 1)] = 0.01
    asymmetric_loss: bool = True
    lr: float = 0.01
    seed: int = 0


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
    def rows(self) -> dict[str, AxisTensor | None]:
        """The tensors of the replay memory by name."""
        return {"inputs": self.inputs, "labels": self.labels}
