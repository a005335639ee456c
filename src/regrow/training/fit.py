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
from torch import nn

from regrow.core.axes import AxisGraph
from regrow.core.plan import Plan
from regrow.core.progress import Log, Progress, discard, silent
from regrow.distributed.parallel import ALONE, Parallel, broadcast_record, broadcast_tensors
from regrow.surgery import UndoStore
from regrow.training.learner import Boundary, Context, Event, Learner, Stream, write_replacements
from regrow.training.schedule import Optimizers, Phase, Schedule
from regrow.training.state import TrainState, axis_tensors
from regrow.training.step import apply_plan, compute_gradients, hold_interrupts

S = TypeVar("S")

# (learner's state, context, number of the step in its epoch) → a context manager inside which the step is taken.
Around = Callable[[Any, Context, int], AbstractContextManager[None]]


class Observer(Generic[S]):
    """The measurements around changes of shape and at the end of tasks; this one takes none. A row: column → value."""

    def before_plan(self, state: S, context: Context) -> Any:
        """Return a measurement of the network, right before a plan is applied; :meth:`after_plan` gets it."""

    def after_plan(self, state: S, context: Context, plan: Plan, before: Any) -> dict[str, Any]:
        """Return the row that records a change of shape; ``before`` is what :meth:`before_plan` returned."""
        return {}

    def task_end(self, state: S, context: Context) -> tuple[tuple[float, ...], dict[str, Any]]:
        """Return (accuracy on every task, the row that records the task) after training on it."""
        return (), {}


@dataclass(frozen=True)
class FitOptions(Generic[S]):
    """Options of :func:`fit` that are no part of the method: checkpoints, measurements, progress, processes.

    Args:
        undo: The store of what plans removed from the network, for learners that restore units.
        checkpoint: Called after each epoch and each task with a state that can be resumed from.
        seconds: ``checkpoint`` is also called within an epoch whenever this many seconds have passed since the last
            call, and when Ctrl-C ends the epoch; for phases that are not ``seeded``, and learners whose ``boundary``
            hook does the same when an epoch starts again. ``None``: only after epochs.
        observer: The measurements around changes of shape and at the end of tasks.
        around: (learner's state, context, step) → a context manager inside which the step is taken.
        log: Receives the rows that the learner logs.
        progress: Called with (steps done, steps in all, what is being done).
        parallel: The processes that train together; all of them call :func:`fit`, and ``checkpoint`` at once.
    """

    undo: UndoStore | None = None
    checkpoint: Callable[[TrainState[S], Context], None] | None = None
    seconds: float | None = None
    observer: Observer[S] = field(default_factory=Observer)
    around: Around = lambda state, context, step: nullcontext()
    log: Log = discard
    progress: Progress = silent
    parallel: Parallel = ALONE


@dataclass(frozen=True)
class Fitted(Generic[S]):
    """The result of training: the network, which was changed in place, its axes and the training state."""

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
    options: FitOptions[S] | None = None,
) -> Fitted[S]:
    """Train a network on one task after the other; between epochs the learner's plans may change its shape.

    Returns the network, its new axes and the state after the last phase, to resume or to evaluate.

    Args:
        model: The network; trained, and perhaps changed in shape, in place.
        axes: The network's present axes.
        phases: All tasks with their batches; those that ``state`` counts as finished are skipped.
        learner: The method: what differs from plain training.
        schedule: Optimizer, learning rates and precision.
        state: The state from which an interrupted call resumes; ``None``: from the start.
        options: Checkpoints, measurements, progress and processes.

    Raises:
        ValueError: If the loss is not finite.
    """
    options, state = options or FitOptions(), state or TrainState(learner.state)
    if learner.restores and options.undo is None:
        options = replace(options, undo=UndoStore())
    while state.number < len(phases):
        phase, log = phases[state.number], _TaskLog(options.log)
        steps = phase.epochs[0] if phase.epochs else 0
        past = tuple(earlier.task for earlier in phases[: state.number])
        context = Context(model, axes, phase.task, state.number, state.epoch, len(phase.epochs), steps, phase.classes)
        context = replace(context, seed=schedule.seed, past=past, undo=options.undo, log=log, objective=phase.objective)
        context = replace(context, make_optimizer=schedule.make_optimizer)
        training = _TaskTraining(phases, learner, schedule, options, state, context, log)
        training.run()
        model, axes, state = training.context.model, training.context.axes, training.state
    return Fitted(model, axes, state)


