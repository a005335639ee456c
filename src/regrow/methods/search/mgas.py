"""MGAS (MG-DARTS): operations, filters and weights of one network are searched together, within a memory budget.

Liu, Saxena, Cao, Zhao, Ruan: MGAS / MG-DARTS (arXiv 2310.15074). **Reconstructed** from the abstract and the authors'
public code (lxy12357/MG_DARTS), whose errors are not copied. The abstract names the parts: a learned discretisation per
granularity, stages over growing prefixes of the network, and a re-evaluation that prunes and regrows. What neither
settles is a setting, whose default is ours. See
docs/reproductions/mgas.md.

With a = σ(α) of an operation, b = σ(κ) of a filter, r = |w| / mean |w| of a weight, and thresholds t per granularity,

    operation · 2a [a ≥ t],   what reads a filter · 2b [b ≥ t],   w · [r ≥ t]      ([·] with DST's surrogate)

replace the network's own parameters, while these and the importances α and κ learn

    cross-entropy + μ (size / allowed − 1);

size is the size under the masks, and allowed falls until the target is reached. μ follows the excess of size over
allowed (ours; the authors' controller moves the weight of a regulariser). Thresholds rise where removal saves more than
it costs (:mod:`.thresholds`, ours). Filters are the units of an axis, so what is masked can always be cut.

Every other epoch, what is masked is cut from the network. A stage runs the network up to one of its classifiers; when
the next one begins, thresholds start at 0, and a fraction of the operations dropped in the stage is restored, sampled
as the authors sample them.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import torch

from regrow.allocation.levels import check_levels
from regrow.core.amounts import Measure
from regrow.core.axes.axis import AxisTensor
from regrow.methods.search import Commit, Search, commit
from regrow.methods.search.space import SearchSpace, SearchState, build_layout
from regrow.methods.search.thresholds import measure_pressure, move_thresholds
from regrow.settings.constraints import Count, Fraction, NonNegative, Positive, Range, check_constraints
from regrow.training.learner import Boundary, Context, Event, Loss, Step

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
        share: The fraction of its size that a stage leaves, except the last one; that of the target if it is greater.
        warm: The number of epochs at the start of a stage in which only weights are trained.
        every: The number of epochs between two commits, which cut what is masked, after the ``warm`` ones.
        gain: How fast μ follows the excess: the value that it would reach in a stage at a constant excess of 1.
        reprune: Whether a stage prunes further what earlier stages kept; if not, only weights outside their operations,
            and at the very end what exceeds the target.
        regrow: The fraction of a stage's dropped operations that is restored at its end, re-initialised.
        regrow_filters: The fraction of a stage's cut filters that is restored, by the size of the gradient of their
            scale.
        lr: The learning rate of α and κ times the number of steps in which a stage trains them: how far they can move.
        lr_threshold: The greatest rise of a threshold in a step, times the same number of steps.
        clip: The largest norm of the gradient of the network's own parameters; larger ones are scaled down to it.
        augment: Whether images are shifted and mirrored at random.
        seed: Seed of everything random.
    """

    target: float = 0.0
    measure: str = "nonzero"
    levels: tuple[str, ...] = ("operations", "filters", "weights")
    stages: tuple[int, ...] = ()
    share: Fraction = 0.5
    warm: Annotated[int, Range(0)] = 2
    every: Count = 2
    gain: NonNegative = 40.0
    reprune: bool = True
    regrow: Fraction = 0.2
    regrow_filters: Fraction = 0.0
    lr: NonNegative = 8.0
    lr_threshold: NonNegative = 2.0
    clip: Positive = 5.0
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_constraints(self)
        if list(self.stages) != sorted({*self.stages}):
            raise ValueError(f"stages end at parts in ascending order; got {self.stages}")
        check_levels(self.levels, Measure(self.measure))


