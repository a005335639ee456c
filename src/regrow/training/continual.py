"""Continual learning: the training loop over a sequence of tasks, with the accuracy matrix around it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from regrow.core.tasks import Examples, ExampleSet, Task, first_examples, run_network
from regrow.data.datasets import fix_order
from regrow.distributed import SINGLE, ProcessRank
from regrow.evaluation.continual import Matrix, mean_score
from regrow.settings.constraints import OneOf, Range
from regrow.surgery.gate import parametrize
from regrow.tracing.capture import keep_modes
from regrow.training.fit import FitOptions, Fitted, Observer, fit
from regrow.training.learner import PLAIN, Context, Learner
from regrow.training.schedule import NO_AXES, Phase, Schedule
from regrow.training.shared_rows import sharing_rows
from regrow.training.state import TrainState, axis_tensors

S = TypeVar("S")

PROBED = 20
"""The largest number of tasks whose accuracy is measured around a change of shape."""


@dataclass(frozen=True)
class TaskSchedule(Schedule):
    """How every task of a sequence is trained: scenario, epochs and batches, besides what any training needs."""

    # Predictions are made among all classes (domain), those seen so far (class), or those of the task (task).
    scenario: Annotated[str, OneOf("domain", "class", "task")] = "domain"
    epochs: Annotated[int, Range(1)] = 5
    batch_size: Annotated[int, Range(1)] = 64
    objective: Objective = CLASSIFICATION


def learn(
    model: nn.Module,
    axes: AxisGraph,
    tasks: Sequence[Task],
    learner: Learner[S],
    schedule: TaskSchedule,
    *,
    state: TrainState[S] | None = None,
    options: FitOptions[S] | None = None,
) -> Fitted[S]:
    """Train a network on a sequence of tasks, and measure accuracy on all tasks after each one."""
    if learner.classes_only and schedule.objective is not CLASSIFICATION:
        raise ValueError(
            f"this method needs class probabilities, and the objective is {schedule.objective.name}; "
            "take naive, si, packnet or wsn"
        )
    options, state = options or FitOptions(), state or TrainState(learner.state)
    ranks = options.parallel.ranks
    if not state.before:
        state = replace(state, before=untrained_accuracies(model, tasks, schedule, ranks))
    phases = [_phase(tasks, number, learner, schedule) for number in range(len(tasks))]
    options = replace(options, observer=_TaskObserver(tasks, learner, schedule, ranks))
    return fit(model, axes, phases, learner, schedule, state=state, options=options)


def accuracy_matrix(state: TrainState[S]) -> Matrix:
    """Return the accuracy matrix measured so far."""
    return Matrix(state.rows, state.before)


def untrained_accuracies(
    model: nn.Module, tasks: Sequence[Task], schedule: TaskSchedule, ranks: ProcessRank = SINGLE
) -> tuple[float, ...]:
    """Return the accuracy of an untrained network on the test examples of every task."""
    with sharing_rows(model, ranks):
        observer = _TaskObserver(tasks, PLAIN, schedule, ranks)
        return observer.accuracies(PLAIN.state, Context(model, NO_AXES, tasks[0]))


def probed_tasks(number: int) -> list[int]:
    """Return the tasks whose accuracy is measured around a change of shape: all so far, or at most 20, evenly spaced.

    >>> probed_tasks(2), len(probed_tasks(500)), probed_tasks(500)[:3], probed_tasks(500)[-1]
    ([0, 1, 2], 20, [0, 26, 53], 500)
    """
    if number < PROBED:
        return [*range(number + 1)]
    return sorted({round(i * number / (PROBED - 1)) for i in range(PROBED)})


def _phase(tasks: Sequence[Task], number: int, learner: Learner[S], schedule: TaskSchedule) -> Phase:
    task, share, second = tasks[number], learner.second_share, None
    train: ExampleSet = task.train
    if share:
        task = replace(task, train=fix_order(task.train))
        context = Context(nn.Identity(), NO_AXES, task, number, seed=schedule.seed)
        order = torch.randperm(len(task.train), generator=context.generator(12))
        first, last = order.tensor_split([len(order) - int(share * len(order))])
        train, second = task.train.subset(first), task.train.subset(last)
    steps = -(-len(train) // schedule.batch_size)

    def batches(context: Context) -> Iterator[tuple[Sequence[Examples], Examples | None]]:
        seconds = _second_indices(context, second, steps) if second else []
        order = context.generator(context.epoch).initial_seed()
        for i, batch in enumerate(train.batches(schedule.batch_size, seed=order)):
            yield (batch,), second.take(seconds[i % len(seconds)]) if second else None

    classes = _choice(schedule, tasks, number, number)
    return Phase(task, (steps,) * schedule.epochs, batches, classes, objective=schedule.objective)


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


@dataclass
class _TaskObserver(Observer[S]):
    """Measures accuracy around changes of shape, and after each task."""

    tasks: Sequence[Task]
    learner: Learner[S]
    schedule: TaskSchedule
    ranks: ProcessRank
    start: float = field(default_factory=perf_counter)

    def accuracies(self, state: S, context: Context) -> tuple[float, ...]:
        """Return a row of the accuracy matrix: the accuracy on every task after training on ``context.number``."""
        row = []
        for number in range(len(self.tasks)):
            there = replace(context, answered=number, classes=None)
            with parametrize(context.model, self.learner.parametrize(state, there).values):
                row.append(self._score(context, number))
        return tuple(row)

    def _score(self, context: Context, number: int) -> float:
        """Return the accuracy on a task after training on task ``context.number``; NaN if its examples are gone."""
        if self.tasks[number].gone:
            return nan
        choice = _choice(self.schedule, self.tasks, context.number, number)
        return mean_score(context.model, self.tasks[number].test, self.schedule.objective, choice)

    def before_plan(self, state: S, context: Context) -> tuple[list[float], Tensor]:
        """Return, within a task, the accuracy on tasks so far and the logits of some test examples."""
        model, values = context.model, self.learner.parametrize(state, context).values
        with torch.no_grad(), keep_modes(model), sharing_rows(model, self.ranks), parametrize(model, values):
            scores = [self._score(context, number) for number in probed_tasks(context.number)]
            model.eval()
            inputs = next(context.task.test.batches(256)).inputs
            return scores, context.logits(inputs).nan_to_num(neginf=0.0)

    def after_plan(self, state: S, context: Context, plan: Plan, before: tuple[list[float], Tensor]) -> dict[str, Any]:
        probed, after = probed_tasks(context.number), self.before_plan(state, context)
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

    def task_end(self, state: S, context: Context) -> tuple[tuple[float, ...], dict[str, Any]]:
        with sharing_rows(context.model, self.ranks):
            row = self.accuracies(state, context)
        sizes = measure_sizes(context, axis_tensors(state)) | {"seconds": round(perf_counter() - self.start, 2)}
        self.start = perf_counter()
        return row, sizes


def measure_sizes(context: Context, tensors: Mapping[str, AxisTensor]) -> dict[str, Any]:
    """Return the size of a network at the end of a task: parameters, multiply–accumulates, widths, bytes of state."""
    parameters = context.parameters()
    with torch.no_grad(), keep_modes(context.model), FlopCounterMode(display=False) as counter:
        run_network(context.model.eval(), first_examples(context.task.train, 1).inputs)
    held = [tensor.values for tensor in tensors.values()]
    return {
        "task": context.number,
        "parameters": sum(p.numel() for p in parameters.values()),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters.values()),
        "macs": counter.get_total_flops() // 2,  # of one example
        # Bytes of masks, memories and factors; a mask takes a bit per entry.
        "remembered": sum(-(-x.numel() // 8) if x.dtype == torch.bool else x.numel() * x.itemsize for x in held),
        "widths": {axis.key: axis.size for axis in context.axes.units()},
    }
