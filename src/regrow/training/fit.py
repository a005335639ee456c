"""The training loop: forward, loss, backward, step; between epochs the network may change its shape.

It knows no method: a :class:`regrow.training.learner.Learner` says what differs from plain training.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.distributed.parallel import ALONE, Parallel, broadcast_tensors
from regrow.surgery import UndoStore
from regrow.training.learner import Boundary, Context, Event, Learner, write_replacements
from regrow.training.schedule import Optimizers, Phase, Schedule
from regrow.training.state import TrainState, axis_tensors
from regrow.training.step import (
    Deferral,
    added_entries,
    apply_plan,
    compute_gradients,
    defer_interrupts,
    gradient_shares,
    smooth,
    start_watch,
    watch,
)

S = TypeVar("S")

Around = Callable[[Any, Context, int], AbstractContextManager[None]]
"""(learner's state, context, number of the step in its epoch) → a context manager inside which the step is taken."""


@dataclass(frozen=True)
class Observer(Generic[S]):
    """The measurements that the loop takes around changes of shape and at the end of tasks.

    Args:
        before_plan: (state, context) → a measurement, right before a plan is applied.
        after_plan: (state, context, plan, result of ``before_plan``) → the row that records the change.
        task_end: (state, context) → the accuracy on every task, and the row that records the task.
    """

    before_plan: Callable[[S, Context], Any] = lambda state, context: None
    after_plan: Callable[[S, Context, Plan, Any], dict[str, Any]] = lambda state, context, plan, before: {}
    task_end: Callable[[S, Context], tuple[tuple[float, ...], dict[str, Any]]] = lambda state, context: ((), {})


@dataclass(frozen=True)
class Fitted(Generic[S]):
    """The result of training: the network, its axes and the training state.

    Args:
        model: The trained network: the one that was given, changed in place.
        axes: The axes of the trained network.
        state: The measurements, and the learner's last state.
    """

    model: nn.Module
    axes: AxisGraph
    state: TrainState[S]


def fit(
    model: nn.Module,
    axes: AxisGraph,
    phases: Sequence[Phase],
    learner: Learner[S],
    schedule: Schedule,
    *,
    state: TrainState[S] | None = None,
    undo: UndoStore | None = None,
    checkpoint: Callable[[TrainState[S], Context], None] | None = None,
    seconds: float | None = None,
    observe: Observer[S] | None = None,
    around: Around = lambda state, context, step: nullcontext(),
    log: Callable[..., None] = lambda kind, **row: None,
    progress: Progress = silent,
    parallel: Parallel = ALONE,
) -> Fitted[S]:
    """Train a network on one task after the other; between epochs the learner's plans may change its shape.

    Args:
        model: The network; trained, and perhaps changed in shape, in place.
        axes: The network's present axes.
        phases: All tasks with their batches; those that ``state`` counts as finished are skipped.
        learner: The method: what differs from plain training.
        schedule: Optimizer, learning rates and precision.
        state: The state from which an interrupted call resumes; ``None``: from the start.
        undo: The store of what plans removed from the network, for learners that restore units.
        checkpoint: Called after each epoch and each task with a state that can be resumed from.
        seconds: ``checkpoint`` is also called within an epoch whenever this many seconds have passed since the last
            call, and when Ctrl-C ends the epoch; for phases that are not ``seeded``, and learners whose ``boundary``
            hook does the same when an epoch starts again. ``None``: only after epochs.
        observe: The measurements around changes of shape and at the end of tasks.
        around: (learner's state, context, step) → a context manager inside which the step is taken.
        log: Receives the rows that the learner logs.
        progress: Called with (steps done, steps in all, what is being done).
        parallel: The processes that train together; all of them call this function, and ``checkpoint`` at once.

    Raises:
        ValueError: If the loss is not finite.
    """
    state = state or TrainState(learner.state)
    run = _Run(phases, learner, schedule, checkpoint, seconds, observe or Observer(), around, progress, log, parallel)
    undo = undo if undo is not None else (UndoStore() if learner.restores else None)
    while state.number < len(phases):
        context, state = _fit_task(run, run.context(model, axes, state, undo), state)
        model, axes = context.model, context.axes
    return Fitted(model, axes, state)


@dataclass(frozen=True)
class _Run(Generic[S]):
    """The arguments of :func:`fit` that do not change."""

    phases: Sequence[Phase]
    learner: Learner[S]
    schedule: Schedule
    checkpoint: Callable[[TrainState[S], Context], None] | None
    seconds: float | None
    observe: Observer[S]
    around: Around
    progress: Progress
    sink: Callable[..., None]
    parallel: Parallel
    notes: dict[str, Any] = field(default_factory=dict)
    """What the learner logged of the current task, and the text shown beside the progress."""

    def log(self, kind: str, /, **row: Any) -> None:
        """Route a row that the learner logs: to the task's row, to the progress text, or to ``log``."""
        if kind in ("task", "status"):
            self.notes[kind] = {**self.notes.get(kind, {}), **row}
        else:
            self.sink(kind, **row)

    def context(self, model: nn.Module, axes: AxisGraph, state: TrainState[S], undo: UndoStore | None) -> Context:
        phase = self.phases[state.number]
        return Context(
            model,
            axes,
            phase.task,
            state.number,
            state.epoch,
            len(phase.epochs),
            phase.epochs[0] if phase.epochs else 0,
            phase.classes,
            self.schedule.seed,
            tuple(past.task for past in self.phases[: state.number]),
            undo=undo,
            log=self.log,
            objective=phase.objective,
        )


@dataclass
class _Latest(Generic[S]):
    """The state after the last step."""

    run: _Run[S]
    context: Context
    optimizers: Optimizers
    state: TrainState[S]
    written: float = field(default_factory=time.monotonic)

    def write(self) -> None:
        """Call ``checkpoint`` with the state after the last step."""
        self.written = time.monotonic()
        moments = self.optimizers.moments(self.context.parameters(), axis_tensors(self.state.learner))
        if self.run.checkpoint:
            self.run.checkpoint(replace(self.state, moments=moments), self.context)


def _fit_task(run: _Run[S], context: Context, state: TrainState[S]) -> tuple[Context, TrainState[S]]:
    """Train on one task."""
    learner, phase = run.learner, run.phases[state.number]
    run.notes.clear()
    start = Event.RESUME if state.epoch or state.step else Event.TASK_START
    state = replace(state, learner=learner.boundary(state.learner, context, Boundary(start)))
    optimizers = Optimizers(run.schedule.optimizer, learner.optimizer, scheduled=learner.scheduled)
    optimizers.collect(context.parameters(), axis_tensors(state.learner))
    optimizers.restore(context.parameters(), axis_tensors(state.learner), state.moments)
    for epoch in range(state.epoch, len(phase.epochs)):
        if phase.is_over(state.validation):
            break
        context = replace(context, epoch=epoch, steps=phase.epochs[epoch])
        new: dict[str, Tensor] = {}
        if not state.step:
            context, state, new = _apply_plans(run, context, state, optimizers)
        latest = _Latest(run, context, optimizers, state)
        try:
            with defer_interrupts() as deferral:
                _fit_epoch(latest, new, deferral)
            own = learner.boundary(latest.state.learner, context, Boundary(Event.EPOCH_END))
            _check_ranks(run, context, own)
        except KeyboardInterrupt:
            if run.seconds is not None and not run.parallel.fsdp:  # other ranks have stopped anywhere
                latest.write()
            raise
        moments = optimizers.moments(context.parameters(), axis_tensors(own))
        state = replace(latest.state, learner=own, epoch=epoch + 1, step=0, moments=moments)
        if phase.validate:
            state = replace(state, validation=(*state.validation, phase.validate(own, context)))
        if run.checkpoint and state.epoch < len(phase.epochs):
            run.checkpoint(state, context)
    own = learner.boundary(state.learner, context, Boundary(Event.TASK_END))
    row, sizes = run.observe.task_end(own, context)
    state = replace(
        state,
        learner=own,
        number=state.number + 1,
        epoch=0,
        rows=(*state.rows, row),
        sizes=(*state.sizes, sizes | run.notes.get("task", {})),
        moments={},
        loss=None,
        validation=(),
    )
    if run.checkpoint:
        run.checkpoint(state, context)
    return context, state


def _apply_plans(
    run: _Run[S], context: Context, state: TrainState[S], optimizers: Optimizers
) -> tuple[Context, TrainState[S], dict[str, Tensor]]:
    """Apply the learner's plans between two epochs; also return the entries that the last one has added."""
    new: dict[str, Tensor] = {}
    while True:
        plan, own = run.learner.plan(state.learner, context)
        state = replace(state, learner=own)
        run.parallel.check_same("changes of shape", plan and plan.to_json())
        if plan is None:
            break
        measured, axes = run.observe.before_plan(own, context), context.axes
        context, own = apply_plan(run.learner, own, context, plan, optimizers)
        row = run.observe.after_plan(own, context, plan, measured)
        event = {"task": context.number, "epoch": context.epoch, **row, **start_watch(state.loss)}
        state = replace(state, learner=own, plans=(*state.plans, plan), events=(*state.events, event))
        grew = any(change.grow for change in plan.changes.values())
        added = added_entries(context.model, axes, plan) if grew else {}
        new = {name: entries.flatten().nonzero().flatten() for name, entries in added.items()}
    optimizers.collect(context.parameters(), axis_tensors(state.learner))
    return replace(context, applied=0), state, new


def _check_ranks(run: _Run[S], context: Context, state: S) -> None:
    """Give all ranks that share examples the buffers of rank 0; raise ResourceError if other weights differ."""
    if run.parallel.by_rows:
        broadcast_tensors(run.parallel.ranks, [*context.model.buffers()])
        own = [one.values for one in axis_tensors(state).values()]
        run.parallel.check_same("weights", *context.parameters().values(), *own)


def finish(learner: Learner[S], fitted: Fitted[S], context: Context) -> tuple[Fitted[S], list[Plan]]:
    """Apply the plans that a learner makes after the last epoch, and write its replacements into the parameters.

    It starts with ``Event.RESUME``, since the state may have been read from the checkpoint of the last epoch.
    """
    own, plans = learner.boundary(fitted.state.learner, context, Boundary(Event.RESUME)), []
    while True:
        plan, own = learner.plan(own, context)
        if plan is None:
            break
        context, own = apply_plan(learner, own, context, plan)
        plans.append(plan)
    own = learner.boundary(own, context, Boundary(Event.FINISH))
    write_replacements(learner, own, context)
    return Fitted(context.model, context.axes, replace(fitted.state, learner=own)), plans


def _fit_epoch(latest: _Latest[S], new: dict[str, Tensor], deferral: Deferral) -> None:
    """Take the remaining steps of an epoch."""
    run, context, optimizers, state = latest.run, latest.context, latest.optimizers, latest.state
    learner, schedule, phase = run.learner, run.schedule, run.phases[state.number]
    if phase.seeded:
        torch.manual_seed(context.generator(context.epoch, 1).initial_seed() % 2**63)  # Dropout, augmentation
    state = replace(state, learner=learner.boundary(state.learner, context, Boundary(Event.EPOCH_START)))
    done, total = sum(phase.epochs[: context.epoch]), sum(phase.epochs)
    for i, (batches, second) in islice(enumerate(phase.batches(context)), state.step, None):
        if schedule.decay != "constant" or schedule.warm_up:
            optimizers.set_rates(schedule.share(done + i, total))
        with run.around(state.learner, context, i):
            optimizers.clear_gradients()
            step, loss = compute_gradients(
                learner, state.learner, context, i, batches, second, schedule.precision, run.parallel
            )
            if new:
                event = {**state.events[-1], **gradient_shares(context, new)}
                state, new = replace(state, events=(*state.events[:-1], event)), {}
            own = learner.project(state.learner, context, step)
            if schedule.clip:
                nn.utils.clip_grad_norm_([p for p in context.parameters().values() if p.requires_grad], schedule.clip)
            with deferral:
                optimizers.step()
                own, smoothed = learner.after_step(own, context, step), smooth(state.loss, loss)
                events = watch(state.events, state.number, smoothed)
                state = replace(state, learner=own, step=i + 1, loss=smoothed, events=events)
                latest.state = state
        if run.progress is not silent:
            text = run.notes.get("status", {}).get("text", context.task.name)
            run.progress(state.number * total + done + i + 1, len(run.phases) * total, f"{text}, loss {loss:.3f}")
        if run.seconds is not None and run.parallel.decide(time.monotonic() - latest.written > run.seconds):
            latest.write()
    latest.state = state