class Mgas(Search):
    """The MGAS search: a schedule of stages, and a controller of the size: μ, whose loss term lowers it."""

    restores = True
    trains_thresholds = True

    def __init__(self, s: Settings) -> None:
        super().__init__(s, SearchSpace(s.target, Measure(s.measure), s.levels, s.stages))
        self.s, self.stages = s, max(1, len(s.stages))
        self.mask_bytes = 60 + sum({"operations": 8, "filters": 14, "weights": 22}[name] for name in s.levels)
        self.searches_operations = "operations" in s.levels
        if self.searches_operations:
            self.stage_share = s.share + s.regrow * (1 - s.share)

    def stage_bounds(self, epochs: int, stage: int) -> tuple[int, int]:
        """Return (the first epoch of a stage, the first epoch of the next one); stages and epochs count from 0."""
        return round(stage * epochs / self.stages), round((stage + 1) * epochs / self.stages)

    def check_epochs(self, epochs: int) -> None:
        """Raise ValueError if a stage has none of ``epochs`` that trains masks, or one stage is to prune again."""
        n, warm = self.stages, self.s.warm
        if n == 1 and not self.s.reprune:
            raise ValueError("reprune=false needs several stages, and this search has one; use --stages 2")
        bounds = [self.stage_bounds(epochs, stage) for stage in range(n)]
        if any(end - first <= warm for first, end in bounds):
            raise ValueError(
                f"{epochs} epochs leave a stage of {n} no epoch to learn masks in, since the first {warm} of "
                f"each stage train weights alone; use --epochs {n * (warm + 1)} or more, fewer --stages, or a smaller "
                "--set warm"
            )

    def note_epochs(self, epochs: int) -> str:
        """Return that nothing is cut before the end of the last stage, if that is so."""
        first, end = self.stage_bounds(epochs, self.stages - 1)
        if end - first - self.s.warm > self.s.every:
            return ""
        return f"{epochs} epochs leave the last stage no cut before its end: more epochs, or every=1, allow one"

    def learning_rates(self, context: Context) -> tuple[float, float]:
        """Return (the learning rate of α and κ, that of thresholds)."""
        steps = self._count_steps(context)
        return self.s.lr / steps, self.s.lr_threshold / steps

    def _count_steps(self, context: Context) -> int:
        """Return the number of steps of a stage in which masks are trained."""
        return max(1, (context.epochs // self.stages - self.s.warm) * context.steps)

    def trains(self, state: SearchState, context: Context) -> bool:
        """Whether masks are trained in this epoch."""
        first, _ = self.stage_bounds(context.epochs, state.stage)
        return context.epoch >= first + self.s.warm

    def allowed_size(self, state: SearchState, context: Context, target: float) -> float:
        """Return the allowed size of the trained part now: from its initial size to the stage's goal, log-linearly.

        The goal is reached after four fifths of the epochs that train masks; ``target`` is not used.
        """
        first, end = self.stage_bounds(context.epochs, state.stage)
        training = max(1, end - first - self.s.warm)
        done = context.epoch - first - self.s.warm + state.examples / len(context.task.train)
        progress = min(1.0, max(0.0, done / (0.8 * training)))
        return float(state.start * (state.goal / state.start) ** progress)

    def loss(self, state: SearchState, context: Context, step: Step) -> Loss:
        """Hook ``loss``: cross-entropy + μ (size / allowed − 1); in epochs that train masks ``aux`` is the pressure."""
        loss = self.compute_loss(context, step.batch)
        masks = step.replaced.aux
        if not self.trains(state, context):
            return Loss(loss)
        allowed = self.allowed_size(replace(state, examples=state.examples + len(step.batch)), context, 0.0)
        term, pressure = measure_pressure(state, masks, allowed)
        return Loss(loss + term, pressure)

    def project(self, state: SearchState, context: Context, step: Step) -> SearchState:
        """Hook ``project``: move thresholds, clip gradients, and update ``state.drift``, all in place.

        The drift is s ← 0.9 s + gradient of α.
        """
        if step.aux is not None:
            move_thresholds(state, context, step, self.s.lr_threshold / self._count_steps(context))
        state = super().project(state, context, step)
        gradient = state.alpha.values.grad
        if gradient is not None and state.drift is not None:
            state.drift.values.mul_(0.9).add_(gradient)
        return state

    @torch.no_grad()
    def after_step(self, state: SearchState, context: Context, step: Step) -> SearchState:
        """Hook ``after_step``: clamp thresholds in place, count examples and, while masks train, set the next μ."""
        # Below 1, the largest σ(α) and σ(κ); |w| is over its mean.
        for thresholds, largest in zip(state.thresholds, (0.99, 0.99, 2.0), strict=True):
            thresholds.values.clamp_(0, largest)
        if state.earlier:
            ops, axes = state.earlier
            state.operation_thresholds.values.masked_fill_(ops, 0.0)
            state.weight_thresholds.values[:-1].masked_fill_(ops, 0.0)
            state.filter_thresholds.values.index_fill_(0, axes, 0.0)
        multiplier = state.multiplier
        if self.trains(state, context):
            multiplier = max(0.0, multiplier + self.s.gain / self._count_steps(context) * float(step.aux.excess))
        return replace(state, multiplier=multiplier, examples=state.examples + len(step.batch))

    def boundary(self, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
        """Hook ``boundary``: start the first stage, and re-initialise operations that a stage restores, in place."""
        if boundary.plan and boundary.plan.origin.get("reset"):
            commit.reset_modules(context, boundary.plan.back)
        state = super().boundary(state, context, boundary)
        match boundary.event:
            case Event.TASK_START:
                drift = AxisTensor(torch.zeros_like(state.alpha.values), state.alpha.dims)
                return self._start_stage(replace(state, drift=drift), context, 0)
            case Event.RESUME:
                return self._protect_earlier(state, context)
            case Event.EPOCH_END:
                return replace(state, examples=0)
        return state

    def _start_stage(self, state: SearchState, context: Context, stage: int) -> SearchState:
        """Return the state at the start of a stage, with thresholds at 0 and the size that the stage has to reach."""
        state = replace(state, stage=stage, multiplier=0.0, dropped={}, cut={}, turn=0)
        state.clear_thresholds()
        state = self._protect_earlier(self.update_layout(state, context), context)
        size = self.size(state, context)
        share = max(self.s.share, min(1.0, self.s.target / state.whole))
        return replace(state, start=size, goal=self.s.target if stage == self.stages - 1 else share * size)

    def _protect_earlier(self, state: SearchState, context: Context) -> SearchState:
        """Return the state with ``earlier``: operations and axes of earlier stages, if these are not pruned again."""
        if self.s.reprune or not state.stage:
            return replace(state, earlier=())
        layout = build_layout(self.space, state.axes, context, self.space.part(state.stage - 1))
        return replace(state, earlier=(layout.runs, layout.axis.unique()))

    def plan(self, state: SearchState, context: Context) -> Commit:
        """Hook ``plan``: cut what is masked; at the end of a stage also restore a part, and start the next stage.

        A plan ends the call, and the loop calls again; ``state.turn`` counts the steps taken at this boundary.
        """
        if context.epoch == context.epochs:
            return self.finalize(state, context, self.s.target)
        first, end = self.stage_bounds(context.epochs, state.stage)
        trained, is_over = context.epoch - first - self.s.warm, context.epoch == end  # trained: since the warm-up
        steps = [self._cut] if is_over or (trained > 0 and trained % self.s.every == 0) else []
        if is_over:
            steps += [
                partial(commit.plan_revival, self.s.regrow),
                partial(commit.plan_restoration, self, self.s.regrow_filters),
            ]
        elif context.epoch == context.epochs - 1:
            steps.append(partial(commit.plan_return, self))
        for turn in range(state.turn, len(steps)):
            plan, state = steps[turn](replace(state, turn=turn + 1), context)
            if plan:
                return plan, state
        state = replace(state, turn=0)
        if is_over:
            state = self._start_stage(state, context, state.stage + 1)
            self.log_status(state, context)
        return None, state

    def _cut(self, state: SearchState, context: Context) -> Commit:
        """Return the plan that removes masked things as far as the size is above the allowed one, and the new state.

        The plan is ``None`` if there is nothing to remove.
        """
        return commit.plan_masked_cut(self, state, context, self.masks(state, context), self.s.target)

    def finalize(self, state: SearchState, context: Context, target: float) -> Commit:
        """Return the plan that removes what is masked, and then what exceeds the target; and the new state.

        At last, removed weights or filters return, as far as there is room.
        """
        plan, state = commit.plan_fit(self, state, context, target)
        if plan is None:
            state = commit.fill_with_weights(self, state, context, target)
            plan, state = commit.plan_refill(self, state, context, target)
        return plan, state


build = Mgas
