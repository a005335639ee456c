"""A learner that guards what earlier tasks learned: how its factors, anchor and guards follow the tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from regrow.core.axes.axis import AxisTensor
from regrow.core.plan import Plan
from regrow.protection.factors import Factors
from regrow.protection.growth import (
    NO_GROWTH,
    ORIGIN,
    Growth,
    direct_new_units,
    extend_anchor,
    fit_to_task,
    weigh_new_units,
)
from regrow.protection.guards import Guards, apply_guards, build_guards, settle_guards
from regrow.training.hooks import copy_parameters
from regrow.training.learner import Boundary, Context, Event, Learner, Step, set_train_mode
from regrow.training.state import derived


@dataclass(frozen=True)
class Protection:
    """How earlier tasks are protected.

    Args:
        shrink: Learning rate → the arguments of :func:`regrow.protection.guards.apply_guards` for one step.
        add_factors: (factors, context) → the factors with those of the present task.
        damping: As of :func:`regrow.protection.guards.build_guards`.
        every: Guards are applied to the joint change of this many steps.
        growth: When the network is widened, and how.
    """

    shrink: Callable[[float], Mapping[str, float]]
    add_factors: Callable[[Factors, Context], Factors]
    damping: float = 0.0
    every: int = 1
    growth: Growth = NO_GROWTH


@dataclass(frozen=True)
class ProtectionState:
    """What a learner with guards carries from task to task; empty before the end of the first task."""

    factors: Factors = field(default_factory=dict)
    anchor: Mapping[str, AxisTensor] = field(default_factory=dict)  # parameters at the end of the last task, by name
    base: dict[str, int] = field(default_factory=dict)  # the initial size of every axis
    steps: int = 0  # of training, so far
    lr: float = 0.0  # of the last step
    guards: Guards = derived(dict)


def build_learner(protection: Protection) -> Learner[ProtectionState]:
    """Return the learner that trains on the loss of each task, and applies its guards between steps."""

    def apply(state: ProtectionState, context: Context) -> None:
        apply_guards(state.guards, context.model, **protection.shrink(state.lr))

    def guard(state: ProtectionState, context: Context) -> ProtectionState:
        guards = build_guards(state.factors, context, state.anchor, protection.damping) if context.number else {}
        return replace(state, guards=guards)

    def widen(state: ProtectionState, context: Context, boundary: Boundary, plan: Plan) -> ProtectionState:
        if plan.origin == ORIGIN:
            guards = guard(replace(state, anchor=copy_parameters(context)), context).guards
            direct_new_units(guards, context, plan, protection.growth.directions, protection.growth.strength)
            fit_to_task(context, plan)
        weigh_new_units(state.factors, context, surrogate=True)
        return guard(replace(state, anchor=extend_anchor(state.anchor, context, boundary)), context)

    def plan(state: ProtectionState, context: Context) -> tuple[Plan | None, ProtectionState]:
        return protection.growth.plan(context, state.base), state

    def after_step(state: ProtectionState, context: Context, step: Step) -> ProtectionState:
        state = replace(state, steps=state.steps + 1, lr=step.lr)
        if state.guards and state.steps % protection.every == 0:
            apply(state, context)
        return state

    def boundary(state: ProtectionState, context: Context, boundary: Boundary) -> ProtectionState:
        set_train_mode(state, context, boundary)
        match boundary.event:
            case Event.TASK_START if not context.number:
                return replace(state, base=context.axes.sizes())
            case Event.PLAN_APPLIED if boundary.plan and state.factors:
                return widen(state, context, boundary, boundary.plan)
            case Event.TASK_START | Event.RESUME if context.number:
                return guard(state, context)
            case Event.EPOCH_END:
                apply(state, context)
                settle_guards(state.guards, context.model)
            case Event.TASK_END:
                factors = protection.add_factors(state.factors, context)
                return replace(state, factors=factors, anchor=copy_parameters(context), guards={})
        return state

    return Learner(ProtectionState(), after_step=after_step, plan=plan, boundary=boundary, classes_only=True)
