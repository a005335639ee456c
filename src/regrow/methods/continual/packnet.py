"""PackNet: each task trains the weights that earlier tasks pruned away, and then prunes some of its own.

Mallya and Lazebnik, CVPR 2018 (arXiv 1711.05769; read in the authors' code): half-way through a task the fraction
``prune`` of its weights with the smallest |w| is freed, and the others are trained further; biases and norms are frozen
after the first task. With ``use_task_id``, task k is evaluated with the weights of tasks up to k; else with all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.core.plan import Plan
from regrow.settings.constraints import CheckedSettings, FractionBelowOne
from regrow.training.hooks import copy_weights, protect_entries, restore_entries, train_with_frozen_norms
from regrow.training.learner import Boundary, Context, Event, Learner, Replacements, Step, make_tensor
from regrow.training.state import derived

CITATION = "Mallya and Lazebnik, PackNet, CVPR 2018"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of PackNet: the pruned fraction, and whether evaluation is given the task.

    Args:
        prune: The fraction of the weights available to a task that it frees for later tasks, from 0 to below 1.
        use_task_id: Whether the task's identity is given at evaluation, so that the task's own mask can be used.
    """

    prune: FractionBelowOne = 0.5
    use_task_id: bool = False


@dataclass(frozen=True)
class PackNetState:
    """The state of PackNet, by name of a weight."""

    # The number of the task that owns each entry, from 1; 0 for free entries.
    owner: Mapping[str, AxisTensor] = field(default_factory=dict)
    pruned: bool = False  # whether the current task has pruned already
    before: Mapping[str, Tensor] = derived(dict)  # the weights before the step, to restore owned entries; not stored


def build(settings: Settings) -> Learner[PackNetState]:
    """Return the learner that trains with PackNet."""

    def select_weights(state: PackNetState, context: Context) -> Replacements:
        number = context.eval_task
        if number is None or not settings.use_task_id or number > context.number:
            return Replacements()
        parameters = context.parameters()
        owners = {name: owner.values for name, owner in state.owner.items()}
        return Replacements(
            {name: parameters[name].detach() * ((o > 0) & (o <= number + 1)) for name, o in owners.items()}
        )

    def mask_gradients(state: PackNetState, context: Context, step: Step) -> PackNetState:
        protect_entries(context, _protected_entries(state, context))
        return replace(state, before=copy_weights(context))

    def restore_owned(state: PackNetState, context: Context, step: Step) -> PackNetState:
        restore_entries(context, state.before, _protected_entries(state, context))
        return state

    def prune_halfway(state: PackNetState, context: Context) -> tuple[Plan | None, PackNetState]:
        if context.epoch == (context.epochs + 1) // 2 and not state.pruned:
            return None, _prune(state, context, settings.prune)
        return None, state

    def react(state: PackNetState, context: Context, boundary: Boundary) -> PackNetState:
        train_with_frozen_norms(state, context, boundary)
        match boundary.event:
            case Event.TASK_START:
                parameters = context.parameters()
                free = {
                    name: make_tensor(context, name, torch.zeros_like(parameters[name], dtype=torch.int32))
                    for name in context.weights
                }
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
        boundary=react,
    )


def _protected_entries(state: PackNetState, context: Context) -> dict[str, Tensor]:
    """Return weight name → bool mask, true where the current task must not train the entry.

    Before the task has pruned, these are the entries that earlier tasks own; then all but its own.
    """
    trained = context.number + 1 if state.pruned else 0  # before it prunes: all free entries
    return {name: owner.values != trained for name, owner in state.owner.items()}


def _prune(state: PackNetState, context: Context, share: float) -> PackNetState:
    """Set the fraction ``share`` of each weight's free entries that is smallest to 0, in place.

    The task now owns the other free entries, in ``state.owner``. Return the state with ``pruned`` set.
    """
    with torch.no_grad():
        for name in context.weights:
            weight, owner = context.parameters()[name], state.owner[name].values
            free = owner == 0
            zeroed = torch.zeros_like(free)
            if count := round(share * int(free.sum())):
                zeroed = free & (weight.abs() <= weight[free].abs().kthvalue(count).values)
            owner[free & ~zeroed] = context.number + 1
            weight.masked_fill_(zeroed, 0.0)
    return replace(state, pruned=True)
