"""Continual learning: the training loop over a sequence of tasks, with the accuracy matrix around it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import isnan, nan
from statistics import fmean
from time import perf_counter
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from regrow.core.axes import AxisGraph
from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import CLASSIFICATION, Objective
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.tasks import Examples, ExampleSet, Task, first_examples, run_network
from regrow.data.datasets import fix_order
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import ALONE, Parallel
from regrow.evaluation.continual import Matrix, mean_score
from regrow.settings.constraints import OneOf, Range, check_constraints
from regrow.surgery import UndoStore
from regrow.surgery.gate import parametrize
from regrow.training.fit import Around, Fitted, Observer, fit
from regrow.training.learner import PLAIN, Context, Learner
from regrow.training.schedule import NO_AXES, OptimizerSettings, Phase, Schedule
from regrow.training.shared_rows import sharing_rows
from regrow.training.state import TrainState, axis_tensors

S = TypeVar("S")

SCENARIOS = ("domain", "class", "task")
PROBED = 20
"""The largest number of tasks whose accuracy is measured around a change of shape."""


@dataclass(frozen=True)
class TaskSchedule:
    """How every task of a sequence is trained: scenario, epochs, batches, optimizer and precision.

    Args:
        scenario: The classes among which predictions are made: ``domain``: all; ``class``: those seen so far; ``task``:
            those of the task, whose identity is known at evaluation.
        epochs: Passes over each task.
        batch_size: Examples per step.
        optimizer: ``sgd`` (momentum 0.9, Nesterov) or ``adamw``.
        lr: Learning rate.
        weight_decay: Weight decay of the optimizer.
        seed: Seed of the order of examples, and of everything random in a learner.
        decay: ``constant``, or ``cosine``: the learning rate falls to 0 over the epochs of each task.
        precision: ``float32`` or ``bfloat16``, as in :class:`regrow.training.schedule.Schedule`.
        held_out: The fraction of each task's training examples that is withheld to decide when the task ends.
        patience: After how many epochs without a better score on those the task ends early; 0: never.
        objective: What the network is trained for.
        build_optimizer: (parameter groups) → an optimizer of the user's own, in the place of ``optimizer``.

    Raises:
        ValueError: If a value is out of range.
    """

    scenario: Annotated[str, OneOf(*SCENARIOS)] = "domain"
    epochs: Annotated[int, Range(1)] = 5
    batch_size: Annotated[int, Range(1)] = 64
    optimizer: Annotated[str, OneOf("sgd", "adamw")] = "sgd"
    lr: Annotated[float, Range(0, above=True)] = 0.01
    weight_decay: float = 0.0
    seed: int = 0
    decay: Annotated[str, OneOf("constant", "cosine")] = "constant"
    precision: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    held_out: Annotated[float, Range(0, 1, below=True)] = 0.0
    patience: Annotated[int, Range(0)] = 0
    objective: Objective = CLASSIFICATION
    build_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        check_constraints(self)
        if self.patience and not self.held_out:
            raise ValueError(f"patience {self.patience} needs examples to judge by; give held_out, for example 0.1")

    def training(self) -> Schedule:
        """Return the schedule for the training loop: optimizer, decay, precision and seed."""
        optimizer = OptimizerSettings(self.optimizer, self.lr, self.weight_decay, self.build_optimizer)
        return Schedule(optimizer, self.decay, precision=self.precision, seed=self.seed)


def learn(
    model: nn.Module,
    axes: AxisGraph,
    tasks: Sequence[Task],
    learner: Learner[S],
    schedule: TaskSchedule,
    *,
    state: TrainState[S] | None = None,
    undo: UndoStore | None = None,
    checkpoint: Callable[[TrainState[S], Context], None] | None = None,
    around: Around = lambda state, context, step: nullcontext(),
    log: Callable[..., None] = lambda kind, **row: None,
    progress: Progress = silent,
    parallel: Parallel = ALONE,
) -> Fitted[S]:
    """Train a network on a sequence of tasks, and measure accuracy on all tasks after each one."""
    if learner.classes_only and schedule.objective is not CLASSIFICATION:
        raise ValueError(
            f"this method needs class probabilities, and the objective is {schedule.objective.name}; "
            "take naive, si, packnet or wsn"
        )
    state = state or TrainState(learner.state)
    if not state.before:
        state = replace(state, before=untrained_accuracies(model, tasks, schedule, parallel.ranks))
    phases = [_phase(tasks, number, learner, schedule, parallel.ranks) for number in range(len(tasks))]
    return fit(
        model,
        axes,
        phases,
        learner,
        schedule.training(),
        state=state,
        undo=undo,
        checkpoint=checkpoint,
        observe=_observer(tasks, learner, schedule, parallel.ranks),
        around=around,
        log=log,
        progress=progress,
        parallel=parallel,
    )


def accuracy_matrix(state: TrainState[S]) -> Matrix:
    """Return the accuracy matrix measured so far."""
    return Matrix(state.rows, state.before)


def untrained_accuracies(
    model: nn.Module, tasks: Sequence[Task], schedule: TaskSchedule, ranks: ProcessRank = SINGLE
) -> tuple[float, ...]:
    """Return the accuracy of an untrained network on the test examples of every task."""
    with sharing_rows(model, ranks):
        return accuracies(Context(model, NO_AXES, tasks[0]), tasks, PLAIN, PLAIN.state, schedule)


def accuracies(
    context: Context, tasks: Sequence[Task], learner: Learner[S], state: S, schedule: TaskSchedule
) -> tuple[float, ...]:
    """Return a row of the accuracy matrix: the accuracy on every task after training on task ``context.number``."""
    row = []
    for number in range(len(tasks)):
        there = replace(context, answered=number, classes=None)
        with parametrize(context.model, learner.parametrize(state, there).values):
            row.append(_score(context, tasks, number, schedule))
    return tuple(row)


def _score(context: Context, tasks: Sequence[Task], number: int, schedule: TaskSchedule) -> float:
    """Return the accuracy on a task after training on task ``context.number``; NaN if its examples are gone."""
    if tasks[number].gone:
        return nan
    choice = _choice(schedule, tasks, context.number, number)
    return mean_score(context.model, tasks[number].test, schedule.objective, choice)


def probed_tasks(number: int) -> list[int]:
    """Return the tasks whose accuracy is measured around a change of shape: all so far, or at most 20, evenly spaced.

    >>> probed_tasks(2), len(probed_tasks(500)), probed_tasks(500)[:3], probed_tasks(500)[-1]
    ([0, 1, 2], 20, [0, 26, 53], 500)
    """
    if number < PROBED:
        return [*range(number + 1)]
    return sorted({round(i * number / (PROBED - 1)) for i in range(PROBED)})


def _phase(
    tasks: Sequence[Task], number: int, learner: Learner[S], schedule: TaskSchedule, ranks: ProcessRank
) -> Phase:
    task, share = tasks[number], learner.second_share
    if schedule.held_out or share:
        task = replace(task, train=fix_order(task.train))
    classes = _choice(schedule, tasks, number, number)
    train: ExampleSet = task.train
    second: ExampleSet | None = None
    held_out: ExampleSet | None = None
    context = Context(nn.Identity(), NO_AXES, task, number, seed=schedule.seed)

    def split(examples: ExampleSet, many: int, purpose: int) -> tuple[ExampleSet, ExampleSet]:
        order = torch.randperm(len(examples), generator=context.generator(purpose))
        first, last = order.split([len(examples) - many, many])
        return examples.subset(first), examples.subset(last)

    if schedule.held_out:
        train, held_out = split(train, max(1, round(schedule.held_out * len(train))), 14)
        task = replace(task, train=train)
    if share:
        train, second = split(train, int(share * len(train)), 12)
    steps = -(-len(train) // schedule.batch_size)

    def batches(context: Context) -> Iterator[tuple[Sequence[Examples], Examples | None]]:
        seconds = _second_indices(context, second, steps) if second else []
        order = context.generator(context.epoch).initial_seed()
        for i, batch in enumerate(train.batches(schedule.batch_size, seed=order)):
            yield (batch,), second.take(seconds[i % len(seconds)]) if second else None

    def validate(state: S, context: Context) -> float:
        there = replace(context, answered=number)
        values = learner.parametrize(state, there).values
        with torch.no_grad(), parametrize(context.model, values), sharing_rows(context.model, ranks):
            return mean_score(context.model, held_out or task.test, schedule.objective, classes)

    return Phase(
        task,
        (steps,) * schedule.epochs,
        batches,
        classes,
        objective=schedule.objective,
        validate=validate if held_out else None,
        patience=schedule.patience,
    )


def _second_indices(context: Context, examples: ExampleSet, steps: int) -> list[Tensor]:
    """Return the second part of the training examples in random order, in as many batches as the first part has."""
    order = torch.randperm(len(examples), generator=context.generator(context.epoch, 13))
    parts = [*order.split(max(2, -(-len(order) // steps)))]
    if len(parts[-1]) == 1 < len(order):
        parts.pop()  # a BatchNorm cannot train on it
    return parts


def _choice(schedule: TaskSchedule, tasks: Sequence[Task], after: int, answered: int) -> Tensor | None:
    """Return the classes to choose among when task ``answered`` is evaluated after task ``after``; ``None`` for all."""
    match schedule.scenario:
        case "domain":
            return None
        case "class":
            seen = {c for task in tasks[: max(after, answered) + 1] for c in task.classes}
        case _:
            seen = set(tasks[answered].classes)
    every = 1 + max(c for task in tasks for c in task.classes)
    return torch.tensor([c in seen for c in range(every)])


def _observer(tasks: Sequence[Task], learner: Learner[S], schedule: TaskSchedule, ranks: ProcessRank) -> Observer[S]:
    start = perf_counter()

    def probe(state: S, context: Context) -> tuple[list[float], Tensor]:
        """Measure, within a task, the accuracy on tasks so far and the logits of some test examples."""
        model, was = context.model, context.model.training
        values = learner.parametrize(state, context).values
        with torch.no_grad(), sharing_rows(model, ranks), parametrize(model, values):
            scores = [_score(context, tasks, number, schedule) for number in probed_tasks(context.number)]
            model.eval()
            try:
                inputs = next(context.task.test.batches(256)).inputs
                return scores, context.logits(inputs).nan_to_num(neginf=0.0)
            finally:
                model.train(was)

    def after_plan(state: S, context: Context, plan: Plan, before: tuple[list[float], Tensor]) -> dict[str, Any]:
        probed, after = probed_tasks(context.number), probe(state, context)
        changes = plan.changes.items()
        return {
            "grown": {key: change.grow for key, change in changes if change.grow},
            "cut": {key: n for key, change in changes if (n := change.size - len(change.keep))},
            "dropped": list(plan.drop),
            "back": list(plan.back),
            "restored": {key: n for key, change in changes if (n := len(change.restore))},
            "stood": bool(plan.origin.get("stood")),
            **({"asked": probed} if len(probed) <= context.number else {}),
            "accuracy_before": before[0],
            "accuracy_after": after[0],
            "shock": fmean(a - b for a, b in zip(before[0], after[0], strict=True) if not isnan(a)),
            "logits_moved": float((after[1] - before[1]).abs().max()),
            "parameters": sum(p.numel() for p in context.model.parameters()),
        }

    def task_end(state: S, context: Context) -> tuple[tuple[float, ...], dict[str, Any]]:
        nonlocal start
        with sharing_rows(context.model, ranks):
            row = accuracies(context, tasks, learner, state, schedule)
        sizes = measure_sizes(context, axis_tensors(state)) | {"seconds": round(perf_counter() - start, 2)}
        start = perf_counter()
        return row, sizes

    return Observer(probe, after_plan, task_end)


def measure_sizes(context: Context, tensors: Mapping[str, AxisTensor]) -> dict[str, Any]:
    """Return the size of a network at the end of a task: parameters, multiply–accumulates, widths, bytes of state."""
    parameters, was = context.parameters(), context.model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_network(context.model.eval(), first_examples(context.task.train, 1).inputs)
    context.model.train(was)
    held = [one.values for one in tensors.values()]
    return {
        "task": context.number,
        "parameters": sum(p.numel() for p in parameters.values()),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters.values()),
        "macs": counter.get_total_flops() // 2,  # of one example
        # Bytes of masks, memories and factors; a mask takes a bit per entry.
        "remembered": sum(-(-x.numel() // 8) if x.dtype == torch.bool else x.numel() * x.itemsize for x in held),
        "widths": {axis.key: axis.size for axis in context.axes.units()},
    }
