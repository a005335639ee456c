"""The state of an architecture search: one typed record for all methods."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from regrow.allocation.edges import Edges
from regrow.allocation.gates import Gates
from regrow.core.axis_tensor import AxisTensor
from regrow.training.state import derived


@dataclass(frozen=True)
class Savings:
    """The reduction of the network's size by each granularity, in units of the search's measure.

    Args:
        operations: The reduction by dropped operations.
        filters: The reduction by cut filters.
        weights: The reduction by weights set to 0.
    """

    operations: float = 0.0
    filters: float = 0.0
    weights: float = 0.0


@dataclass(frozen=True)
class StageMemory:
    """The memory of one stage of a search, measured in one step, in bytes.

    Args:
        stage: The stage, from 0.
        epoch: The epoch of the step, from 1.
        joint: Whether masks were trained in that step.
        held: Bytes of tensors that existed before the step.
        peak: The largest number of bytes of live tensors in the step.
        resident: The growth of the process's memory plus ``held``, bytes; ``None`` where this cannot be measured.
        predicted: The prediction when the stage began, bytes; ``None`` for the first stage.
        recomputed: Whether parts of the network were recomputed in the backward pass.
    """

    stage: int
    epoch: int
    joint: bool
    held: int
    peak: int
    resident: int | None
    predicted: int | None
    recomputed: bool


def _empty() -> AxisTensor:
    return AxisTensor(torch.zeros(0), (0,))


@dataclass(frozen=True)
class SearchState:
    """The state of a search: importances, thresholds, stage, and what was removed.

    Args:
        alpha: α, the importance of operations.
        kappa: Axis → κ, the importance of its filters.
        operation_thresholds: One threshold per operation.
        filter_thresholds: One threshold per axis of ``axes``.
        weight_thresholds: One threshold per operation, for the weights in it; the last one for all other weights.
        zeros: Weight name → which of its entries are fixed at 0.
        drift: The smoothed gradient of α (MGAS).
        beta: β, the importance of edges (PC-DARTS).
        axes: The keys of the axes when the search began.
        stage: The current stage, from 0.
        whole: The size of the network as it is, without classifiers of earlier stages.
        saved: The reduction of the size by each granularity.
        pending: The reduction of the size by operations in the plan that is about to be applied.
        dropped: Operations that were dropped in this stage.
        cut: Axis → the ids of the filters that were cut in this stage.
        history: The measurements of the last epoch.
        multiplier: μ, the weight of the size in the loss.
        penalty: λ, the weight of the regulariser of α in the loss.
        penalty_step: The last increase of λ.
        penalty_cap: The largest value of λ.
        losses: The sum over an epoch's steps of cross-entropy and of the regulariser.
        start: The size when the stage began.
        goal: The size that the stage has to reach.
        removal: The reduction of the size that is needed (random baselines).
        memory: Stage → its measured memory, where a memory budget is set.
        recomputed: Whether parts of the network are recomputed in the backward pass.
        layout: Where operations, filters and weights lie in the network now.
        zero_mask: ``zeros`` in one vector, ``[weights]``.
        earlier: Operations and axes of earlier stages that are no longer pruned.
        examples: The number of training examples seen in this epoch.
        turn: The number of commit steps taken at this boundary.
        edges: Where operations lie on the edges of cells (DARTS).
        edge_weights: The weights of the edges into each node in this pass; one list, changed in place (PC-DARTS).
        handles: Hooks that let channels bypass operations (PC-DARTS).
        chosen: The size right after operations were chosen; ``None`` before (DARTS).
    """

    alpha: AxisTensor = field(default_factory=_empty)
    kappa: Mapping[str, AxisTensor] = field(default_factory=dict)
    operation_thresholds: AxisTensor = field(default_factory=_empty)
    filter_thresholds: AxisTensor = field(default_factory=_empty)
    weight_thresholds: AxisTensor = field(default_factory=_empty)
    zeros: Mapping[str, AxisTensor] = field(default_factory=dict)
    drift: AxisTensor | None = None
    beta: AxisTensor | None = None
    axes: tuple[str, ...] = ()
    stage: int = 0
    whole: float = 0.0
    saved: Savings = Savings()
    pending: float = 0.0
    dropped: tuple[str, ...] = ()
    cut: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    history: tuple[Mapping[str, int | float], ...] = ()
    multiplier: float = 0.0
    penalty: float = 0.0
    penalty_step: float = 1e-5
    penalty_cap: float = 100.0
    losses: tuple[float, float] = (0.0, 0.0)
    start: float = 0.0
    goal: float = 0.0
    removal: float = 0.0
    memory: Mapping[str, StageMemory] = field(default_factory=dict)
    recomputed: bool = False
    layout: Gates = derived(lambda: None)
    zero_mask: Tensor = derived(lambda: torch.zeros(0, dtype=torch.bool))
    earlier: tuple[Tensor, ...] = derived(tuple)
    examples: int = derived(int)
    turn: int = derived(int)
    edges: Edges = derived(lambda: None)
    edge_weights: list[Tensor] = derived(list)
    handles: tuple[RemovableHandle, ...] = derived(tuple)
    chosen: float | None = derived(lambda: None)

    @property
    def thresholds(self) -> tuple[AxisTensor, AxisTensor, AxisTensor]:
        """The thresholds of operations, filters and weights."""
        return self.operation_thresholds, self.filter_thresholds, self.weight_thresholds
