"""The controller of a search: how small the network must be by now, and how strongly the loss presses for it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regrow.allocation.commits import threshold_for
from regrow.allocation.gates import GateMasks
from regrow.axis_tensor import AxisTensor
from regrow.methods.search.commit import Commit, cut_masked, fit_to_budget
from regrow.methods.search.importance import measure_relative
from regrow.methods.search.space import MaskRule, Rules, measure_masked
from regrow.methods.search.stages import Stages
from regrow.methods.search.state import SearchState
from regrow.training.learner import Context, Loss, Step


@dataclass(frozen=True)
class Controller:
    """How MGAS makes a network smaller.

    Args:
        kind: ``dual``: the weight μ of the size follows its excess; ``feedback``: the weight λ of the regulariser
            follows the number of dropped operations; ``ratios``: each granularity keeps a given share.
        stages: When masks are trained.
        shares: Under ``ratios``: granularity → the share that it keeps.
        gain: How fast μ follows the excess.
        floor: Operations count at least so much in the size, as a share of the mean cost in their node; 0: what they
            cost.
        thins: Whether the regulariser presses for few operations per node, and not for high thresholds.
    """

    kind: str
    stages: Stages
    shares: Mapping[str, float]
    gain: float
    floor: float
    thins: bool

    def allow(self, state: SearchState, context: Context, target: float) -> float:
        """What the trained part may cost now: from its first size to the stage's goal, evenly in logarithms."""
        if self.kind == "ratios" and context.epoch < context.epochs:
            return 0.0  # the given share of each granularity is removed, whatever size that leaves
        if self.kind == "feedback":
            return state.goal  # this controller has no schedule
        return float(state.start * (state.goal / state.start) ** self.stages.progress(state, context))


@dataclass(frozen=True)
class Pressure:
    """What a controller measures in a step.

    Args:
        losses: Cross-entropy and regulariser.
        excess: The share by which the network is too large.
    """

    losses: tuple[float, float] = (0.0, 0.0)
    excess: float = 0.0


def add_pressure(controller: Controller, state: SearchState, context: Context, step: Step, plain: Tensor) -> Loss:
    """Cross-entropy, μ ((size + lifted) / allowed − 1) and λ times the regulariser; what they are, as ``aux``.

    Args:
        controller: Which of them apply.
        state: Holds μ and λ.
        context: The network.
        step: With masks as :attr:`Replacements.aux`.
        plain: The cross-entropy.
    """
    loss, masks, excess, layout = plain, step.replaced.aux, 0.0, state.layout
    if not controller.stages.trains(state, context) or controller.kind == "ratios":
        return Loss(loss, Pressure())
    if controller.kind == "dual":
        state = replace(state, examples=state.examples + len(step.batch))
        allowed = controller.allow(state, context, 0.0)
        over = measure_masked(state, masks) / allowed - 1
        excess = float(over.detach())
        loss = loss + state.multiplier * (over + lift_cheap_operations(state, masks, controller.floor) / allowed)
    if not state.penalty:
        return Loss(loss, Pressure(excess=excess))
    among = ~layout.single if controller.thins else torch.ones_like(layout.single)
    regularizer = layout.operation_regularizer(masks, state.alpha.values, among)
    if not controller.thins:  # otherwise μ raises thresholds
        ops, filters, weights = (one.values for one in state.thresholds)
        regularizer = regularizer + layout.threshold_regularizer(masks, (ops, filters, weights))
    regularizer = state.penalty * regularizer
    losses = (float(plain.detach()), float(regularizer.detach()))
    return Loss(loss + regularizer, Pressure(losses, excess))


@torch.no_grad()
def follow_step(controller: Controller, state: SearchState, context: Context, step: Step) -> SearchState:
    """Keep thresholds in their ranges, and those of earlier stages at 0 where these are not pruned; update μ."""
    for one, most in zip(state.thresholds, (0.99, 0.99, 2.0), strict=True):
        one.values.clamp_(0, most)
    if state.earlier:
        ops, axes = state.earlier
        state.operation_thresholds.values[ops] = 0.0
        state.weight_thresholds.values[:-1][ops] = 0.0
        state.filter_thresholds.values[axes] = 0.0
    multiplier, stages = state.multiplier, controller.stages
    if controller.kind == "dual" and stages.trains(state, context):
        multiplier = max(0.0, multiplier + controller.gain / stages.steps(context) * step.aux.excess)
    state = replace(state, multiplier=multiplier, examples=state.examples + len(step.batch))
    return add_losses(state, step.aux.losses)


