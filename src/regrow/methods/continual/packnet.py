"""PackNet: each task gets what the earlier ones gave back, and is evaluated with its own weights if it is named.

Mallya and Lazebnik, CVPR 2018 (arXiv 1711.05769; read in the authors' code): half-way through a task the ``prune``
share of its weights with the least |w| is given back, and the others are trained on; biases and norms stay after the
first task. With the task named, task k is answered with the weights of tasks up to k; without, with all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regrow.axis_tensor import AxisTensor
from regrow.plan import Plan
from regrow.training.learner import (
    Boundary,
    Context,
    Event,
    Learner,
    Replacements,
    Step,
    freeze_norms,
    set_train_mode,
)
from regrow.training.state import derived

CITATION = "Mallya and Lazebnik, PackNet, CVPR 2018"


@dataclass(frozen=True)
class Settings:
    """PackNet's.

    Args:
        prune: The share of a task's weights that it gives back.
        named: Whether a task is named when it is evaluated.
    """

    prune: float = 0.5
    named: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.prune < 1:
            raise ValueError(f"prune is a share, from 0 to below 1; got {self.prune:g}")


@dataclass(frozen=True)
class PackNetState:
    """By name of a weight: the number of the task that owns each entry, from 1, or 0; whether this task has pruned."""

    owner: Mapping[str, AxisTensor] = field(default_factory=dict)
    pruned: bool = False
    before: Mapping[str, Tensor] = derived(dict)
    """The weights before the step."""


def build(settings: Settings) -> Learner[PackNetState]:
    """The learner."""

    def select_weights(state: PackNetState, context: Context) -> Replacements:
        number = context.answered
        if number is None or not settings.named or number > context.number:
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
        parameters = context.parameters()
        with torch.no_grad():
            for name, value in state.before.items():
                parameter = parameters[name]
                torch.where(_trainable(state, context, name), parameter, value, out=parameter)
        return state

    def prune_halfway(state: PackNetState, context: Context) -> tuple[Plan | None, PackNetState]:
        if context.epoch == (context.epochs + 1) // 2 and not state.pruned:
            return None, _prune(state, context, settings.prune)
        return None, state

    def own(state: PackNetState, context: Context, boundary: Boundary) -> PackNetState:
        set_train_mode(state, context, boundary)
        match boundary.event:
            case Event.TASK_START:
                free = {name: _free(context, name) for name in context.weights}
                return PackNetState({**free, **state.owner})
            case Event.EPOCH_START if context.number:
                freeze_norms(context.model)
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
    shape = context.parameters()[name].shape
    return AxisTensor(torch.zeros(shape, dtype=torch.int32), context.axes.shapes[name])


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
