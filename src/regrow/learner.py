"""Learners: what a method of continual learning adds to plain training on one task after the other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.axes import AxisGraph, axes_in
from regrow.axis_tensor import AxisTensor
from regrow.plan import Plan
from regrow.sources import logits_in
from regrow.tasks import Examples, Task, among


@dataclass
class Stand:
    """Where a network that keeps learning stands.

    Args:
        model: The network.
        axes: Its axes as they are now.
        task: What it learns now.
        number: Which task that is, from 0.
        epoch: Which pass over its examples, from 0.
        epochs: How many passes there are.
        steps: How many steps a pass has.
        classes: The classes that answers are chosen among now, ``[classes]`` bool; ``None`` for all.
        seed: Of everything that is drawn.
        past: The tasks before; what they were learned from is there for controls and bounds only.
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

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights of convolutions and linear layers, tied ones once."""
        return tuple(name for name in self.axes.counted if name not in self.axes.ties)

    @property
    def head(self) -> tuple[str, ...]:
        """The parameters whose rows are the network's outputs: what no free axis makes."""
        return tuple(
            name
            for name in self.parameters()
            if not any(self.axes[key].free for key in axes_in(self.axes.shapes[name][0]))
        )

    @property
    def own(self) -> Tensor | None:
        """Of the classes that answers are chosen among now, those of this task; ``None`` where ``classes`` is."""
        if self.classes is None:
            return None
        own = torch.zeros_like(self.classes)
        own[list(self.task.classes)] = True
        return own

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter by name, tied ones once."""
        return dict(self.model.named_parameters())

    def logits(self, inputs: Tensor) -> Tensor:
        """The network's logits ``[N, classes]``; −∞ for classes that answers are not chosen among."""
        return among(logits_in(self.model(inputs)), self.classes)

    def remembered(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Logits of examples of tasks so far; where tasks are told, each is chosen among the classes of its own.

        Whose an example is, its label says: the task at hand, or else the last one that has this class.
        """
        logits = logits_in(self.model(inputs))
        if self.classes is None:
            return logits
        choice = self.classes.repeat(len(labels), 1)
        for task in self.past:
            foreign = torch.isin(labels, torch.tensor(task.classes)) & ~self.classes[labels]
            choice[foreign] = torch.isin(torch.arange(len(self.classes)), torch.tensor(task.classes))
        return among(logits, choice)

    def drawn(self, *what: int) -> torch.Generator:
        """A generator for something drawn here; the same for the same seed, task and ``what``."""
        seed = self.seed
        for part in (self.number, *what):
            seed = (seed * 1_000_003 + part + 1) % 2**62
        return torch.Generator().manual_seed(seed)


@dataclass
class Learner:
    """Plain training. Methods replace what they do otherwise, and remember it in ``tensors`` and ``values``.

    Args:
        tensors: By name; stored with each checkpoint, cut and widened with the network.
        values: Numbers and words, as JSON data; stored too.
        undo: What cuts took out of the network (a :class:`regrow.UndoStore`), for learners that bring units back.
    """

    tensors: dict[str, AxisTensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    undo: Any = None

    @property
    def optimizer(self) -> str:
        """What moves the tensors that learn: ``adam``, or nothing for what moves the network."""
        return ""

    @property
    def looks_back(self) -> bool:
        """Whether it learns from examples of earlier tasks that it has not kept itself, as bounds do."""
        return False

    def asked(self, at: Stand, inputs: Tensor) -> Tensor:
        """The logits ``[N, classes]`` that the network gives now."""
        return at.logits(inputs)

    def begin(self, at: Stand) -> None:
        """A task begins; nothing of it has been learned."""

    def examples(self, at: Stand) -> Examples:
        """What weights learn from: all training examples of the task, unless some are for something else."""
        return at.task.train

    def mode(self, at: Stand) -> None:
        """Before each epoch: how modules answer while they learn."""
        at.model.train()

    def standing(self, at: Stand) -> Mapping[str, Tensor]:
        """What stands in for parameters while the network runs and its gradients are taken."""
        return {}

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """What is made small, as a scalar."""
        return F.cross_entropy(self.asked(at, batch.inputs), batch.labels)

    def gate(self, at: Stand) -> None:
        """Gradients have been taken; they may be changed."""

    def stepped(self, at: Stand) -> None:
        """The optimiser has moved the parameters; they may be put right."""

    def passed(self, at: Stand) -> None:
        """An epoch is over; what is measured and stored comes next."""

    def told(self, at: Stand) -> str:
        """What people see while it learns: the task, and behind a comma how it goes."""
        return at.task.name

    def plan(self, at: Stand) -> Plan | None:
        """What changes in the network's shape before this epoch, if anything."""
        return None

    def plans(self, at: Stand) -> Iterator[Plan]:
        """Everything that changes before this epoch; each is carried out before the next is asked for."""
        if plan := self.plan(at):
            yield plan

    def grown(self, at: Stand, plan: Plan) -> None:
        """A plan of this learner has been carried out; ``tensors`` have followed."""

    def end(self, at: Stand) -> None:
        """All epochs of a task are over."""

    def final(self, at: Stand) -> Plan | None:
        """What a search still changes when all epochs are over; asked until it is nothing."""
        return None

    def baked(self, at: Stand) -> None:
        """Write what stands in for parameters into them: from now on it is a plain network."""
        values = self.answering(at, at.number)
        with torch.no_grad():
            for name, value in values.items():
                at.model.get_parameter(name).copy_(value)

    def kept(self) -> Mapping[str, float]:
        """The share of each level of a search that stands."""
        return {}

    def account(self, at: Stand) -> Mapping[str, Any]:
        """What is noted of the task that just ended, as JSON data."""
        return {}

    def answering(self, at: Stand, number: int) -> Mapping[str, Tensor]:
        """What stands in for parameters when task ``number`` is evaluated: methods that are told the task use it."""
        return {}


def norms_stay(model: nn.Module) -> None:
    """BatchNorms answer by the running statistics that they have, and keep them, until the network trains again."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def along(at: Stand, name: str, values: Tensor | None = None) -> AxisTensor:
    """A tensor of the shape of a parameter, zeros unless given."""
    own = at.parameters()[name]
    return AxisTensor(torch.zeros_like(own) if values is None else values, at.axes.shapes[name])


def flags(at: Stand, name: str) -> AxisTensor:
    """False for every entry of a parameter."""
    return AxisTensor(torch.zeros(at.parameters()[name].shape, dtype=torch.bool), at.axes.shapes[name])
