"""MGAS (MG-DARTS): operations, filters and weights of one network are searched together, within a memory budget.

Liu, Saxena, Cao, Zhao, Ruan: MGAS / MG-DARTS (arXiv 2310.15074). **Reconstructed** from the abstract and the authors'
public code (lxy12357/MG_DARTS), whose errors are not copied. The abstract names the parts: a learned discretisation per
granularity, stages over growing prefixes of the network, and a re-evaluation that prunes and regrows. What neither
settles is a setting, whose default is ours. Searching operations only (``levels=operations``) is as good: see
docs/reproductions/mgas.md.

With a = σ(α) of an operation, b = σ(κ) of a filter, r = |w| / mean |w| of a weight, and thresholds t per granularity,

    operation · 2a [a ≥ t],   what reads a filter · 2b [b ≥ t],   w · [r ≥ t]      ([·] with DST's surrogate)

replace the network's own parameters, while everything, thresholds included, learns

    cross-entropy + μ ((size + lifted) / allowed − 1) + λ (Σ log(1 + N a / Σ a) + Σ exp(−t));

size is the size under the masks, and allowed falls until the target is reached. Under ``dual`` μ follows the excess of
size over allowed (ours), lifted is by how much kept operations cost less than ``min_cost`` (ours), and λ is constant,
without its second sum, since μ raises thresholds; nodes of which only one operation may remain are in neither term.
Under ``feedback`` μ is 0 and λ follows the authors' controller. Filters are the units of an axis, so what is masked can
always be cut.

Every other epoch, what is masked is cut from the network. A stage runs the network up to one of its classifiers; when
the next one begins, thresholds start at 0, and a fraction of the operations dropped in the stage is restored, sampled
as the authors sample them.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

from torch import nn

from regrow.allocation.levels import check_levels
from regrow.allocation.timed import Prices
from regrow.core.amounts import Measure
from regrow.methods.search import commit
from regrow.methods.search.assembly import Search, compute_loss, follow_training, log_status
from regrow.methods.search.commit import Commit
from regrow.methods.search.controller import Controller, add_pressure, cut_due, follow_step, slow_filters
from regrow.methods.search.importance import mask_by_thresholds, smooth_gradient, start_drift
from regrow.methods.search.space import GRANULARITIES, Rules, SearchSpace
from regrow.methods.search.stages import Stages, check_stages, protect_earlier, start_stage, take_turns
from regrow.methods.search.state import SearchState
from regrow.settings.constraints import OneOf, Range, check_constraints
from regrow.training.learner import Boundary, Context, Event, Learner, Step

CITATION = "Liu et al., MG-DARTS / MGAS (arXiv 2310.15074); reconstructed from abstract and authors' code"


@dataclass(frozen=True)
class Settings:
    """Settings of MGAS: what is searched, the target size, stages, the controller, and regrowth.

    Args:
        target: The largest allowed size of the found network, in units of ``measure``.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        levels: The granularities that are searched; ``weights`` only with ``measure=nonzero``, the only measure in
            which zeroed weights cost nothing.
        stages: The last part of the network in each stage, ascending, ending with the whole network; set by the run.
        share: The fraction of its size that a stage leaves, except the last one.
        warm: The number of epochs at the start of a stage in which only weights are trained.
        every: The number of epochs between two commits, which cut what is masked, after the ``warm`` ones.
        controller: ``dual``: the weight μ of the size in the loss follows the excess; ``feedback``: λ follows the
            number of dropped operations, as in the authors' code.
        gain: How fast μ follows the excess: the value that it would reach in a stage at a constant excess of 1.
        sparsity_penalty: Under ``dual``, λ, the weight of the regulariser that favours few operations per node.
        min_cost: Under ``dual``, the least cost at which an operation counts in the size term of the loss, as a
            fraction of the mean cost of its node's operations with weights (ours). Without effect if ``measure`` is
            ``ms``.
        reprune: Whether a stage prunes further what earlier stages kept; if not, only weights outside their operations,
            and at the very end what exceeds the target.
        regrow: The fraction of a stage's dropped operations that is restored at its end.
        regrow_filters: The fraction of a stage's cut filters that is restored, by the size of the gradient of their
            scale.
        regrow_weights: The fraction of the weights set to 0 that may train again, by the size of their gradient.
        revive: ``old``: operations come back with the weights that they had; ``fresh``: re-initialised, as in the
            authors' code.
        lr: The learning rate of α and κ times the number of steps in which a stage trains them: how far they can move.
        lr_threshold: The learning rate of thresholds, times the same number of steps.
        filter_lr_ratio: Under ``dual``, the factor on ``lr_threshold`` for filters, where a node may keep several
            operations (ours): below 1, more operations are dropped, and the remaining ones are wider.
        clip: The largest norm of the gradient of the network's own parameters; larger ones are scaled down to it.
        augment: Whether images are shifted and mirrored at random.
        seed: Seed of everything random.
    """

    target: float = 0.0
    measure: str = "nonzero"
    levels: tuple[str, ...] = GRANULARITIES
    stages: tuple[int, ...] = ()
    share: Annotated[float, Range(0, 1)] = 0.5
    warm: Annotated[int, Range(0)] = 2
    every: Annotated[int, Range(1)] = 2
    controller: Annotated[str, OneOf("dual", "feedback")] = "dual"
    gain: Annotated[float, Range(0)] = 40.0
    sparsity_penalty: Annotated[float, Range(0)] = 0.05
    min_cost: Annotated[float, Range(0)] = 1.0
    reprune: bool = True
    regrow: Annotated[float, Range(0, 1)] = 0.2
    regrow_filters: Annotated[float, Range(0, 1)] = 0.0
    regrow_weights: Annotated[float, Range(0, 1)] = 0.0
    revive: Annotated[str, OneOf("old", "fresh")] = "fresh"
    lr: Annotated[float, Range(0)] = 8.0
    lr_threshold: Annotated[float, Range(0)] = 2.0
    filter_lr_ratio: Annotated[float, Range(0)] = 0.25
    clip: Annotated[float, Range(0, above=True)] = 5.0
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.levels or not set(self.levels) <= set(GRANULARITIES):
            raise ValueError(f"levels are some of {', '.join(GRANULARITIES)}; got {', '.join(self.levels) or 'none'}")
        check_constraints(self)
        for name, off in (("sparsity_penalty", 0), ("min_cost", 0), ("filter_lr_ratio", 1)):
            if self.controller != "dual" and getattr(self, name) not in (off, getattr(Settings, name)):
                raise ValueError(f"{name} applies to controller=dual, got controller={self.controller}; drop {name}")
        if list(self.stages) != sorted({*self.stages}):
            raise ValueError(f"stages end at parts in ascending order; got {self.stages}")
        check_levels(self.levels, Measure(self.measure))


def build(settings: Settings, prices: Prices | None = None) -> Search:
    """Return the MGAS search.

    Args:
        settings: Its settings.
        prices: The time that weights and operations take, if ``measure`` is ``ms``.
    """
    s = settings
    thins = s.controller == "dual" and "operations" in s.levels
    space = SearchSpace(s.target, Measure(s.measure), s.levels, s.stages, prices)
    penalty = s.sparsity_penalty if thins else 0.0
    stages = Stages(max(1, len(s.stages)), s.warm, s.every, s.share, penalty, s.reprune)
    controller = Controller(s.controller, stages, s.gain, s.min_cost if thins else 0.0, thins)
    rules = Rules(
        space,
        masks=partial(mask_by_thresholds, space, True),
        rates=lambda context: (s.lr / stages.steps(context), s.lr_threshold / stages.steps(context)),
        trains=stages.trains,
        allowed=lambda state, context, target: controller.allow(state, context),
        fills_with_bare=not controller.min_cost,
    )
    own = _Mgas(s, rules, controller)
    learner = Learner(
        SearchState(),
        parametrize=rules.parametrize,
        loss=lambda state, context, step: add_pressure(
            controller, state, context, step, compute_loss(context, step.batch, s.augment)
        ),
        project=partial(_project, s),
        after_step=partial(follow_step, controller),
        plan=partial(_plan, own),
        boundary=partial(_follow, own),
        optimizer="adam",
        restores=True,
    )
    share = s.share + s.regrow * (1 - s.share) if "operations" in s.levels else 1.0
    return Search(
        rules,
        learner,
        partial(commit.fit_to_budget, rules),
        asdict(s),
        shrinks=True,
        check=partial(check_stages, stages, space),
        stage_share=share,
        masked=s.levels,
    )


@dataclass(frozen=True)
class _Mgas:
    """The parts of MGAS that its hooks share."""

    settings: Settings
    rules: Rules
    controller: Controller


def _follow(own: _Mgas, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
    if own.settings.revive == "fresh" and boundary.plan:
        commit.reset_modules(context, boundary.plan.back)
    state = follow_training(own.rules, state, context, boundary)
    match boundary.event:
        case Event.TASK_START:
            state = slow_filters(own.controller, start_drift(state), own.settings.filter_lr_ratio)
            return start_stage(own.controller.stages, own.rules, state, context, 0)
        case Event.RESUME:
            return protect_earlier(own.controller.stages, own.rules, state, context)
        case Event.EPOCH_START:
            return replace(state, losses=(0.0, 0.0))
        case Event.EPOCH_END:
            return replace(state, examples=0)
    return state


def _project(s: Settings, state: SearchState, context: Context, step: Step) -> SearchState:
    nn.utils.clip_grad_norm_(context.parameters().values(), s.clip)
    smooth_gradient(state)
    return state


def _plan(own: _Mgas, state: SearchState, context: Context) -> Commit:
    """Cut what is masked; at the end of a stage also restore a part of what it removed, and start the next stage."""
    if context.epoch == context.epochs:
        return commit.fit_to_budget(own.rules, state, context, own.settings.target)
    over = context.epoch == own.controller.stages.bounds(context.epochs, state.stage)[1]
    steps = [partial(cut_due, own.controller, own.rules)]
    if over:
        steps += [partial(commit.revive_operations, own.settings.regrow), partial(_restore, own)]
    plan, state = take_turns(steps if own.controller.stages.commits(state, context) else (), state, context)
    if over and plan is None:
        state = start_stage(own.controller.stages, own.rules, state, context, state.stage + 1)
        log_status(own.rules, state, context)
    return plan, state


def _restore(own: _Mgas, state: SearchState, context: Context) -> Commit:
    state = commit.release_weights(own.rules, own.settings.regrow_weights, state, context)
    return commit.restore_filters(own.rules, own.settings.regrow_filters, state, context)
