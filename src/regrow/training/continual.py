"""Continual learning: the training loop over a sequence of tasks, with the accuracy matrix around it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isnan, nan
from statistics import fmean
from time import perf_counter
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regrow.core.axes import AxisGraph
from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import CLASSIFICATION, NEXT_TOKEN, Objective
from regrow.core.plan import Plan
from regrow.core.tasks import Examples, ExampleSet, Task, first_examples, run_network
from regrow.data.datasets import fix_order
from regrow.distributed import SINGLE, ProcessRank
from regrow.evaluation.continual import Matrix, mean_score
from regrow.settings.constraints import OneOf, Range
from regrow.surgery.gate import parametrize
from regrow.tracing.capture import keep_modes
from regrow.training.fit import FitOptions, Fitted, Observer, fit
from regrow.training.learner import PLAIN, Context, Learner, Stream
from regrow.training.schedule import NO_AXES, Phase, Schedule
from regrow.training.shared_rows import share_rows
from regrow.training.state import TrainState, axis_tensors

S = TypeVar("S")

# The largest number of tasks whose accuracy is measured right before and after a change of shape.
MAX_PROBED_TASKS = 20


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
    """Train a network on a sequence of tasks, in place, and measure accuracy on all tasks after each one.

    ``state``: that from which an interrupted call resumes. The result's ``state`` has the accuracies
    (:func:`accuracy_matrix`). Raise ValueError if the learner cannot train the objective, or a loss is not finite.
    """
    if learner.classes_only and schedule.objective not in (CLASSIFICATION, NEXT_TOKEN):
        raise ValueError(
            f"this method needs probabilities of classes or tokens, and the objective is {schedule.objective.name}; "
            "take naive, si, packnet or wsn"
        )
    if schedule.scenario != "domain" and schedule.objective is not CLASSIFICATION:
        raise ValueError(
            f"scenario {schedule.scenario!r} is of classes, and the objective is {schedule.objective.name}; leave it "
            "at 'domain', or take the loss 'classification'"
        )
    options, state = options or FitOptions(), state or TrainState(learner.state)
    ranks = options.parallel.ranks
    if not state.before:
        state = replace(state, before=measure_untrained_accuracies(model, tasks, schedule, ranks))
    phases = [_make_phase(tasks, number, learner, schedule) for number in range(len(tasks))]
    options = replace(options, observer=_TaskObserver(tasks, learner, schedule, ranks))
    return fit(model, axes, phases, learner, schedule, state=state, options=options)


def accuracy_matrix(state: TrainState[S]) -> Matrix:
    """Return the accuracies, 0 to 1: a row per finished task, a column per task; and those of the untrained network."""
    return Matrix(state.rows, state.before)


def measure_untrained_accuracies(
    model: nn.Module, tasks: Sequence[Task], schedule: TaskSchedule, ranks: ProcessRank = SINGLE
) -> tuple[float, ...]:
    """Return the accuracy before training on the test examples of each task, 0 to 1; NaN if its examples are gone."""
    with share_rows(model, ranks):
        observer = _TaskObserver(tasks, PLAIN, schedule, ranks)
        return observer.accuracies(PLAIN.state, Context(model, NO_AXES, tasks[0]))


def select_probed_tasks(number: int) -> list[int]:
    """Return the indices of tasks, up to ``number``, to measure around a change of shape: all, or 20 evenly spaced.

    >>> many = select_probed_tasks(500)
    >>> select_probed_tasks(2), len(many), many[:3], many[-1]
    ([0, 1, 2], 20, [0, 26, 53], 500)
    """
    if number < MAX_PROBED_TASKS:
        return [*range(number + 1)]
    return sorted({round(i * number / (MAX_PROBED_TASKS - 1)) for i in range(MAX_PROBED_TASKS)})


def _make_phase(tasks: Sequence[Task], number: int, learner: Learner[S], schedule: TaskSchedule) -> Phase:
    """Return how task ``number`` is trained; a step also gets a batch of the learner's ``second_share`` of its data."""
    task, share, second = tasks[number], learner.second_share, None
    train: ExampleSet = task.train
    if share:
        task = replace(task, train=fix_order(task.train))
        context = Context(nn.Identity(), NO_AXES, task, number, seed=schedule.seed)
        order = torch.randperm(len(task.train), generator=context.generator(Stream.HELD_OUT))
        first, last = order.tensor_split([len(order) - int(share * len(order))])
        train, second = task.train.subset(first), task.train.subset(last)
    steps = -(-len(train) // schedule.batch_size)

    def batches(context: Context) -> Iterator[tuple[Sequence[Examples], Examples | None]]:
        seconds = _split_second_part(context, second, steps) if second else []
        order = context.generator(context.epoch).initial_seed()
        for i, batch in enumerate(train.batches(schedule.batch_size, seed=order)):
            yield (batch,), second.take(seconds[i % len(seconds)]) if second else None

    classes = _allowed_classes(schedule, tasks, trained=number, evaluated=number)
    return Phase(task, (steps,) * schedule.epochs, batches, classes, objective=schedule.objective)


def _split_second_part(context: Context, examples: ExampleSet, steps: int) -> list[Tensor]:
    """Return, for an epoch, random batches of indices of the withheld ``examples``, at most ``steps``, of 2 or more."""
    order = torch.randperm(len(examples), generator=context.generator(context.epoch, Stream.HELD_OUT_ORDER))
    parts = [*order.split(max(2, -(-len(order) // steps)))]
    if len(parts[-1]) == 1 < len(order):
        parts.pop()  # a BatchNorm cannot train on it
    return parts


def _allowed_classes(schedule: TaskSchedule, tasks: Sequence[Task], trained: int, evaluated: int) -> Tensor | None:
    """Return which classes may be predicted for task ``evaluated`` after training task ``trained``, by the scenario.

    ``[classes]`` bool; ``None``: all, as in the scenario ``domain``.
    """
    match schedule.scenario:
        case "domain":
            return None
        case "class":  # a task that is not trained yet is evaluated with the classes of all tasks up to it
            allowed = {c for task in tasks[: max(trained, evaluated) + 1] for c in task.classes}
        case _:  # task
            allowed = set(tasks[evaluated].classes)
    total = 1 + max((c for task in tasks for c in task.classes), default=-1)
    if not total:
        raise ValueError(f"scenario {schedule.scenario!r} needs a class label per example; leave it at 'domain'")
    return torch.tensor([c in allowed for c in range(total)])


@dataclass
class _TaskObserver(Observer[S]):
    """Measures accuracy and sizes around changes of shape, and after each task."""

    tasks: Sequence[Task]
    learner: Learner[S]
    schedule: TaskSchedule
    ranks: ProcessRank
    start: float = field(default_factory=perf_counter)  # when the task began, in seconds

    def accuracies(self, state: S, context: Context, objective: Objective | None = None) -> tuple[float, ...]:
        """Return a row of the accuracy matrix: the accuracy on every task after training on task ``context.number``.

        ``objective``: whose score is measured; ``None``: that of the training.
        """
        row = []
        for number in range(len(self.tasks)):
            evaluation = replace(context, eval_task=number, classes=None)
            with parametrize(context.model, self.learner.parametrize(state, evaluation).values):
                row.append(self._score(context, number, objective))
        return tuple(row)

    def _score(self, context: Context, number: int, objective: Objective | None = None) -> float:
        """Return the accuracy on a task, after training on ``context.number``; NaN if its examples are gone."""
        if self.tasks[number].gone:
            return nan
        classes = _allowed_classes(self.schedule, self.tasks, trained=context.number, evaluated=number)
        return mean_score(context.model, self.tasks[number].test, objective or self.schedule.objective, classes)

    def before_plan(self, state: S, context: Context) -> tuple[list[float], Tensor]:
        """Return accuracies on :func:`select_probed_tasks`, and the first output for 256 examples of the task."""
        model, values = context.model, self.learner.parametrize(state, context).values
        with torch.no_grad(), keep_modes(model), share_rows(model, self.ranks), parametrize(model, values):
            scores = [self._score(context, number) for number in select_probed_tasks(context.number)]
            model.eval()
            inputs = next(context.task.test.batches(256)).inputs
            if context.objective in (CLASSIFICATION, NEXT_TOKEN):
                return scores, context.logits(inputs).nan_to_num(neginf=0.0)
            leaves = tree_leaves(run_network(model, inputs, context.device))
            return scores, next((x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()), torch.zeros(1))

    def after_plan(self, state: S, context: Context, plan: Plan, before: tuple[list[float], Tensor]) -> dict[str, Any]:
        """Return the row of a change of shape: what it adds and removes, and measurements before and after it.

        Accuracies are those on :func:`select_probed_tasks`; ``shock``: how much their mean falls, 0 to 1.
        """
        probed, after = select_probed_tasks(context.number), self.before_plan(state, context)
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
        """Return (accuracy on every task, row of sizes and of the seconds that the task took) after a task."""
        with share_rows(context.model, self.ranks):
            row, sizes = self.accuracies(state, context), measure_task_sizes(context, axis_tensors(state))
            if self.schedule.objective is NEXT_TOKEN:
                sizes["nats"] = [-score for score in self.accuracies(state, context, replace(NEXT_TOKEN, score=None))]
        sizes["seconds"] = round(perf_counter() - self.start, 2)
        self.start = perf_counter()
        return row, sizes


def measure_task_sizes(context: Context, method_state: Mapping[str, AxisTensor]) -> dict[str, Any]:
    """Return a row of sizes after a task; ``method_state``: the tensors of the learner's state by name.

    Parameters, non-zeros, multiply–accumulates of one example, bytes of these tensors, and the width of each axis.
    """
    parameters = context.parameters()
    with torch.no_grad(), keep_modes(context.model), FlopCounterMode(display=False) as counter:
        run_network(context.model.eval(), first_examples(context.task.train, 1).inputs)
    stored = [tensor.values for tensor in method_state.values()]
    return {
        "task": context.number,
        "parameters": sum(p.numel() for p in parameters.values()),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters.values()),
        "macs": counter.get_total_flops() // 2,  # of one example
        # Bytes of masks, memories and factors; a mask takes a bit per entry.
        "remembered": sum(-(-x.numel() // 8) if x.dtype == torch.bool else x.numel() * x.itemsize for x in stored),
        "widths": {axis.key: axis.size for axis in context.axes.units()},
    }
