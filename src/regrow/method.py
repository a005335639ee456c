"""Methods: a paper as a choice of pieces that turns a network and evidence into plans.

``docs/method-fit.md`` shows how the three papers sit on this interface.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeVar

from torch import nn

from regrow.axes import AxisGraph, Mark
from regrow.plan import Plan
from regrow.scores import Statistics


class Need(StrEnum):
    """Which evidence a method asks for."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"


class Measure(StrEnum):
    """What a budget counts."""

    PARAMETERS = "params"
    MACS = "macs"
    BYTES = "bytes"


@dataclass(frozen=True)
class Budget:
    """How much may stay, and which axes may pay for it.

    Args:
        keep: The fraction of the measure that stays, in (0, 1]. Parameters are the weights in ``AxisGraph.counted``.
        measure: What is counted.
        only: Patterns; work only on axes all of whose tensors match one.
        exclude: Patterns; leave out axes with a tensor that matches.
        marks: Which kinds of axes to work on.
        round_to: Sizes left are multiples of this, as far as an axis has that many units.
    """

    keep: float
    measure: Measure = Measure.PARAMETERS
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    marks: frozenset[Mark] = frozenset({Mark.NEUTRAL})
    round_to: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is the fraction that stays, above 0 and at most 1; got {self.keep:g}")
        if self.round_to < 1:
            raise ValueError(f"round is a number of units, at least 1; got {self.round_to}")


@dataclass(frozen=True)
class Evidence:
    """What was measured for a method.

    Args:
        statistics: Source name → the sums of its shards (one shard unless the method asks for more).
        more: What a training loop adds: the optimiser, metrics so far, batches of the current task.
    """

    statistics: Mapping[str, Sequence[Statistics]] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

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
        total = shards[0]
        for shard in shards[1:]:
            total = total + shard
        return total


State = TypeVar("State")


class Method(Protocol[State]):
    """A choice of pieces that turns a network, its axes and evidence into plans."""

    needs: frozenset[Need]

    def init(self, axes: AxisGraph, budget: Budget) -> State:
        """What the method carries from one proposal to the next."""
        ...

    def propose(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State) -> tuple[Plan | None, State]:
        """The next change, or ``None`` when there is none (yet)."""
        ...
