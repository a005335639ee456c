"""Detect boundaries between tasks: where the training loss jumps."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt

from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.core.tasks import Examples
from regrow.training.hooks import inputs_of
from regrow.training.learner import Context

JUMP, CONFIRMED, ARMED = 3.0, 4, 50  # in standard deviations; steps of a jump in a row; steps after a boundary


@dataclass(frozen=True)
class LossWatch:
    """The running mean and variance of the training loss since the last boundary, and the jumps at its end.

    >>> watch = LossWatch()
    >>> for step in range(100):
    ...     watch = watch.see(0.5 + 0.1 * (step % 2))
    >>> for _ in range(4):
    ...     watch = watch.see(1.0)
    >>> round(watch.mean, 2), watch.detected
    (0.55, True)
    """

    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0
    jumps: int = 0

    @property
    def detected(self) -> bool:
        """Whether a boundary lies before the last jumps."""
        return self.jumps >= CONFIRMED

    def see(self, loss: float) -> "LossWatch":
        """Return the watch after one more step."""
        if self.steps >= ARMED and loss > self.mean + JUMP * sqrt(self.variance):
            return replace(self, jumps=self.jumps + 1)
        rate, change = max(0.02, 1 / (self.steps + 1)), loss - self.mean
        variance = (1 - rate) * (self.variance + rate * change**2)
        return LossWatch(self.mean + rate * change, variance, self.steps + 1)


def with_recent_examples(context: Context, rows: Mapping[str, AxisTensor], seen: int) -> Context:
    """Return a context whose task has the examples of a replay memory, to which ``seen`` were offered, to train on.

    Of the classes of the present task, predictions are made among those that the examples have.
    """
    stored: dict[str, Tensor] = {name: tensor.values[:seen] for name, tensor in rows.items()}
    examples = Examples(inputs_of(stored), stored["labels"])
    classes = context.classes
    if classes is not None:
        classes = classes.clone()
        classes[list(context.task.classes)] = False
        classes[examples.labels[examples.labels >= 0].to(classes.device)] = True
    return replace(context, task=replace(context.task, train=examples), classes=classes)