@dataclass
class _TaskLog:
    """Routes a learner's rows by kind: ``task`` to the task's row, ``status`` to the progress, others to ``log``."""

    log: Log
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)  # kind, "task" or "status" → its columns so far

    def __call__(self, kind: str, /, **row: Any) -> None:
        """Record a row of a kind, column → value."""
        if kind in ("task", "status"):
            self.notes[kind] = self.notes.get(kind, {}) | row
        else:
            self.log(kind, **row)


@dataclass
class _TaskTraining(Generic[S]):
    """The training of one task: :meth:`run` leaves the network, its axes and the state in the fields."""

    phases: Sequence[Phase]
    learner: Learner[S]
    schedule: Schedule
    options: FitOptions[S]
    state: TrainState[S]
    context: Context
    log: _TaskLog
    last_write: float = 0.0  # when the epoch began or a checkpoint was written, in seconds of the monotonic clock

    def __post_init__(self) -> None:
        self.phase, self.optimizers = self.phases[self.state.number], Optimizers(self.schedule, self.learner)
        self.context = replace(self.context, clear_moments=self.optimizers.network.state.clear)

    def run(self) -> None:
        """Train on the remaining epochs of the task; set ``state`` and ``context`` to those after it."""
        start = Event.RESUME if self.state.epoch or self.state.step else Event.TASK_START
        self.state = replace(self.state, learner=self._call_boundary(start))
        tensors = axis_tensors(self.state.learner)
        self.optimizers.register(self.context.parameters(), tensors)
        self.optimizers.restore(self.context.parameters(), tensors, self.state.moments)
        for epoch in range(self.state.epoch, len(self.phase.epochs)):
            self.context = replace(self.context, epoch=epoch, steps=self.phase.epochs[epoch])
            if not self.state.step:
                self._apply_plans()
            self._run_epoch()
            if self.options.checkpoint and self.state.epoch < len(self.phase.epochs):
                self.options.checkpoint(self.state, self.context)
        learned = self._call_boundary(Event.TASK_END)
        row, sizes = self.options.observer.task_end(learned, self.context)
        rows = (*self.state.rows, row)
        all_sizes = (*self.state.sizes, sizes | self.log.notes.get("task", {}))
        state = replace(self.state, learner=learned, number=self.state.number + 1, epoch=0, moments={})
        self.state = replace(state, rows=rows, sizes=all_sizes)
        if self.options.checkpoint:
            self.options.checkpoint(self.state, self.context)

    def _call_boundary(self, event: Event) -> S:
        """Call the learner's ``boundary`` hook for an event, and return the learner's new state."""
        return self.learner.boundary(self.state.learner, self.context, Boundary(event))

    def _apply_plans(self) -> None:
        """Apply the learner's plans before an epoch, until it has none, and record each; update context and state."""
        observer = self.options.observer
        while True:
            plan, learned = self.learner.plan(self.state.learner, self.context)
            self.state = replace(self.state, learner=learned)
            self.options.parallel.check_same("changes of shape", plan and plan.to_json())
            if plan is None:
                break
            measured = observer.before_plan(learned, self.context)
            self.context, learned = apply_plan(self.learner, learned, self.context, plan, self.optimizers)
            row = observer.after_plan(learned, self.context, plan, measured)
            event = {"task": self.context.number, "epoch": self.context.epoch, **row}
            plans, events = (*self.state.plans, plan), (*self.state.events, event)
            self.state = replace(self.state, learner=learned, plans=plans, events=events)
        self.optimizers.register(self.context.parameters(), axis_tensors(self.state.learner))
        self.context = replace(self.context, plans_applied=0)

    def _run_epoch(self) -> None:
        """Take the remaining steps of an epoch, and set ``state`` to that after it."""
        self.last_write = time.monotonic()
        try:
            self._take_steps()
            learned = self._call_boundary(Event.EPOCH_END)
            self._check_ranks(learned)
        except KeyboardInterrupt:
            if self.options.seconds is not None:
                self._write_checkpoint()
            raise
        moments = self.optimizers.moments(self.context.parameters(), axis_tensors(learned))
        self.state = replace(self.state, learner=learned, epoch=self.context.epoch + 1, step=0, moments=moments)

    def _take_steps(self) -> None:
        """Take the remaining steps of an epoch; ``state`` follows each, so that Ctrl-C finds that of the last one."""
        context, options, state, clip = self.context, self.options, self.state, self.schedule.clip
        if self.phase.seeded:
            torch.manual_seed(context.generator(context.epoch, Stream.STEPS).initial_seed() % 2**63)
        state = replace(state, learner=self._call_boundary(Event.EPOCH_START))
        done, total = sum(self.phase.epochs[: context.epoch]), sum(self.phase.epochs)
        for i, (batches, second) in islice(enumerate(self.phase.batches(context)), state.step, None):
            factor = self.schedule.lr_factor(done + i, total)
            if self.schedule.decay != "constant" or self.schedule.warm_up:
                self.optimizers.set_rates(factor)
            with options.around(state.learner, context, i):
                self.optimizers.clear_gradients()
                step, loss = compute_gradients(
                    self.learner, state.learner, context, i, batches, second, self.schedule.precision, options.parallel
                )
                step = replace(step, lr=factor * self.optimizers.largest_lr)
                learned = self.learner.project(state.learner, context, step)
                if clip:
                    nn.utils.clip_grad_norm_([p for p in context.parameters().values() if p.requires_grad], clip)
                with hold_interrupts():
                    self.optimizers.step()
                    learned = self.learner.after_step(learned, context, step)
                    self.state = state = replace(state, learner=learned, step=i + 1)
            if options.progress is not silent:
                text = self.log.notes.get("status", {}).get("text", context.task.name)
                steps = state.number * total + done + i + 1
                options.progress(steps, len(self.phases) * total, f"{text}, loss {loss:.3f}")
            is_due = options.seconds is not None and time.monotonic() - self.last_write > options.seconds
            if options.seconds is not None and broadcast_record(options.parallel.ranks, is_due):  # rank 0 decides
                self._write_checkpoint()
        self.state = state

    def _write_checkpoint(self) -> None:
        """Call ``options.checkpoint`` with the state after the last step."""
        self.last_write = time.monotonic()
        moments = self.optimizers.moments(self.context.parameters(), axis_tensors(self.state.learner))
        if self.options.checkpoint:
            self.options.checkpoint(replace(self.state, moments=moments), self.context)

    def _check_ranks(self, state: S) -> None:
        """Set buffers to rank 0's if ranks share examples; ResourceError if parameters or ``state`` differ by rank."""
        parallel = self.options.parallel
        if parallel.by_rows:
            broadcast_tensors(parallel.ranks, [*self.context.model.buffers()])
            tensors = [tensor.values for tensor in axis_tensors(state).values()]
            parallel.check_same("weights", [*self.context.parameters().values(), *tensors])


def finish_training(learner: Learner[S], fitted: Fitted[S], context: Context) -> tuple[Fitted[S], list[Plan]]:
    """Apply the learner's last plans, and write its replacements into the parameters, in place.

    Return the result and the plans that were applied. ``context``: of the last task, after its last epoch. It starts
    with ``Event.RESUME``, since the state may have been read from the checkpoint of the last epoch.
    """
    learned, plans = learner.boundary(fitted.state.learner, context, Boundary(Event.RESUME)), []
    while True:
        plan, learned = learner.plan(learned, context)
        if plan is None:
            break
        context, learned = apply_plan(learner, learned, context, plan)
        plans.append(plan)
    learned = learner.boundary(learned, context, Boundary(Event.FINISH))
    write_replacements(learner, learned, context)
    return Fitted(context.model, context.axes, replace(fitted.state, learner=learned)), plans
