"""Random baselines of a search: random operations, the same fraction of every axis, or the smallest weights.

A search should do better than these at the same size and with the same training (Li and Talwalkar, arXiv 1902.07638).
The order of operations is drawn once and never trained: epochs of the search train weights alone.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch

from regrow.allocation.levels import check_levels
from regrow.core.amounts import Measure
from regrow.methods.search import Commit, Search
from regrow.methods.search.commit import plan_fit
from regrow.methods.search.space import SearchSpace, SearchState, rank_evenly
from regrow.settings.constraints import OneOf, check_constraints
from regrow.training.learner import Boundary, Context, Event, Stream

CITATION = "controls; Li, Talwalkar, Random Search and Reproducibility for NAS (arXiv 1902.07638)"


@dataclass(frozen=True)
class Settings:
    """Settings of the random baselines: what is removed, down to which size.

    Args:
        target: The largest allowed size of the found network, in units of ``measure``.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        what: ``operations``: dropped in random order until the target is met; ``filters``: every axis loses the same
            fraction; ``weights``: the smallest are set to 0, for a target in ``nonzero``.
        stages: The last part of the network that is used; set by the run.
        seed: Seed of the random order.
    """

    target: float = 0.0
    measure: str = "params"
    what: Annotated[str, OneOf("operations", "filters", "weights")] = "operations"
    stages: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_constraints(self)
        check_levels((self.what,), Measure(self.measure))


class RandomSearch(Search):
    """The search that removes operations in random order, of all axes the same fraction, or the smallest weights."""

    needs_epochs = learns_masks = False

    def __init__(self, s: Settings) -> None:
        super().__init__(s, SearchSpace(s.target, Measure(s.measure), (s.what,), s.stages[-1:]))
        self.s = s

    def boundary(self, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
        """Hook ``boundary``: as of :class:`Search`; at the start α is random, which orders the operations."""
        state = super().boundary(state, context, boundary)
        if boundary.event != Event.TASK_START:
            return state
        generator = replace(context, seed=self.s.seed).generator(Stream.ALPHA)
        alpha = torch.randn(len(state.alpha.values), generator=generator).to(state.alpha.values.device)
        return rank_evenly(replace(state, alpha=replace(state.alpha, values=alpha)))

    def finalize(self, state: SearchState, context: Context, target: float) -> Commit:
        """Return the plan that removes what exceeds the target, and the new state."""
        return plan_fit(self, state, context, target)


build = RandomSearch
