"""PackNet: each task trains the weights that earlier tasks pruned away, and then prunes some of its own.

Mallya and Lazebnik, CVPR 2018 (arXiv 1711.05769; read in the authors' code): half-way through a task the fraction
``prune`` of its weights with the smallest |w| is freed, and the others are trained further; biases and norms are frozen
after the first task. With ``use_task_id``, task k is evaluated with the weights of tasks up to k; otherwise with all
weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.core.plan import Plan
from regrow.settings.constraints import Range, check_constraints
from regrow.training.learner import Boundary, Context, Event, Learner, Replacements, Step
from regrow.training.norms import train_with_frozen_norms
from regrow.training.parameters import restore_entries
from regrow.training.state import derived

CITATION = "Mallya and Lazebnik, PackNet, CVPR 2018"


@dataclass(frozen=True)
class Settings:
    """Settings of PackNet: the pruned fraction, and whether evaluation is given the task.

    Args:
        prune: The fraction of the weights available to a task that it frees for later tasks, from 0 to below 1.
        use_task_id: Whether the task's identity is given at evaluation, so that the task's own mask can be used.
    """

    prune: Annotated[float, Range(0, 1, below=True)] = 0.5
    use_task_id: bool = False

    def __post_init__(self) -> None:
        check_constraints(self)


@dataclass(frozen=True)
class PackNetState:
    """The state of PackNet, by name of a weight.

    Args:
        owner: The number of the task that owns each entry, from 1; 0 for free entries.
        pruned: Whether the current task has pruned already.
        before: The weights before the step.
    """

    owner: Mapping[str, AxisTensor] = field(default_factory=dict)
    pruned: bool = False
    before: Mapping[str, Tensor] = derived(dict)
    """The weights before the step."""


def build(settings: Settings) -> Learner[PackNetState]:
    """Return the learner that trains with PackNet.

    Args:
        settings: Its settings.
    """

    def select_weights(state: PackNetState, context: Context) -> Replacements:
        number = context.answered
        if number is None or not settings.use_task_id or number > context.number:
            return Replacements()
        parameters = context.parameters()
        owners = {name: one.values for name, one in state.owner.items()}
        return Replacements(
            {name: parameters[name].detach() * ((o > 0) & (o <= number + 1)) for name, o in owners.items()}
        )

    def mask_gradients(state: PackNetState, context: Context, step: Step) -> PackNetState:
        parameters = context.parameters()
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            if name in state.owner:
                parameter.grad.masked_fill_(~_trainable(state, context, name), 0.0)
            elif context.number:
                parameter.grad = None
        return replace(state, before={name: parameters[name].detach().clone() for name in context.weights})

    def restore_owned(state: PackNetState, context: Context, step: Step) -> PackNetState:
        restore_entries(context, state.before, {name: ~_trainable(state, context, name) for name in state.before})
        return state

    def prune_halfway(state: PackNetState, context: Context) -> tuple[Plan | None, PackNetState]:
        if context.epoch == (context.epochs + 1) // 2 and not state.pruned:
            return None, _prune(state, context, settings.prune)
        return None, state

    def own(state: PackNetState, context: Context, boundary: Boundary) -> PackNetState:
        train_with_frozen_norms(state, context, boundary)
        match boundary.event:
            case Event.TASK_START:
                free = {name: _free(context, name) for name in context.weights}
                return PackNetState({**free, **state.owner})
            case Event.TASK_END if not state.pruned:
                return _prune(state, context, settings.prune)
        return state

    return Learner(
        PackNetState(),
        parametrize=select_weights,
        project=mask_gradients,
        after_step=restore_owned,
        plan=prune_halfway,
        boundary=own,
    )


def _free(context: Context, name: str) -> AxisTensor:
    like = context.parameters()[name]
    return AxisTensor(torch.zeros(like.shape, dtype=torch.int32, device=like.device), context.axes.shapes[name])


def _trainable(state: PackNetState, context: Context, name: str) -> Tensor:
    owner = state.owner[name].values
    return owner == context.number + 1 if state.pruned else owner == 0


def _prune(state: PackNetState, context: Context, share: float) -> PackNetState:
    """Own the largest of the free weights; set the others to 0 and leave them free."""
    with torch.no_grad():
        for name in context.weights:
            weight, owner = context.parameters()[name], state.owner[name].values
            free = owner == 0
            many = int(free.sum())
            if many:
                least = weight[free].abs().kthvalue(max(1, round(share * many))).values
                zeroed = free & (weight.abs() <= least)
                owner[free & ~zeroed] = context.number + 1
                weight.masked_fill_(zeroed, 0.0)
    return replace(state, pruned=True)
