"""The loop over tasks: train, let the learner change the network's shape, evaluate; it learns no learner's name."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import cos, isnan, nan, pi
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regrow.axes import AxisGraph
from regrow.evaluation.continual import Matrix, share_right
from regrow.learner import Learner, Stand
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.surgery import apply
from regrow.surgery.parametrize import parametrize, resize_axis_tensor
from regrow.tasks import Task
from regrow.training import births
from regrow.training.movers import Movers

SCENARIOS = ("domain", "class", "task")
PROBED = 20
"""Of how many tasks at most accuracy is taken before and after a change of shape: a long run would do little else."""

Around = Callable[[Stand, int], AbstractContextManager[None]]
"""(where it stands, number of the step in its epoch) → what the step is taken inside."""


@dataclass(frozen=True)
class Schedule:
    """How every task is learned.

    Args:
        scenario: ``domain``: all classes at any time; ``class``: those seen so far; ``task``: those of the task, which
            is told when it is evaluated.
        epochs: Passes over each task.
        batch_size: Examples per step.
        optimizer: ``sgd`` (momentum 0.9, Nesterov) or ``adamw``.
        lr: Learning rate.
        weight_decay: As the optimiser takes it.
        decay: ``constant``, or ``cosine``: the learning rate falls to 0 over the epochs of each task.
        seed: Of orders, and of everything a learner draws.
        precision: ``float32``, or ``bfloat16``: losses are taken in mixed precision; parameters, moments and what a
            learner remembers stay in float32.
    """

    scenario: str = "domain"
    epochs: int = 5
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.01
    weight_decay: float = 0.0
    seed: int = 0
    decay: str = "constant"
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay is constant or cosine; got {self.decay!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"the precision is float32 or bfloat16; got {self.precision!r}")
        if self.scenario not in SCENARIOS:
            raise ValueError(f"the scenario is one of {', '.join(SCENARIOS)}; got {self.scenario!r}")
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"the optimiser is sgd or adamw; got {self.optimizer!r}")
        if min(self.epochs, self.batch_size) < 1 or self.lr <= 0:
            raise ValueError("epochs and batch size are at least 1, and the learning rate is above 0")

    def rate(self, done: float) -> float:
        """The learning rate of the network's parameters when a share of a task's steps is done."""
        return self.lr if self.decay == "constant" else self.lr * (1 + cos(pi * done)) / 2


@dataclass
class Course:
    """How far a sequence has got, and everything that was measured.

    Args:
        number: Tasks that are over.
        epoch: Epochs of the next one that are over.
        rows: The accuracy matrix so far.
        before: Accuracy on every task before any was learned.
        plans: Every plan that was carried out, in order.
        events: One record per change of shape.
        sizes: One record per task that is over.
        moments: What the optimiser remembers: name → what → tensor.
        loss: The smoothed training loss of the task that is being learned.
    """

    number: int = 0
    epoch: int = 0
    rows: list[tuple[float, ...]] = field(default_factory=list)
    before: tuple[float, ...] = ()
    plans: list[Plan] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[dict[str, Any]] = field(default_factory=list)
    moments: dict[str, dict[str, Any]] = field(default_factory=dict)
    loss: float | None = None

    @property
    def matrix(self) -> Matrix:
        """The accuracy matrix."""
        return Matrix(tuple(self.rows), self.before)


def learn(
    model: nn.Module,
    axes: AxisGraph,
    tasks: Sequence[Task],
    learner: Learner,
    schedule: Schedule,
    *,
    course: Course | None = None,
    on_epoch: Callable[[Course, AxisGraph], None] | None = None,
    around: Around = lambda at, number: nullcontext(),
    progress: Progress = silent,
) -> tuple[AxisGraph, Course]:
    """Learn tasks one after the other.

    Args:
        model: The network; trained, and perhaps widened, in place.
        axes: Its axes as they are now.
        tasks: All tasks; those that the course says are over are only evaluated.
        learner: What the method adds; it goes along.
        schedule: How each task is learned.
        course: Where an earlier, interrupted call stood.
        on_epoch: Called after each epoch and each task with where it stands, so that it can be stored.
        around: Asked before each step; what it changes in the network holds from that step on.
        progress: Called with (steps done, steps in all, what).

    Returns:
        The network's axes, and what was measured.

    Raises:
        ValueError: If the loss is no longer finite.
    """
    course = course or Course()
    if not course.before:
        course.before = accuracies(model, tasks, Learner(), schedule, 0)
    while course.number < len(tasks):
        at = Stand(model, axes, tasks[course.number], course.number, course.epoch, schedule.epochs, seed=schedule.seed)
        at.past = tuple(tasks[: at.number])
        at.classes = _choice(schedule, tasks, at.number, at.number)
        axes = _learn_task(at, tasks, learner, schedule, course, on_epoch, around, progress)
    return axes, course


def _learn_task(
    at: Stand,
    tasks: Sequence[Task],
    learner: Learner,
    schedule: Schedule,
    course: Course,
    on_epoch: Callable[[Course, AxisGraph], None] | None,
    around: Around,
    progress: Progress,
) -> AxisGraph:
    start = time.perf_counter()
    examples = learner.examples(at)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=schedule.precision == "bfloat16")
    at.steps = steps = -(-len(examples) // schedule.batch_size)
    if at.epoch == 0:
        learner.begin(at)
    movers = Movers(at, learner, schedule.optimizer, schedule.lr, schedule.weight_decay)
    movers.recall(at, learner, course.moments)
    for at.epoch in range(course.epoch, schedule.epochs):
        young: dict[str, Tensor] = {}
        for plan in learner.plans(at):
            young = _change(at, tasks, learner, schedule, course, plan, movers)
        movers.join(at, learner)  # what a learner begins anew without a plan learns too
        torch.manual_seed(at.drawn(at.epoch, 1).initial_seed() % 2**63)  # what Dropout draws
        learner.mode(at)
        order = at.drawn(at.epoch).initial_seed()
        for i, batch in enumerate(examples.batches(schedule.batch_size, seed=order)):
            if schedule.decay == "cosine":
                movers.rate(schedule.rate((at.epoch * steps + i) / (schedule.epochs * steps)))
            with around(at, i):
                movers.clear()
                with parametrize(at.model, learner.standing(at)):
                    with precision:
                        loss = learner.loss(at, batch)
                    loss.backward()
                if young:
                    course.events[-1] |= births.shares(at, young)
                    young = {}
                learner.gate(at)
                movers.step()
                learner.stepped(at)
            course.loss = births.smoothed(course.loss, loss.item())
            births.watched(course.events, at.number, course.loss)
            done = (at.number * schedule.epochs + at.epoch) * steps + i + 1
            progress(done, len(tasks) * schedule.epochs * steps, learner.told(at))
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} in {at.task.name}, epoch {at.epoch + 1}: take a smaller --lr")
        learner.passed(at)
        course.epoch, course.moments = at.epoch + 1, movers.moments(at, learner)
        if on_epoch and course.epoch < schedule.epochs:
            on_epoch(course, at.axes)
    learner.end(at)
    course.rows.append(accuracies(at.model, tasks, learner, schedule, at.number))
    course.sizes.append(
        _sizes(at, learner) | dict(learner.account(at)) | {"seconds": round(time.perf_counter() - start, 2)}
    )
    course.number, course.epoch, course.moments, course.loss = at.number + 1, 0, {}, None
    if on_epoch:
        on_epoch(course, at.axes)
    return at.axes


def _change(
    at: Stand,
    tasks: Sequence[Task],
    learner: Learner,
    schedule: Schedule,
    course: Course,
    plan: Plan,
    movers: Movers,
) -> dict[str, Tensor]:
    """Carry out a plan between two steps; optimisers and learner follow. Accuracy is taken on both sides.

    Returns:
        Name of a parameter → which of its entries are new; nothing if none are.
    """
    probe, asked = next(at.task.test.batches(256)), probed(at.number)
    before, logits = _past(at, tasks, learner, schedule, asked), _answers(at, learner, probe.inputs)
    old, there = at.axes, births.entries(at)
    changed(at, learner, plan, movers)
    after, moved = _past(at, tasks, learner, schedule, asked), _answers(at, learner, probe.inputs)
    course.plans.append(plan)
    course.events.append(
        {
            "task": at.number,
            "epoch": at.epoch,
            "grown": {key: change.grow for key, change in plan.changes.items() if change.grow},
            "cut": {key: n for key, change in plan.changes.items() if (n := change.size - len(change.keep))},
            "dropped": list(plan.drop),
            "back": list(plan.back),
            "restored": {key: n for key, change in plan.changes.items() if (n := len(change.restore))},
            "stood": bool(plan.origin.get("stood")),
            **({"asked": asked} if len(asked) <= at.number else {}),
            "accuracy_before": before,
            "accuracy_after": after,
            "shock": fmean(a - b for a, b in zip(before, after, strict=True) if not isnan(a)),
            "logits_moved": float((moved - logits).abs().max()),
            "parameters": sum(p.numel() for p in at.model.parameters()),
            **births.begun(course.loss),
        }
    )
    return births.young(there, old, plan) if course.events[-1]["grown"] else {}


def changed(at: Stand, learner: Learner, plan: Plan, movers: Movers | None = None) -> None:
    """Carry out a plan; what the learner remembers follows, and what moves it and the network.

    Args:
        at: Where the network stands; it stands otherwise then.
        learner: Whose plan it is.
        plan: The plan.
        movers: What moves the network and the learner's own tensors; ``None``: nothing does.
    """
    held = {name: one.values for name, one in learner.tensors.items() if one.lr is not None}
    old = at.axes
    # Of what comes back no optimiser knows a group yet.
    following = [movers.network] if movers and not plan.back else []
    at.model, at.axes = apply(at.model, at.axes, plan, optimizers=following, undo=learner.undo)
    learner.tensors = {name: resize_axis_tensor(one, old, plan) for name, one in learner.tensors.items()}
    for name, value in held.items():
        learner.tensors[name].values.requires_grad_()
        if movers:
            movers.exchange(value, learner.tensors[name], old, plan)
    learner.grown(at, plan)
    if movers:
        movers.join(at, learner)


def _choice(schedule: Schedule, tasks: Sequence[Task], after: int, asked: int) -> Tensor | None:
    """The classes to choose among when task ``asked`` is answered after task ``after``."""
    match schedule.scenario:
        case "domain":
            return None
        case "class":
            seen = {c for task in tasks[: max(after, asked) + 1] for c in task.classes}
        case _:
            seen = set(tasks[asked].classes)
    every = 1 + max(c for task in tasks for c in task.classes)
    return torch.tensor([c in seen for c in range(every)])


def accuracies(
    model: nn.Module, tasks: Sequence[Task], learner: Learner, schedule: Schedule, after: int
) -> tuple[float, ...]:
    """A row of the accuracy matrix: the test examples of every task, answered as after task ``after``."""
    at = Stand(model, _NO_AXES, tasks[after], after)
    found = []
    for number, task in enumerate(tasks):
        with parametrize(model, learner.answering(at, number)):
            choice = _choice(schedule, tasks, after, number)
            found.append(nan if task.gone else share_right(model, task.test, choice, ask=partial(learner.asked, at)))
    return tuple(found)


_NO_AXES = AxisGraph({}, {}, frozenset())


def probed(number: int) -> list[int]:
    """Of which tasks so far accuracy is taken when the network's shape changes: all, or some evenly apart.

    >>> probed(2), len(probed(500)), probed(500)[:3], probed(500)[-1]
    ([0, 1, 2], 20, [0, 26, 53], 500)
    """
    return (
        sorted({round(i * number / (PROBED - 1)) for i in range(PROBED)}) if number >= PROBED else [*range(number + 1)]
    )


def _past(at: Stand, tasks: Sequence[Task], learner: Learner, schedule: Schedule, asked: Sequence[int]) -> list[float]:
    """Accuracy on tasks so far, in the middle of one."""

    def ask(inputs: Tensor) -> Tensor:
        return learner.asked(at, inputs)

    with torch.no_grad(), parametrize(at.model, learner.standing(at)):
        return [
            nan
            if tasks[i].gone
            else share_right(at.model, tasks[i].test, _choice(schedule, tasks, at.number, i), ask=ask)
            for i in asked
        ]


def _answers(at: Stand, learner: Learner, inputs: Tensor) -> Tensor:
    was = at.model.training
    at.model.eval()
    try:
        with torch.no_grad(), parametrize(at.model, learner.standing(at)):
            return learner.asked(at, inputs).nan_to_num(neginf=0.0)
    finally:
        at.model.train(was)


def _sizes(at: Stand, learner: Learner) -> dict[str, Any]:
    parameters, was = at.parameters(), at.model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        at.model.eval()(at.task.train.inputs[:1])
    at.model.train(was)
    held = [one.values for one in learner.tensors.values()]
    return {
        "task": at.number,
        "parameters": sum(p.numel() for p in parameters.values()),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters.values()),
        "macs": counter.get_total_flops() // 2,  # of one example
        # Bytes of masks, memories and factors; a mask takes a bit per entry.
        "remembered": sum(-(-x.numel() // 8) if x.dtype == torch.bool else x.numel() * x.itemsize for x in held),
        "widths": {axis.key: axis.size for axis in at.axes.units()},
    }