def lift_cheap_operations(state: SearchState, masks: GateMasks, floor: float) -> Tensor:
    """By how much operations that are kept cost less than a floor, with the gradients of their masks, a scalar.

    Args:
        state: The state of the search.
        masks: With gradients.
        floor: As a share of the mean cost of operations with weights in the same node.
    """
    layout = state.layout
    if layout.levels.timed or not floor:
        return torch.zeros(())
    here = layout.alive & layout.runs & ~layout.single
    return (masks.ops * here * (floor * layout.typical() - layout.prices()).clamp_min(0)).sum()


def raise_penalty(state: SearchState, dropped: int, *, few: int = 24, many: int = 48, factor: int = 4) -> SearchState:
    """The state with λ after a commit, as the controllers of MG-DARTS and, with other numbers, GOLD-NAS change it.

    With ``many`` dropped operations or more λ is halved and its step starts anew. With fewer than ``few`` it rises by
    ``factor`` times its last step, unless the regulariser exceeds the cross-entropy: then it has reached its cap.

    Args:
        state: λ, its step and cap, and the losses of the last epoch.
        dropped: How many operations the commit drops.
        few: So many are enough.
        many: So many are too many.
        factor: By how much the step grows.
    """
    plain, regularizer = state.losses
    state = replace(state, penalty_cap=state.penalty if plain < regularizer else state.penalty_cap)
    if dropped >= many:
        return replace(state, penalty_step=1e-5, penalty=state.penalty / 2)
    if dropped < few and state.penalty < state.penalty_cap:
        step = factor * state.penalty_step
        return replace(state, penalty_step=step, penalty=state.penalty + step)
    return state


def add_losses(state: SearchState, losses: tuple[float, float]) -> SearchState:
    """The state with the cross-entropy and the regulariser of one more step in its sums."""
    return replace(state, losses=(state.losses[0] + losses[0], state.losses[1] + losses[1]))


def set_thresholds(controller: Controller, masks: MaskRule, state: SearchState, context: Context) -> None:
    """Under ``ratios``, set thresholds, in place, at which each granularity keeps the share that is due by now."""
    if controller.kind != "ratios":
        return
    layout, progress = state.layout, controller.stages.progress(state, context)
    kappa = torch.cat([state.kappa[key].values.detach() for key in layout.levels.axes])
    whole = sum(context.axes[key].next_id for key in layout.levels.axes)
    alpha = state.alpha.values.detach()[layout.alive & layout.runs]

    def fill(one: AxisTensor, granularity: str, values: Tensor, units: int) -> None:
        share = controller.shares.get(granularity, 1.0) ** progress
        one.values.data.fill_(threshold_for(share, values, units))

    fill(state.operation_thresholds, "operations", alpha.sigmoid(), int(layout.runs.sum()))
    fill(state.filter_thresholds, "filters", kappa.sigmoid(), whole)
    relative = measure_relative(state, context, masks(state, context, None, False))
    fill(state.weight_thresholds, "weights", relative.masked_fill(state.zero_mask, 0.0), len(relative))


def slow_filters(controller: Controller, state: SearchState, pace: float) -> SearchState:
    """The state in which thresholds of filters are trained more slowly, if the regulariser presses on some node."""
    if not controller.thins or bool(state.layout.single.all()) or state.filter_thresholds.lr is None:
        return state
    slow = pace * state.filter_thresholds.lr
    return replace(state, filter_thresholds=replace(state.filter_thresholds, lr=slow))


def cut_due(controller: Controller, rules: Rules, state: SearchState, context: Context) -> Commit:
    """Cut what is masked; under ``feedback`` λ follows the number of operations."""
    before = len(state.dropped)
    set_thresholds(controller, rules.masks, state, context)
    masks = rules.masks(state, context, None, False)
    plan, state = cut_masked(rules, state, context, masks, rules.space.target)
    return plan, raise_penalty(state, len(state.dropped) - before) if controller.kind == "feedback" else state


def fit_due(controller: Controller, rules: Rules, state: SearchState, context: Context, target: float) -> Commit:
    """Cut what is masked, and what the target requires."""
    set_thresholds(controller, rules.masks, state, context)
    return fit_to_budget(rules, state, context, target)
