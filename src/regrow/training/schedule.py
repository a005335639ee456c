"""How a network is trained: optimizer and learning rates (schedule), and batches, epochs and classes (phases)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import CLASSIFICATION, Objective
from regrow.core.plan import Plan
from regrow.core.tasks import Examples, Task
from regrow.settings.constraints import CheckedSettings, OneOf, Range
from regrow.surgery.layout import resize_axis_tensor
from regrow.training.learner import Context, Learner

# An empty axis graph, for networks whose shape does not change in training.
NO_AXES = AxisGraph({}, {}, frozenset())
# Per step: the batches whose mean loss is minimised, and a batch of the second part of the training examples.
Batches = Iterator[tuple[Sequence[Any], Examples | None]]


# Name of a parameter, or ``learner NAME`` of a learner's tensor → its optimizer state, key such as exp_avg → value.
Moments = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Schedule(CheckedSettings):
    """Settings of a training: optimizer, learning-rate schedule, gradient clipping, precision and seed."""

    optimizer: Annotated[str, OneOf("sgd", "adamw")] = "sgd"  # sgd has momentum 0.9, Nesterov
    lr: Annotated[float, Range(0, exclusive_minimum=True)] = 0.01  # the largest
    weight_decay: float = 0.0
    # cosine: the learning rate falls to 0 over the steps of each task
    decay: Annotated[str, OneOf("constant", "cosine")] = "constant"
    warm_up: float = 0.0  # the fraction of a task's steps over which the learning rate first rises to its full value
    clip: float = 0.0  # the largest norm of the gradient; larger ones are scaled down to it; 0: no limit
    # bfloat16: losses are computed in mixed precision; parameters, moments and the learner's state stay in float32
    precision: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    seed: int = 0  # of the order of batches, and of everything random in a learner
    # From parameter groups to an optimizer of the user's own, which replaces the first three fields.
    build_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None

    def make_optimizer(self, groups: Any) -> torch.optim.Optimizer:
        """Return a new optimizer of parameter groups, with the largest learning rate."""
        if self.build_optimizer is not None:
            return self.build_optimizer(groups)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay)

    def lr_factor(self, step: int, steps: int) -> float:
        """Return the learning rate of a step (from 0; ``steps``: their number) as a fraction of the largest one.

        >>> schedule = Schedule(decay="cosine", warm_up=0.1)
        >>> [round(schedule.lr_factor(step, 20), 2) for step in (0, 1, 2, 11, 19)]
        [0.5, 1.0, 1.0, 0.5, 0.01]
        """
        warm_up_steps = max(1, int(self.warm_up * steps)) if self.warm_up else 0
        if step < warm_up_steps:
            return (step + 1) / warm_up_steps
        if self.decay == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up_steps) / max(1, steps - warm_up_steps)))


@dataclass(frozen=True)
class Phase:
    """One task of the training loop: its batches, epochs and classes."""

    task: Task
    epochs: tuple[int, ...]  # the number of steps of each epoch
    batches: Callable[[Context], Batches]  # context, whose ``epoch`` tells the epoch → what its steps take
    classes: Tensor | None = None  # the classes among which predictions are made, [classes] bool; None for all
    seeded: bool = True  # whether each epoch first sets the global seed, for Dropout and augmentation
    objective: Objective = CLASSIFICATION


def source_phase(name: str, epochs: Sequence[int], batches: Callable[[int], Sequence[Any]]) -> Phase:
    """Return a phase called ``name`` whose steps train on what ``batches`` gives, rather than on a task's examples.

    ``epochs``: the number of steps of each epoch; ``batches``: the number of the step, counted over all epochs → its
    batches. The global seed is not set (``seeded``).
    """

    def batches_of(context: Context) -> Batches:
        first = sum(epochs[: context.epoch])
        return ((batches(step), None) for step in range(first, first + epochs[context.epoch]))

    return Phase(Task.of_gone(name, (), (0,)), tuple(epochs), batches_of, seeded=False)


class Optimizers:
    """The optimizer of the network, and that of its learner's tensors if they have their own.

    They train nothing before :meth:`register`, which is called again after each change of shape.
    """

    def __init__(self, schedule: Schedule, learner: Learner[Any]) -> None:
        self.scheduled = learner.scheduled
        groups: list[dict[str, Any]] = [{"params": []}]
        self.network = schedule.make_optimizer(groups)
        self.largest_lr = float(self.network.param_groups[0]["lr"])  # a user's optimizer has its own
        self.all: list[torch.optim.Optimizer] = [self.network]
        if learner.optimizer == "adam":
            self.all.append(torch.optim.Adam([{"params": []}], betas=(0.5, 0.999)))

    def set_rates(self, factor: float) -> None:
        """Set the learning rates that follow the schedule to ``factor`` times their largest values."""
        self.network.param_groups[0]["lr"] = self.largest_lr * factor
        if self.scheduled:
            for group in self.all[-1].param_groups:
                if "largest_lr" in group:
                    group["lr"] = group["largest_lr"] * factor

    def clear_gradients(self) -> None:
        """Set the gradients of everything that is trained to ``None``."""
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Take one optimizer step for everything that is trained."""
        for optimizer in self.all:
            optimizer.step()

    def register(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor]) -> None:
        """Train exactly the parameters that require gradients and the tensors with an lr; drop the state of others.

        Both mappings are by name. Sets ``requires_grad`` of those tensors.
        """
        self.network.param_groups[0]["params"] = [p for p in parameters.values() if p.requires_grad]
        by_rate: dict[float, list[Tensor]] = {}
        for tensor in tensors.values():
            if tensor.lr is not None:
                by_rate.setdefault(tensor.lr, []).append(tensor.values.requires_grad_())
        last = self.all[-1]
        del last.param_groups[1 if last is self.network else 0 :]
        for rate, values in by_rate.items():
            last.add_param_group({"params": values, "lr": rate, "largest_lr": rate, "weight_decay": 0.0})
        registered = {id(p) for optimizer in self.all for group in optimizer.param_groups for p in group["params"]}
        for optimizer in self.all:
            for stale in [tensor for tensor in optimizer.state if id(tensor) not in registered]:
                del optimizer.state[stale]

    def follow(self, old: Mapping[str, AxisTensor], new: Mapping[str, AxisTensor], axes: AxisGraph, plan: Plan) -> None:
        """Resize the optimizer state of the learner's tensors after a plan; surgery does that of the parameters.

        ``old`` and ``new``: the tensors before and after it, by the same names; ``axes``: those before it.
        """

        def resize(value: Any, like: AxisTensor) -> Any:
            if not isinstance(value, Tensor) or not value.dim():
                return value  # such as the number of steps
            return resize_axis_tensor(AxisTensor(value, like.dims), axes, plan).values

        state = self.all[-1].state
        for name, tensor in old.items():
            if entries := state.pop(tensor.values, {}):
                state[new[name].values] = {key: resize(value, tensor) for key, value in entries.items()}

    def moments(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor]) -> Moments:
        """Return the optimizer state of every trained tensor that has one, by name (:data:`Moments`), not copied."""
        return {
            name: dict(optimizer.state[tensor])
            for name, tensor, optimizer in self._trained(parameters, tensors)
            if tensor in optimizer.state
        }

    def restore(
        self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor], moments: Moments
    ) -> None:
        """Set the optimizer state to copies of what :meth:`moments` returned; step counts stay on their device."""
        for name, tensor, optimizer in self._trained(parameters, tensors):
            if name in moments:
                optimizer.state[tensor] = {
                    key: value.to(tensor.device if value.dim() else value.device, copy=True)
                    if isinstance(value, Tensor)
                    else value
                    for key, value in moments[name].items()
                }

    def _trained(
        self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AxisTensor]
    ) -> Iterator[tuple[str, Tensor, torch.optim.Optimizer]]:
        """Yield (key in :data:`Moments`, tensor, its optimizer) of all parameters and of the tensors with an lr."""
        for name, parameter in parameters.items():
            yield name, parameter, self.network
        for name, tensor in tensors.items():
            if tensor.lr is not None:
                yield f"learner {name}", tensor.values, self.all[-1]
