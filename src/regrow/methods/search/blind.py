"""Random baselines of a search: random operations, the same fraction of every axis, or the smallest weights.

A search should do better than these at the same size and with the same training (Li and Talwalkar, arXiv 1902.07638).
With ``split`` set to what a search removed of each granularity, they show whether its choice of units matters, or only
the amounts. The order of operations is drawn once and never trained: epochs of the search train weights alone.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from regrow.allocation.levels import GRANULARITIES, check_levels
from regrow.core.amounts import Measure
from regrow.methods.search import Commit, Search
from regrow.methods.search.commit import plan_fit
from regrow.methods.search.space import SearchSpace, SearchState, rank_evenly
from regrow.training.learner import Boundary, Context, Event, Stream

CITATION = "controls; Li, Talwalkar, Random Search and Reproducibility for NAS (arXiv 1902.07638)"


@dataclass(frozen=True)
class Settings:
    """Settings of the random baselines: what is removed, down to which size.

    Args:
        target: The largest allowed size of the found network, in units of ``measure``.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        what: ``operations``: dropped in random order until the target is met; ``filters``: every axis loses the same
            fraction; ``weights``: the smallest are set to 0, for a target in ``nonzero``. Several apply in this order.
        split: If there are several, the fraction of the removal that each is responsible for; 1 in all.
        keep_bare: Whether operations without weights, such as pooling, are dropped last.
        stages: The last part of the network that is used; set by the run.
        seed: Seed of the random order.
    """

    target: float = 0.0
    measure: str = "params"
    what: tuple[str, ...] = ("operations",)
    split: tuple[float, ...] = ()
    keep_bare: bool = False
    stages: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.what or list(self.what) != [name for name in GRANULARITIES if name in self.what]:
            names = ", ".join(GRANULARITIES)
            raise ValueError(f"what must be of {names}, in this order, got {', '.join(self.what) or 'none'}")
        if (len(self.what) > 1 or self.split) and (
            len(self.split) != len(self.what) or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6
        ):
            split = ", ".join(f"{share:g}" for share in self.split) or "none"
            raise ValueError(f"split must have a share for each of {', '.join(self.what)}, 1 in all, got {split}")
        if self.keep_bare and ("operations" not in self.what or self.measure == Measure.TIME):
            raise ValueError(
                "keep_bare keeps operations without weights, so it needs what=operations and a target other than ms"
            )
        check_levels(self.what, Measure(self.measure))


class RandomSearch(Search):
    """The search that removes operations in random order, of all axes the same fraction, or the smallest weights."""

    needs_epochs = False

    def __init__(self, s: Settings) -> None:
        super().__init__(s, SearchSpace(s.target, Measure(s.measure), s.what, s.stages[-1:]))
        self.s = s

    def trains(self, state: SearchState, context: Context) -> bool:
        """Return ``False``: importances are never trained."""
        return False

    def granularities(self, state: SearchState, context: Context) -> Sequence[str]:
        """Return all granularities of the setting ``what``; after the last epoch the one whose turn it is."""
        return (self.s.what[state.turn],) if context.epoch == context.epochs else self.s.what

    def boundary(self, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
        """Hook ``boundary``: as of :class:`Search`; at the start α is random, which orders the operations."""
        state = super().boundary(state, context, boundary)
        if boundary.event != Event.TASK_START:
            return state
        generator = replace(context, seed=self.s.seed).generator(Stream.ALPHA)
        alpha = torch.randn(len(state.alpha.values), generator=generator).to(state.alpha.values.device)
        if self.s.keep_bare:
            alpha[state.layout.weightless()] = 50.0  # above all others: dropped last
        state = rank_evenly(replace(state, alpha=replace(state.alpha, values=alpha)))
        return replace(state, removal=state.whole - self.s.target)

    def finalize(self, state: SearchState, context: Context, target: float) -> Commit:
        """Return the plan that removes the fraction of the next granularity in ``what``, and the new state."""
        for turn in range(state.turn, len(self.s.what)):
            state = replace(state, turn=turn)
            search = copy.copy(self)  # of this granularity alone
            search.space = replace(self.space, granularities=(self.s.what[turn],))
            turn_target = target + sum(self.s.split[turn + 1 :]) * state.removal  # later ones remove the rest
            plan, state = plan_fit(search, state, context, turn_target)
            if plan:
                return plan, state
        return None, state


build = RandomSearch
