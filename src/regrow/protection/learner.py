"""A learner that guards what earlier tasks learned: how its factors, anchor and guards follow the tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import inf

import torch

from regrow.core.axes.axis import AxisTensor
from regrow.core.plan import Plan
from regrow.protection.drift import LossWatch, with_recent_examples
from regrow.protection.factors import Factors
from regrow.protection.growth import (
    IMPORTANCE,
    NO_GROWTH,
    ORIGIN,
    Growth,
    direct_new_units,
    extend_anchor,
    fit_to_task,
    weigh_new_units,
)
from regrow.protection.guards import Guards, apply_guards, build_guards, settle_guards
from regrow.protection.low_rank import compress_factors, expand_factors
from regrow.training.hooks import add_to_replay_memory, copy_parameters, name_inputs
from regrow.training.learner import Boundary, Context, Event, Learner, Step, set_train_mode
from regrow.training.state import derived


@dataclass(frozen=True)
class Protection:
    """How earlier tasks are protected.

    Args:
        shrink: The sum of the rates of some steps → arguments of :func:`regrow.protection.guards.apply_guards`.
        add_factors: (factors, context) → the factors with those of the present task.
        damping: As of :func:`regrow.protection.guards.build_guards`.
        limit: The most bytes of factors, in multiples of the parameters'; beyond them their leading eigenvectors are
            kept (:func:`regrow.protection.low_rank.compress_factors`).
        every: Guards are applied to the joint change of this many steps.
        growth: When the network is widened, and how.
        recent: 0: the boundaries of tasks are known. Otherwise they are detected where the loss jumps, and factors are
            measured on so many examples that are kept since the last one.
    """

    shrink: Callable[[float], Mapping[str, float]]
    add_factors: Callable[[Factors, Context], Factors]
    damping: float = 0.0
    limit: float = inf
    every: int = 1
    growth: Growth = NO_GROWTH
    recent: int = 0


@dataclass(frozen=True)
class ProtectionState:
    """What a learner with guards carries from task to task; empty before the end of the first task."""

    factors: Factors = field(default_factory=dict)
    anchor: Mapping[str, AxisTensor] = field(default_factory=dict)  # parameters at the end of the last task, by name
    base: dict[str, int] = field(default_factory=dict)  # the initial size of every axis
    steps: int = 0  # of training, so far
    unguarded: int = 0  # steps since guards were last applied
    lr: float = 0.0  # of the last step
    tasks: int = 0  # whose factors are added
    # Where boundaries are detected: the loss, examples and parameters from before it jumped, and how many were offered
    watch: LossWatch = field(default_factory=LossWatch)
    rows: Mapping[str, AxisTensor] = field(default_factory=dict)
    calm: Mapping[str, AxisTensor] = field(default_factory=dict)
    seen: int = 0
    guards: Guards = derived(dict)


def build_learner(protection: Protection) -> Learner[ProtectionState]:
    """Return the learner that trains on the loss of each task, and applies its guards between steps."""

    def apply(state: ProtectionState, context: Context) -> ProtectionState:
        if state.unguarded:
            apply_guards(state.guards, context.model, **protection.shrink(state.lr * state.unguarded))
        return replace(state, unguarded=0)

    def guard(state: ProtectionState, context: Context) -> ProtectionState:
        context = replace(context, number=state.tasks)
        factors = expand_factors(state.factors)
        return replace(state, guards=build_guards(factors, context, state.anchor, protection.damping))

    def keep(factors: Factors, context: Context) -> Factors:
        size = sum(parameter.nbytes for parameter in context.model.parameters())
        return compress_factors(factors, protection.limit * size)

    def consolidate(state: ProtectionState, context: Context, anchor: Mapping[str, AxisTensor]) -> ProtectionState:
        factors = keep(protection.add_factors(expand_factors(state.factors), context), context)
        return replace(state, factors=factors, anchor=anchor, tasks=state.tasks + 1, guards={})

    def look(state: ProtectionState, context: Context, step: Step) -> ProtectionState:
        watch = state.watch.see(float(context.objective.loss(step.aux, step.batch.labels).detach()))
        if watch.detected:
            context.clear_moments()  # the steps since the jump were not guarded
            with torch.no_grad():
                for name, tensor in state.calm.items():
                    context.model.get_parameter(name).copy_(tensor.values)
            state = consolidate(state, with_recent_examples(context, state.rows, state.seen), state.calm)
            return guard(replace(state, watch=LossWatch(), rows={}, seen=0, unguarded=0), context)
        if watch.jumps:
            return replace(state, watch=watch)
        rows = {**name_inputs(step.batch.inputs), "labels": step.batch.labels}
        rows = add_to_replay_memory(state.rows, state.seen, context, protection.recent, rows)
        just_guarded = state.unguarded == 0
        calm = copy_parameters(context) if just_guarded or not state.calm else state.calm
        return replace(state, watch=watch, rows=rows, calm=calm, seen=state.seen + len(step.batch))

    def widen(state: ProtectionState, context: Context, boundary: Boundary, plan: Plan) -> ProtectionState:
        counted, factors = replace(context, number=state.tasks), expand_factors(state.factors)
        if plan.origin == ORIGIN:
            direct_new_units(factors, counted, plan, protection.growth.directions, protection.growth.strength)
            fit_to_task(context, plan)
        weigh_new_units(factors, counted, importance=IMPORTANCE, surrogate=True)
        anchor = extend_anchor(state.anchor, context, boundary)
        return guard(replace(state, factors=keep(factors, context), anchor=anchor), context)

    def plan(state: ProtectionState, context: Context) -> tuple[Plan | None, ProtectionState]:
        return protection.growth.plan(context, state.base), state

    def after_step(state: ProtectionState, context: Context, step: Step) -> ProtectionState:
        state = replace(state, steps=state.steps + 1, unguarded=state.unguarded + 1, lr=step.lr)
        if state.unguarded == protection.every:
            state = apply(state, context)
        return look(state, context, step) if protection.recent else state

    def boundary(state: ProtectionState, context: Context, boundary: Boundary) -> ProtectionState:
        set_train_mode(state, context, boundary)
        match boundary.event:
            case Event.TASK_START if not context.number:
                return replace(state, base=context.axes.sizes())
            case Event.PLAN_APPLIED if boundary.plan and state.factors:
                return widen(state, context, boundary, boundary.plan)
            case Event.TASK_START if protection.growth.plan(context, state.base):
                return state  # the widened network is guarded
            case Event.TASK_START | Event.RESUME:
                return guard(state, context)
            case Event.EPOCH_END:
                state = apply(state, context)
                settle_guards(state.guards, context.model)
            case Event.TASK_END if not protection.recent:
                return consolidate(state, context, copy_parameters(context))
        return state

    return Learner(ProtectionState(), after_step=after_step, plan=plan, boundary=boundary, classes_only=True, lr=0.05)
