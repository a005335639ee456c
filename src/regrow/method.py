"""Methods: a paper as a choice of pieces that turns a network and evidence into plans."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from torch import Tensor, nn

from regrow.amounts import Measure
from regrow.axes import AxisGraph
from regrow.budget import Budget
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.scores import Scores, Statistics, merged
from regrow.sources import Batch, Source

__all__ = ["Budget", "Evidence", "Group", "Measure", "Method", "Need", "State", "Training"]


class Need(StrEnum):
    """Which evidence a method asks for."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"


@dataclass(frozen=True)
class Evidence:
    """What was measured for a method.

    Args:
        statistics: Source name → the sums of its shards (as many as the method asks for).
        data: Source name → the batches themselves, for methods that learn.
        step: How many steps of learning were done.
        notes: What a reader should know about the sources (one had to be split).
        progress: Called as a method measures more by itself.
    """

    statistics: Mapping[str, Sequence[Statistics]] = field(default_factory=dict)
    data: Mapping[str, Source] = field(default_factory=dict)
    step: int = 0
    notes: tuple[str, ...] = ()
    progress: Progress = silent

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(self.statistics)

    def pooled(self) -> Statistics:
        """All sources and shards together.

        Raises:
            ValueError: If nothing was measured.
        """
        shards = [shard for shards in self.statistics.values() for shard in shards]
        if not shards:
            raise ValueError("this method needs calibration text or images; give it at least one --source")
        return merged(shards)


@dataclass(frozen=True)
class State:
    """What a method carries from one proposal to the next: plain data, so that it can be stored and taken up again.

    Args:
        budget: How much may stay.
        values: Numbers and words, as JSON data.
        tensors: By name; those that a :class:`Group` names learn.
        scores: The scores that the last plan was made from.
        findings: What the method saw, as JSON tables for a report.
    """

    budget: Budget
    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Scores | None = None
    findings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Tensors of a state that learn, and how fast."""

    names: tuple[str, ...]
    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Training:
    """What a method that learns adds to ``regrow.training.loop``; the network's own weights stay as they are.

    Args:
        steps: How many steps; the learning rate falls along a half cosine.
        every: After how many steps the method is asked for a proposal, and its state is stored.
        groups: What learns.
        batches: (evidence, step) → the batches of one step, each with a number for the loss; their mean counts.
        loss: (model, axes, batch, number, state) → a scalar.
    """

    steps: int
    every: int
    groups: Callable[[State], Sequence[Group]]
    batches: Callable[[Evidence, int], Sequence[tuple[Batch, int]]]
    loss: Callable[[nn.Module, AxisGraph, Batch, int, State], Tensor]


class Method(Protocol):
    """A choice of pieces that turns a network, its axes and evidence into plans."""

    @property
    def needs(self) -> frozenset[Need]:
        """The evidence it asks for."""
        ...

    @property
    def shards(self) -> int:
        """Into how many disjoint parts each source is to be split."""
        ...

    @property
    def sources(self) -> int:
        """How many sources it compares at least."""
        ...

    @property
    def training(self) -> Training | None:
        """What it learns between two proposals; ``None``: nothing."""
        ...

    def init(self, axes: AxisGraph, budget: Budget) -> State:
        """The state before the first proposal.

        Raises:
            ValueError: If the budget cannot be met.
        """
        ...

    def propose(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State) -> tuple[Plan | None, State]:
        """The next change, or ``None`` when there is none (yet)."""
        ...
