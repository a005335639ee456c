"""Random baselines of a search: random operations, the same fraction of every axis, or the smallest weights.

A search should do better than these at the same size and with the same training (Li and Talwalkar, arXiv 1902.07638).
With ``split`` set to what a search removed of each granularity, they show whether its choice of units matters, or only
the amounts. The order of operations is drawn once and never trained: epochs of the search train weights alone.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from regrow.allocation.gates import GateMasks
from regrow.allocation.levels import check_levels
from regrow.allocation.timed import Prices
from regrow.core.amounts import Measure
from regrow.methods.search.assembly import Search, compute_loss, follow_training
from regrow.methods.search.commit import Commit, fit_to_budget
from regrow.methods.search.importance import mask_by_thresholds, rank_evenly
from regrow.methods.search.space import GRANULARITIES, Rules, SearchSpace, check_space
from regrow.methods.search.state import SearchState
from regrow.training.learner import Boundary, Context, Event, Learner, Loss, Step

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
        if not self.what or list(self.what) != [one for one in GRANULARITIES if one in self.what]:
            names = ", ".join(GRANULARITIES)
            raise ValueError(f"what must be of {names}, in this order, got {', '.join(self.what) or 'none'}")
        if len(self.what) > 1 and (
            len(self.split) != len(self.what) or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6
        ):
            split = ", ".join(f"{share:g}" for share in self.split) or "none"
            raise ValueError(f"split must have a share for each of {', '.join(self.what)}, 1 in all, got {split}")
        if self.keep_bare and ("operations" not in self.what or self.measure == Measure.TIME):
            raise ValueError(
                "keep_bare keeps operations without weights, so it needs what=operations and a target other than ms"
            )
        check_levels(self.what, Measure(self.measure))


def build(settings: Settings, prices: Prices | None = None) -> Search:
    """Return the search that removes at random.

    Args:
        settings: Its settings.
        prices: The time that weights and operations take, if ``measure`` is ``ms``.
    """
    s = settings
    space = SearchSpace(s.target, Measure(s.measure), s.what, s.stages[-1:], prices)
    rules = Rules(space, partial(_mask, space), rates=lambda context: (0.0, 0.0), trains=lambda state, context: False)
    learner = Learner(
        SearchState(),
        parametrize=rules.parametrize,
        loss=_compute_loss,
        plan=partial(_plan, s, rules),
        boundary=partial(_follow, s, rules),
        optimizer="adam",
    )
    return Search(
        rules,
        learner,
        partial(_finalize, s, rules),
        asdict(s),
        needs_epochs=False,
        check=partial(check_space, space),
    )


def _compute_loss(state: SearchState, context: Context, step: Step) -> Loss:
    return Loss(compute_loss(context, step.batch, augment=False))


def _mask(space: SearchSpace, state: SearchState, context: Context, flat: Tensor | None, learning: bool) -> GateMasks:
    """Return masks of one granularity at a time after the last epoch, while the others are complete."""
    if context.epoch == context.epochs:
        space = replace(space, granularities=(space.granularities[state.turn],))
    return mask_by_thresholds(space, False, state, context, flat, learning)


def _follow(s: Settings, rules: Rules, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
    state = follow_training(rules, state, context, boundary)
    if boundary.event != Event.TASK_START:
        return state
    generator = replace(context, seed=s.seed).generator(11)
    alpha = torch.randn(len(state.alpha.values), generator=generator).to(state.alpha.values.device)
    if s.keep_bare:
        alpha[state.layout.bare()] = 50.0
    state = rank_evenly(replace(state, alpha=replace(state.alpha, values=alpha)))
    return replace(state, removal=state.whole - s.target)


def _plan(s: Settings, rules: Rules, state: SearchState, context: Context) -> Commit:
    return _finalize(s, rules, state, context, s.target) if context.epoch == context.epochs else (None, state)


def _finalize(s: Settings, rules: Rules, state: SearchState, context: Context, target: float) -> Commit:
    """Let each granularity in turn lose its fraction of the removal."""
    for turn in range(state.turn, len(s.what)):
        state = replace(state, turn=turn)
        one = replace(rules, space=replace(rules.space, granularities=(s.what[turn],)))
        plan, state = fit_to_budget(one, state, context, target + sum(s.split[turn + 1 :]) * state.removal)
        if plan:
            return plan, state
    return None, state
