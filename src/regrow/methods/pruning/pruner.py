"""One-shot pruning as a choice of pieces: score, allocate, compensate.

Most pruning papers are a row of such choices; :class:`Pruner` is what they share, and itself knows no paper.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from regrow.allocation import payers
from regrow.axes import Axis, AxisGraph
from regrow.method import Budget, Evidence, Need, State, Training
from regrow.plan import Plan
from regrow.scores import Scores
from regrow.scoring import random, unbiased
from regrow.scoring.spaces import inner

Score = Callable[[nn.Module, AxisGraph, Sequence[Axis], Evidence], Scores]
Allocate = Callable[[AxisGraph, Scores, Budget], Mapping[str, tuple[int, ...]]]
Compensate = Callable[
    [nn.Module, AxisGraph, Mapping[str, tuple[int, ...]], Evidence], Mapping[str, Mapping[int, float]]
]


@dataclass(frozen=True)
class Pruner:
    """A method that makes one plan (``regrow.method.Method``).

    Args:
        needs: What evidence it asks for.
        score: (model, axes, units, evidence) → how much each unit matters.
        allocate: (axes, scores, budget) → axis key → units kept.
        compensate: (model, axes, kept, evidence) → ``Plan.means``; none if dropped inputs count as nothing.
        origin: What the plan says of its maker: method name and settings.
        spare: The shares of the numbered blocks, at the beginning and at the end, that stay whole; a regular plan has
            none of these, since it cuts every block alike.
    """

    needs: frozenset[Need]
    score: Score
    allocate: Allocate
    compensate: Compensate | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    shards: int = 1
    sources: int = 1
    training: Training | None = None
    spare: tuple[float, float] = (0.0, 0.0)

    def init(self, axes: AxisGraph, budget: Budget) -> State:
        """Nothing but the budget is carried.

        Raises:
            ValueError: If it cannot be met, whatever the scores.
        """
        self.allocate(axes, random(axes, units=self._units(axes, budget)), budget)
        return State(budget)

    def propose(self, model: nn.Module, axes: AxisGraph, evidence: Evidence, state: State) -> tuple[Plan | None, State]:
        """The one plan; ``None`` once it has been made.

        Raises:
            ValueError: If the budget cannot be met, or evidence is missing or not finite.
        """
        if state.scores is not None:
            return None, state
        budget = state.budget
        scores = self.score(model, axes, self._units(axes, budget), evidence)
        budget = compensating(model, axes, budget) if self.compensate else budget
        kept = {key: keep for key, keep in self.allocate(axes, scores, budget).items() if len(keep) < axes[key].size}
        means = self.compensate(model, axes, kept, evidence) if self.compensate else {}
        origin = {**self.origin, **budget.record(), **told(scores)}
        return Plan.keeping(axes, kept, means=means, origin=origin), replace(state, scores=scores)

    def _units(self, axes: AxisGraph, budget: Budget) -> Sequence[Axis]:
        units = payers(axes, budget)
        return units if budget.regular else inner(units, *self.spare)


def compensating(model: nn.Module, axes: AxisGraph, budget: Budget) -> Budget:
    """The budget, if dropped inputs leave their means behind: biases that this makes are to be paid for."""
    return replace(budget, compensated=unbiased(model, axes, payers(axes, budget)))


def told(scores: Scores) -> dict[str, Any]:
    """What a plan says of the scores it was made from."""
    return {"metric": scores.metric, "sources": list(scores.sources), "tokens": scores.tokens}
