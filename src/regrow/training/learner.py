"""Learners: what a method adds to plain training, as a frozen record of hooks.

``docs/training.md`` says when each hook is called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, axes_in
from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import CLASSIFICATION, Objective
from regrow.core.plan import Plan
from regrow.core.progress import Log, discard
from regrow.core.sources import device_of, logits_in
from regrow.core.tasks import Examples, Task, mask_classes, run_network
from regrow.surgery import UndoStore

S = TypeVar("S")


class Event(StrEnum):
    """When the ``boundary`` hook is called; ``FINISH``: after the last plan, before replacements are written."""

    TASK_START = "task start"
    RESUME = "resume"
    EPOCH_START = "epoch start"
    PLAN_APPLIED = "plan applied"
    EPOCH_END = "epoch end"
    TASK_END = "task end"
    FINISH = "finish"


class Stream(IntEnum):
    """What a random stream is drawn for, as an argument of :meth:`Context.generator`; results depend on the numbers.

    Replay shares a number with search, and so do earlier tasks with gradient examples.
    """

    STEPS = 1  # dropout and augmentation
    SPARSITY = 2
    CALIBRATION = 3
    FISHER_EXAMPLES = 4
    FISHER_LABELS = 5
    REPLAY_DRAW = 6
    REPLAY_STORE = 7
    RETURNING_OPERATIONS = 7
    PAST_TASKS = 8
    GRADIENT_EXAMPLES = 8
    RESET = 9
    ALPHA = 11
    HELD_OUT = 12
    HELD_OUT_ORDER = 13
    TRIALS = 14


@dataclass(frozen=True, eq=False)
class Context:
    """The network, its axes and data, and the progress of training; hooks of a learner receive it.

    Args:
        model: The network.
        axes: The network's present axes.
        task: The task that is being trained.
        number: The index of that task in the sequence, from 0.
        epoch: The number of the current pass over its examples, from 0; ``epochs`` after the last one.
        epochs: The number of passes over each task.
        steps: The number of steps per pass.
        classes: The classes among which predictions are made, ``[classes]`` bool; ``None`` for all.
        seed: Seed of everything random.
        past: Earlier tasks. Only baselines and upper bounds may train on their examples.
        eval_task: The number of the task that is being evaluated; ``None`` while training.
        plans_applied: The number of plans that were applied since the last epoch.
        undo: The store of what earlier plans removed from the network, for learners that restore units.
        log: Records a row of measurements: ``log(kind, column=value, …)``.
        objective: What the network is trained for.
        make_optimizer: Makes an optimizer of parameter groups like the one that trains; ``None`` outside training.
        clear_moments: Forgets the moments of the network's optimizer, as at the start of a task.
    """

    model: nn.Module
    axes: AxisGraph
    task: Task
    number: int = 0
    epoch: int = 0
    epochs: int = 1
    steps: int = 1
    classes: Tensor | None = None
    seed: int = 0
    past: tuple[Task, ...] = ()
    eval_task: int | None = None
    plans_applied: int = 0
    undo: UndoStore | None = None
    log: Log = discard
    objective: Objective = CLASSIFICATION
    make_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    clear_moments: Callable[[], None] = lambda: None

    @property
    def training(self) -> bool:
        """Whether the network is being trained, rather than evaluated."""
        return self.eval_task is None

    @cached_property
    def device(self) -> torch.device:
        """The device of the network."""
        return device_of(self.model)

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights of convolutions and linear layers, without biases, embeddings and what is tied."""
        shapes, ties = self.axes.shapes, self.axes.ties
        layers = (f"{work.module}.weight" for work in self.axes.work)
        heads = (name for name in layers if len(shapes.get(name, ())) > 1 and name not in ties.values())
        return tuple(name for name in dict.fromkeys((*self.axes.counted, *heads)) if name not in ties)

    @property
    def head(self) -> tuple[str, ...]:
        """The names of the parameters whose first dimension no plan resizes, such as those of the output layer."""
        return tuple(
            name
            for name in self.parameters()
            if not any(self.axes[key].free for dim in self.axes.shapes[name][:1] for key in axes_in(dim))
        )

    @property
    def compares_tasks(self) -> bool:
        """Whether predictions choose among classes of this and of earlier tasks, as in class-incremental learning."""
        earlier = {c for task in self.past for c in task.classes} - set(self.task.classes)
        return self.classes is not None and bool(self.classes[list(earlier)].any())

    @property
    def task_classes(self) -> Tensor | None:
        """Which classes the current task has, ``[classes]`` bool; ``None``: predictions are made among all classes."""
        if self.classes is None:
            return None
        chosen = torch.zeros_like(self.classes)
        chosen[list(self.task.classes)] = True
        return chosen

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return every parameter by name; tied ones once."""
        return dict(self.model.named_parameters())

    def logits(self, inputs: Any) -> Tensor:
        """Return the network's logits ``[N, classes]`` for inputs ``[N, ...]``; −∞ for classes outside ``classes``."""
        return mask_classes(logits_in(run_network(self.model, inputs, self.device)), self.classes)

    def replay_logits(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return logits of examples of any task so far; with ``classes``, over those of the example's own task.

        An example belongs to the current task if that has its label, or else to the last task that has it.

        Args:
            inputs: The inputs, ``[N, ...]``.
            labels: The labels, ``[N]``.
        """
        logits = logits_in(run_network(self.model, inputs, self.device))
        if self.classes is None:
            return logits
        classes = self.classes.to(labels.device)
        choice = classes.repeat(len(labels), 1)
        for task in self.past:
            of_task = torch.zeros_like(classes).index_fill(0, torch.tensor(task.classes, device=labels.device), True)
            choice = torch.where((of_task & ~classes)[labels.clamp_min(0)][:, None], of_task, choice)
        return mask_classes(logits, choice)

    def generator(self, *purpose: int) -> torch.Generator:
        """Return a new random generator on the CPU that depends only on the seed, the task and ``purpose``.

        Args:
            *purpose: Numbers that distinguish random streams: a :class:`Stream`, the epoch or the step.
        """
        seed = self.seed
        for part in (self.number, *purpose):
            seed = (seed * 1_000_003 + part + 1) % 2**62
        return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Replacements:
    """The tensors that replace parameters in the forward pass, such as masked ones.

    Args:
        values: Parameter name → the tensor that replaces it.
        aux: Intermediate results for the other hooks, such as masks with their gradients.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    aux: Any = None


NO_REPLACEMENTS = Replacements()  # the result of a ``parametrize`` hook that replaces nothing


@dataclass(frozen=True)
class Loss:
    """The result of the ``loss`` hook: a scalar, and intermediate results for later hooks.

    Args:
        value: The loss, a scalar with a gradient.
        aux: Intermediate results of the forward pass for later hooks, such as logits to store.
    """

    value: Tensor
    aux: Any = None


@dataclass(frozen=True)
class Step:
    """One training step: its number, its batches, and results of earlier hooks.

    Args:
        index: The number of the step in its epoch, from 0.
        batch: The batch on which the network's parameters are trained.
        second: A batch of the second part of the training examples, for learners with a ``second_share``.
        replaced: The result of the ``parametrize`` hook.
        aux: :attr:`Loss.aux`, once the ``loss`` hook has run; ``None`` before.
        lr: The learning rate of the network's parameters in this step.
    """

    index: int
    batch: Any
    second: Examples | None = None
    replaced: Replacements = NO_REPLACEMENTS
    aux: Any = None
    lr: float = 0.0


@dataclass(frozen=True)
class Boundary:
    """An event between two steps, passed to the ``boundary`` hook.

    Args:
        event: The kind of event.
        plan: The plan that was applied, for ``PLAN_APPLIED``.
        before: The context before that plan.
    """

    event: Event
    plan: Plan | None = None
    before: Context | None = None


def task_loss(state: object, context: Context, step: Step) -> Loss:
    """Default ``loss`` hook: return the loss of the context's objective, with the network's output as ``aux``.

    Of classes, the output is the logits, −∞ for classes outside ``context.classes``.
    """
    inputs, classes = step.batch.inputs, context.objective is CLASSIFICATION
    output = context.logits(inputs) if classes else run_network(context.model, inputs, context.device)
    return Loss(context.objective.loss(output, step.batch.labels), output)


def set_train_mode(state: S, context: Context, boundary: Boundary) -> S:
    """Default ``boundary`` hook: put the network in training mode when an epoch starts."""
    if boundary.event == Event.EPOCH_START:
        context.model.train()
    return state


@dataclass(frozen=True)
class Learner(Generic[S]):
    """A training method as a record of hooks and options; the defaults are plain training.

    A hook that changes the state returns the new one; its tensors may change in place. Its fields are described in
    :mod:`regrow.training.state`; :class:`regrow.AxisTensor` in it follow every plan, and those with a learning rate are
    trained.

    Args:
        state: The initial state, before the first task.
        parametrize: (state, context) → the tensors that replace parameters in the forward pass; at evaluation, those
            for the task ``context.eval_task``.
        loss: (state, context, step) → the loss.
        project: (state, context, step) → state; may change the gradients, which have just been computed.
        after_step: (state, context, step) → state; may correct the parameters, which the optimizer has just changed.
        plan: (state, context) → the next change of the network's shape, or ``None``, and the new state; called before
            each epoch and after the last one, until it returns ``None``.
        boundary: (state, context, boundary) → state, at every :class:`Event`; sets the modes of modules when an epoch
            starts.
        optimizer: ``""``: the network's optimizer trains the state's tensors too; ``"adam"``: Adam with β =
            (0.5, 0.999) does.
        scheduled: Whether the learning rates of the state's tensors follow the schedule, as that of the network does.
        second_share: The fraction of the training examples that is withheld from the network's parameters; a batch of
            them comes with every step.
        trains_on_past: Whether it trains on all examples of earlier tasks, as upper bounds do.
        restores: Whether its plans restore what earlier plans removed.
        classes_only: Whether it needs probabilities of classes or tokens, so that it learns no other objective.
        uses_axes: Whether it needs the network's axes, so that the network must be traced.
        lr: The learning rate that suits it with SGD, from random weights.
    """

    state: S
    parametrize: Callable[[S, Context], Replacements] = lambda state, context: NO_REPLACEMENTS
    loss: Callable[[S, Context, Step], Loss] = task_loss
    project: Callable[[S, Context, Step], S] = lambda state, context, step: state
    after_step: Callable[[S, Context, Step], S] = lambda state, context, step: state
    plan: Callable[[S, Context], tuple[Plan | None, S]] = lambda state, context: (None, state)
    boundary: Callable[[S, Context, Boundary], S] = set_train_mode
    optimizer: str = ""
    scheduled: bool = False
    second_share: float = 0.0
    trains_on_past: bool = False
    restores: bool = False
    classes_only: bool = False
    uses_axes: bool = True
    lr: float = 0.01


@dataclass(frozen=True)
class NoState:
    """The state of a learner without state."""


# The learner of plain training.
PLAIN: Learner[NoState] = Learner(NoState())


def write_replacements(learner: Learner[S], state: S, context: Context) -> None:
    """Write the tensors that replace parameters at evaluation into these, in place; then no learner is needed."""
    context = replace(context, eval_task=context.number)
    with torch.no_grad():
        for name, value in learner.parametrize(state, context).values.items():
            context.model.get_parameter(name).copy_(value)


def make_tensor(context: Context, name: str, values: Tensor | None = None, lr: float | None = None) -> AxisTensor:
    """Return a tensor for a learner's state with the axes of a parameter, so that it follows plans.

    Args:
        context: The network and its axes.
        name: The parameter's name.
        values: The values, of the parameter's shape, moved to its device; ``None``: zeros.
        lr: The learning rate at which the tensor is trained; ``None``: it is not.
    """
    parameter = context.model.get_parameter(name)
    values = torch.zeros_like(parameter) if values is None else values.to(parameter.device)
    return AxisTensor(values, context.axes.shapes[name], lr)


def make_mask(context: Context, name: str) -> AxisTensor:
    """Return a bool tensor, ``False`` everywhere, with the axes of the parameter ``name``, so that it follows plans."""
    return make_tensor(context, name, torch.zeros_like(context.model.get_parameter(name), dtype=torch.bool))
