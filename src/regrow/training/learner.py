"""Learners: what a method adds to plain training, as a frozen record of hooks.

``docs/training.md`` says when each hook is called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.axes import AxisGraph, axes_in
from regrow.axis_tensor import AxisTensor
from regrow.plan import Plan
from regrow.sources import logits_in
from regrow.surgery import UndoStore
from regrow.tasks import Examples, Task, among

S = TypeVar("S")


class Log(Protocol):
    """Takes a row of measurements."""

    def __call__(self, kind: str, /, **row: Any) -> None:
        """Log a row.

        Args:
            kind: ``task``: the values join the row of the task that is ending; ``status``: ``text`` is shown beside
                the progress; any other: a row of the run's ``metrics.jsonl``.
            **row: JSON data.
        """
        ...


def discard(kind: str, /, **row: Any) -> None:
    """Log nothing."""


class Event(StrEnum):
    """When the ``boundary`` hook is called; ``FINISH`` comes after the last plan, before replacements are written."""

    TASK_START = "task start"
    RESUME = "resume"
    EPOCH_START = "epoch start"
    PLAN_APPLIED = "plan applied"
    EPOCH_END = "epoch end"
    TASK_END = "task end"
    FINISH = "finish"


@dataclass(frozen=True, eq=False)
class Context:
    """The network and where its training is.

    Args:
        model: The network.
        axes: Its axes as they are now.
        task: The task that is being learned.
        number: Its number, from 0.
        epoch: The current pass over its examples, from 0; ``epochs`` after the last one.
        epochs: The number of passes.
        steps: The number of steps per pass.
        classes: The classes among which answers are chosen, ``[classes]`` bool; ``None`` for all.
        seed: Seed of everything random.
        past: Earlier tasks. Only baselines and upper bounds may train on their examples.
        answered: The number of the task that is being evaluated; ``None`` while training.
        applied: The number of plans that were applied since the last epoch.
        undo: What earlier plans removed from the network, for learners that restore units.
        log: Takes rows of measurements.
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
    answered: int | None = None
    applied: int = 0
    undo: UndoStore | None = None
    log: Log = discard

    @property
    def training(self) -> bool:
        """Whether the network is being trained, rather than evaluated."""
        return self.answered is None

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights of convolutions and linear layers; tied ones once."""
        return tuple(name for name in self.axes.counted if name not in self.axes.ties)

    @property
    def head(self) -> tuple[str, ...]:
        """The names of the parameters that produce the network's outputs (no free axis does)."""
        return tuple(
            name
            for name in self.parameters()
            if not any(self.axes[key].free for key in axes_in(self.axes.shapes[name][0]))
        )

    @property
    def task_classes(self) -> Tensor | None:
        """Of ``classes`` those of the current task, ``[classes]`` bool; ``None`` where ``classes`` is."""
        if self.classes is None:
            return None
        own = torch.zeros_like(self.classes)
        own[list(self.task.classes)] = True
        return own

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by name; tied ones once."""
        return dict(self.model.named_parameters())

    def logits(self, inputs: Tensor) -> Tensor:
        """The network's logits ``[N, classes]``; −∞ for classes among which answers are not chosen."""
        return among(logits_in(self.model(inputs)), self.classes)

    def replay_logits(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Logits of examples of any task so far, each among the classes of its own task where tasks are told apart.

        An example belongs to the current task if that has its label, or else to the last task that has it.

        Args:
            inputs: ``[N, ...]``.
            labels: ``[N]``.
        """
        logits = logits_in(self.model(inputs))
        if self.classes is None:
            return logits
        choice = self.classes.repeat(len(labels), 1)
        for task in self.past:
            other = torch.isin(labels, torch.tensor(task.classes)) & ~self.classes[labels]
            choice[other] = torch.isin(torch.arange(len(self.classes)), torch.tensor(task.classes))
        return among(logits, choice)

    def generator(self, *purpose: int) -> torch.Generator:
        """A random generator; the same for the same seed, task and ``purpose``."""
        seed = self.seed
        for part in (self.number, *purpose):
            seed = (seed * 1_000_003 + part + 1) % 2**62
        return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Replacements:
    """What takes the place of parameters in the forward pass.

    Args:
        values: Name of a parameter → the tensor that replaces it.
        aux: What the other hooks need of how it was computed, such as masks with their gradients.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    aux: Any = None


@dataclass(frozen=True)
class Loss:
    """A loss.

    Args:
        value: A scalar.
        aux: What later hooks need of the forward pass, such as logits to store.
    """

    value: Tensor
    aux: Any = None


@dataclass(frozen=True)
class Step:
    """One training step.

    Args:
        index: Its number in the epoch.
        batch: What the network's parameters learn from.
        second: A batch of the second part of the training examples, for learners with a ``second_share``.
        replaced: What the ``parametrize`` hook returned.
        aux: What the ``loss`` hook returned as :attr:`Loss.aux`; ``None`` before.
    """

    index: int
    batch: Any
    second: Examples | None = None
    replaced: Replacements = Replacements()
    aux: Any = None


@dataclass(frozen=True)
class Boundary:
    """An event between two steps.

    Args:
        event: What happens.
        plan: The plan that was applied, for ``PLAN_APPLIED``.
        before: The context before that plan.
    """

    event: Event
    plan: Plan | None = None
    before: Context | None = None


def parametrize_nothing(state: Any, context: Context) -> Replacements:
    """Use the parameters as they are."""
    return Replacements()


def cross_entropy_loss(state: Any, context: Context, step: Step) -> Loss:
    """Cross-entropy of the network's logits."""
    logits = context.logits(step.batch.inputs)
    return Loss(F.cross_entropy(logits, step.batch.labels), logits)


def keep_gradients(state: S, context: Context, step: Step) -> S:
    """Leave gradients as they are."""
    return state


def keep_state(state: S, context: Context, step: Step) -> S:
    """Leave the state as it is after a step."""
    return state


def plan_nothing(state: S, context: Context) -> tuple[Plan | None, S]:
    """Leave the network's shape as it is."""
    return None, state


def set_train_mode(state: S, context: Context, boundary: Boundary) -> S:
    """Put the network in training mode when an epoch starts."""
    if boundary.event == Event.EPOCH_START:
        context.model.train()
    return state


@dataclass(frozen=True)
class Learner(Generic[S]):
    """What a method adds to plain training; the defaults are plain training.

    A hook that remembers something returns the new state. The fields of a state are described in
    :mod:`regrow.training.state`; :class:`regrow.AxisTensor` in it follow every plan, and those with a learning rate are
    trained.

    Args:
        state: The state before the first task.
        parametrize: (state, context) → what replaces parameters in the forward pass; for the task
            ``context.answered`` when the network is evaluated.
        loss: (state, context, step) → the loss.
        project: (state, context, step) → state; may change the gradients, which have just been computed.
        after_step: (state, context, step) → state; may correct the parameters, which the optimizer has just changed.
        plan: (state, context) → the next change of the network's shape, or ``None``; asked before each epoch and after
            the last one, until it returns ``None``.
        boundary: (state, context, boundary) → state, at every :class:`Event`; sets the modes of modules when an epoch
            starts.
        optimizer: ``""``: the network's optimizer trains the state's tensors too; ``"adam"``: Adam with β =
            (0.5, 0.999) does.
        scheduled: Whether the learning rates of its tensors follow the schedule, as that of the network does.
        second_share: The share of the training examples that the network's parameters do not learn from; a batch of
            them comes with every step.
        trains_on_past: Whether it trains on all examples of earlier tasks, as upper bounds do.
        restores: Whether its plans restore what earlier plans removed.
    """

    state: S
    parametrize: Callable[[S, Context], Replacements] = parametrize_nothing
    loss: Callable[[S, Context, Step], Loss] = cross_entropy_loss
    project: Callable[[S, Context, Step], S] = keep_gradients
    after_step: Callable[[S, Context, Step], S] = keep_state
    plan: Callable[[S, Context], tuple[Plan | None, S]] = plan_nothing
    boundary: Callable[[S, Context, Boundary], S] = set_train_mode
    optimizer: str = ""
    scheduled: bool = False
    second_share: float = 0.0
    trains_on_past: bool = False
    restores: bool = False


@dataclass(frozen=True)
class NoState:
    """The state of a learner that remembers nothing."""


PLAIN: Learner[NoState] = Learner(NoState())
"""Plain training."""


def write_replacements(learner: Learner[S], state: S, context: Context) -> None:
    """Write what replaces parameters at evaluation into them, so that the network needs its learner no longer.

    Args:
        learner: The learner.
        state: Its last state.
        context: The network, changed in place.
    """
    context = replace(context, answered=context.number)
    with torch.no_grad():
        for name, value in learner.parametrize(state, context).values.items():
            context.model.get_parameter(name).copy_(value)


def freeze_norms(model: nn.Module) -> None:
    """Put BatchNorm modules in evaluation mode, so that they use their running statistics and keep them."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def tensor_along(context: Context, name: str, values: Tensor | None = None, lr: float | None = None) -> AxisTensor:
    """A tensor along the dimensions of a parameter; zeros unless ``values`` are given."""
    own = context.parameters()[name]
    return AxisTensor(torch.zeros_like(own) if values is None else values, context.axes.shapes[name], lr)


def flags_along(context: Context, name: str) -> AxisTensor:
    """``False`` for every entry of a parameter."""
    shape = context.parameters()[name].shape
    return AxisTensor(torch.zeros(shape, dtype=torch.bool), context.axes.shapes[name])
