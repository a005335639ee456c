"""Apply a plan while a network is trained: to the network, the learner's state and the optimizers' moments."""

from dataclasses import replace
from typing import TypeVar

from regrow.core.candidates import run_whole
from regrow.core.plan import Plan
from regrow.surgery import apply
from regrow.training.learner import Boundary, Context, Event, Learner
from regrow.training.optimizers import Optimizers
from regrow.training.state import axis_tensors, follow_plan

S = TypeVar("S")


def apply_plan(
    learner: Learner[S], state: S, context: Context, plan: Plan, optimizers: Optimizers | None = None
) -> tuple[Context, S]:
    """Apply a plan to the network, the learner's state and the optimizers' moments.

    Args:
        learner: The learner whose plan it is.
        state: The learner's state.
        context: The network before the plan.
        plan: The plan.
        optimizers: The optimizers of the network and of the learner's tensors; ``None``: training has ended.

    Returns:
        The context and the learner's state after the plan.
    """
    before, old = context, axis_tensors(state)
    # No optimizer knows the group of what a plan brings back yet.
    following = [optimizers.network] if optimizers and not plan.back else []
    with run_whole(context.model):
        model, axes = apply(context.model, context.axes, plan, optimizers=following, undo=context.undo)
    context = replace(context, model=model, axes=axes, applied=context.applied + 1)
    state = follow_plan(state, before.axes, plan)
    tensors = axis_tensors(state)
    for one in tensors.values():
        if one.lr is not None:
            one.values.requires_grad_()
    if optimizers:
        optimizers.follow(old, tensors, before.axes, plan)
    state = learner.boundary(state, context, Boundary(Event.PLAN_APPLIED, plan, before))
    if optimizers:
        optimizers.collect(context.parameters(), axis_tensors(state))
    return context, state
