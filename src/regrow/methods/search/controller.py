"""The controller of MGAS: the allowed size at each step, and the strength of the penalties that enforce it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regrow.allocation.gates import GateMasks
from regrow.core.sources import to_host
from regrow.methods.search.commit import Commit, cut_masked
from regrow.methods.search.space import Rules, measure_masked
from regrow.methods.search.stages import Stages
from regrow.methods.search.state import SearchState
from regrow.training.learner import Context, Loss, Step


@dataclass(frozen=True)
class Controller:
    """The controller of MGAS, which makes a network smaller by one of two rules.

    Args:
        kind: ``dual``: the weight μ of the size in the loss follows the excess over the allowed size; ``feedback``: the
            weight λ of the regulariser follows the number of dropped operations.
        stages: When masks are trained and the network is cut.
        gain: How fast μ follows the excess.
        min_cost: The least cost at which an operation counts in the size, as a fraction of the mean cost in its node;
            0: operations count at their cost.
        thins: Whether the regulariser favours few operations per node, and not high thresholds.
    """

    kind: str
    stages: Stages
    gain: float
    min_cost: float
    thins: bool

    def allow(self, state: SearchState, context: Context) -> float:
        """Return the allowed size of the trained part now: from its initial size to the stage's goal, log-linearly.

        Args:
            state: The state of the search.
            context: The network and the progress of training.
        """
        if self.kind == "feedback":
            return state.goal  # this controller has no schedule
        return float(state.start * (state.goal / state.start) ** self.stages.progress(state, context))


@dataclass(frozen=True)
class Pressure:
    """The measurements of a controller in one step; the host reads them once, after the step.

    Args:
        excess: Size over allowed size, minus 1; ``None`` if it has no weight in the loss.
        losses: Cross-entropy and regulariser; empty if the loss has no regulariser.
    """

    excess: Tensor | None = None
    losses: tuple[Tensor, ...] = ()

    def read(self) -> tuple[float, list[float]]:
        """Return excess, 0 if there is none, and losses as numbers."""
        numbers = [float(one) for one in to_host([*([] if self.excess is None else [self.excess]), *self.losses])]
        return (0.0, numbers) if self.excess is None else (numbers[0], numbers[1:])


def add_pressure(controller: Controller, state: SearchState, context: Context, step: Step, plain: Tensor) -> Loss:
    """Return cross-entropy + μ ((size + lifted) / allowed − 1) + λ · regulariser, with a :class:`Pressure` as ``aux``.

    Args:
        controller: Says which of these terms apply.
        state: The state of the search, with μ and λ.
        context: The network.
        step: The step, with masks as :attr:`Replacements.aux`.
        plain: The cross-entropy.
    """
    loss, masks, excess, layout = plain, step.replaced.aux, None, state.layout
    if not controller.stages.trains(state, context):
        return Loss(loss, Pressure())
    if controller.kind == "dual":
        state = replace(state, examples=state.examples + len(step.batch))
        allowed = controller.allow(state, context)
        over = measure_masked(state, masks) / allowed - 1
        excess = over.detach()
        loss = loss + state.multiplier * (over + lift_cheap_operations(state, masks, controller.min_cost) / allowed)
    if not state.penalty:
        return Loss(loss, Pressure(excess))
    among = ~layout.single if controller.thins else torch.ones_like(layout.single)
    regularizer = layout.operation_regularizer(masks, state.alpha.values, among)
    if not controller.thins:  # otherwise μ raises thresholds
        ops, filters, weights = (one.values for one in state.thresholds)
        regularizer = regularizer + layout.threshold_regularizer(masks, (ops, filters, weights))
    regularizer = state.penalty * regularizer
    return Loss(loss + regularizer, Pressure(excess, (plain.detach(), regularizer.detach())))


@torch.no_grad()
def follow_step(controller: Controller, state: SearchState, context: Context, step: Step) -> SearchState:
    """Clamp thresholds (to 0 in earlier stages that are not pruned again) and update μ after a step; return the state.

    Args:
        controller: The controller.
        state: The state of the search.
        context: The network and the progress of training.
        step: The step, with a :class:`Pressure` as ``aux``.
    """
    for one, most in zip(state.thresholds, (0.99, 0.99, 2.0), strict=True):
        one.values.clamp_(0, most)
    if state.earlier:
        ops, axes = state.earlier
        state.operation_thresholds.values.masked_fill_(ops, 0.0)
        state.weight_thresholds.values[:-1].masked_fill_(ops, 0.0)
        state.filter_thresholds.values.index_fill_(0, axes, 0.0)
    multiplier, stages = state.multiplier, controller.stages
    excess, losses = step.aux.read()
    if controller.kind == "dual" and stages.trains(state, context):
        multiplier = max(0.0, multiplier + controller.gain / stages.steps(context) * excess)
    state = replace(state, multiplier=multiplier, examples=state.examples + len(step.batch))
    return add_losses(state, losses)


def lift_cheap_operations(state: SearchState, masks: GateMasks, min_cost: float) -> Tensor:
    """Return by how much kept operations cost less than ``min_cost``, in total; a scalar with their masks' gradients.

    Args:
        state: The state of the search.
        masks: The masks, with gradients.
        min_cost: The least cost, as a fraction of the mean cost of operations with weights in the same node.
    """
    layout = state.layout
    if layout.levels.timed or not min_cost:
        return masks.ops.new_zeros(())
    here = layout.alive & layout.runs & ~layout.single
    return (masks.ops * here * (min_cost * layout.typical() - layout.prices()).clamp_min(0)).sum()


def raise_penalty(state: SearchState, dropped: int, *, few: int = 24, many: int = 48, factor: int = 4) -> SearchState:
    """Return the state with λ changed after a commit, as in MG-DARTS and, with other numbers, GOLD-NAS.

    After ``many`` dropped operations or more, λ is halved and its step is reset. After fewer than ``few``, it rises by
    ``factor`` times its last step, unless the regulariser exceeds the cross-entropy: then it has reached its cap.

    Args:
        state: The state, with λ, its step and cap, and the losses of the last epoch.
        dropped: The number of operations that the commit drops.
        few: λ rises if fewer operations than this were dropped.
        many: λ is halved if at least this many operations were dropped.
        factor: The factor by which the step of λ grows.
    """
    plain, regularizer = state.losses
    state = replace(state, penalty_cap=state.penalty if plain < regularizer else state.penalty_cap)
    if dropped >= many:
        return replace(state, penalty_step=1e-5, penalty=state.penalty / 2)
    if dropped < few and state.penalty < state.penalty_cap:
        step = factor * state.penalty_step
        return replace(state, penalty_step=step, penalty=state.penalty + step)
    return state


def add_losses(state: SearchState, losses: Sequence[float]) -> SearchState:
    """Return the state with the cross-entropy and the regulariser of one more step added to its sums.

    Args:
        state: The state of the search.
        losses: Cross-entropy and regulariser of the step; empty if it has no regulariser.
    """
    if not losses:
        return state
    return replace(state, losses=(state.losses[0] + losses[0], state.losses[1] + losses[1]))


def slow_filters(controller: Controller, state: SearchState, ratio: float) -> SearchState:
    """Return the state in which filter thresholds have a lower learning rate, if the regulariser acts on some node.

    Args:
        controller: The controller.
        state: The state of the search.
        ratio: The factor on the learning rate.
    """
    if not controller.thins or bool(state.layout.single.all()) or state.filter_thresholds.lr is None:
        return state
    slow = ratio * state.filter_thresholds.lr
    return replace(state, filter_thresholds=replace(state.filter_thresholds, lr=slow))


def cut_due(controller: Controller, rules: Rules, state: SearchState, context: Context) -> Commit:
    """Plan the removal of what is masked, and update λ under ``feedback``.

    Args:
        controller: The controller.
        rules: The choices of the method.
        state: The state of the search.
        context: The network.
    """
    before = len(state.dropped)
    masks = rules.masks(state, context, None, False)
    plan, state = cut_masked(rules, state, context, masks, rules.space.target)
    return plan, raise_penalty(state, len(state.dropped) - before) if controller.kind == "feedback" else state
