"""Schedules: which batches a network is trained on, for how long, and at which learning rates."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from regrow.core.axes import AxisGraph
from regrow.core.objectives import CLASSIFICATION, Objective
from regrow.core.tasks import Examples, Task
from regrow.training.learner import Context
from regrow.training.optimizers import OptimizerSettings

NO_AXES = AxisGraph({}, {}, frozenset())
"""An empty axis graph, for networks whose shape does not change in training."""
Batches = Iterator[tuple[Sequence[Any], Examples | None]]
"""Per step: the batches whose mean loss is minimised, and a batch of the second part of the training examples."""


@dataclass(frozen=True)
class Schedule:
    """Optimizer, learning-rate schedule, gradient clipping, precision and seed of a training.

    Args:
        optimizer: Optimizer, learning rate and weight decay.
        decay: ``constant``, or ``cosine``: the learning rate falls to 0 over the steps of each task.
        warm_up: The fraction of a task's steps over which the learning rate first rises to its full value.
        clip: The largest norm of the gradient; larger ones are scaled down to it; 0: no limit.
        precision: ``float32``, or ``bfloat16``: losses are computed in mixed precision; parameters, moments and the
            learner's state stay in float32.
        seed: Seed of the order of batches, and of everything random in a learner.
    """

    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    decay: str = "constant"
    warm_up: float = 0.0
    clip: float = 0.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "cosine"):
            raise ValueError(f"decay is constant or cosine, got {self.decay!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"the precision is float32 or bfloat16, got {self.precision!r}")

    def share(self, step: int, steps: int) -> float:
        """Return the learning rate of a step as a fraction of the largest one.

        Args:
            step: The number of the step, from 0.
            steps: The number of steps of all epochs.

        >>> schedule = Schedule(decay="cosine", warm_up=0.1)
        >>> [round(schedule.share(step, 20), 2) for step in (0, 1, 2, 11, 19)]
        [0.5, 1.0, 1.0, 0.5, 0.01]
        """
        rise = max(1, int(self.warm_up * steps)) if self.warm_up else 0
        if step < rise:
            return (step + 1) / rise
        if self.decay == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass(frozen=True)
class Phase:
    """One task of the training loop: its batches, epochs and classes.

    Args:
        task: The task.
        epochs: The number of steps of each epoch.
        batches: Returns the batches of an epoch; called once per epoch. Batches have a method ``to(device)``.
        classes: The classes among which predictions are made, ``[classes]`` bool; ``None`` for all.
        seeded: Whether each epoch first sets the global seed, for Dropout and augmentation.
        objective: What the network is trained for.
        validate: (the learner's state, context) → a score on held-out examples, higher is better; called after each
            epoch. ``None``: not evaluated.
        patience: After how many epochs without a better score the task ends early; 0: never.
    """

    task: Task
    epochs: tuple[int, ...]
    batches: Callable[[Context], Batches]
    classes: Tensor | None = None
    seeded: bool = True
    objective: Objective = CLASSIFICATION
    validate: Callable[[Any, Context], float] | None = None
    patience: int = 0

    def is_over(self, scores: Sequence[float]) -> bool:
        """Whether the task ends early: none of the last ``patience`` scores is the best one.

        Args:
            scores: The scores of all epochs so far.
        """
        return 0 < self.patience < len(scores) and max(scores[-self.patience :]) <= max(scores[: -self.patience])


def source_phase(name: str, epochs: Sequence[int], batches: Callable[[int], Sequence[Any]]) -> Phase:
    """Return a phase that trains on batches of sources instead of a task's examples.

    Args:
        name: The name in progress and error messages.
        epochs: The number of steps of each epoch.
        batches: The number of a step, from 0 → the batches whose mean loss is minimised.
    """

    def batches_of(context: Context) -> Batches:
        first = sum(epochs[: context.epoch])
        return ((batches(step), None) for step in range(first, first + epochs[context.epoch]))

    return Phase(Task.of_gone(name, (), (0,)), tuple(epochs), batches_of, seeded=False)
