"""What a network that learns task after task still knows: the accuracy matrix, and what is read from it.

``R[i][j]`` is the accuracy on task ``j`` after task ``i`` has been learned, ``b[j]`` that of the network before any.
What was not measured, for want of examples, is not a number, and figures are taken over the rest.
The words mean what they mean in Lopez-Paz and Ranzato (arXiv 1706.08840) and Chaudhry et al. (arXiv 1801.10112).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isnan, nan
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from regrow.evaluation.forward import evaluating
from regrow.sources import logits_in
from regrow.tasks import Examples, among


@dataclass(frozen=True)
class Matrix:
    """The accuracy matrix.

    Args:
        rows: ``R``: per task learned, the accuracy on every task known by then, those to come included.
        before: ``b``.

    >>> m = Matrix(((0.9, 0.2), (0.6, 0.8)), (0.1, 0.1))
    >>> [round(x, 3) for x in (m.average, m.average_along, m.backward_transfer, m.forgetting, m.learning)]
    [0.7, 0.8, -0.3, 0.3, 0.85]
    >>> round(m.forward_transfer, 3)
    0.1
    """

    rows: tuple[tuple[float, ...], ...]
    before: tuple[float, ...]

    @property
    def average(self) -> float:
        """Final average accuracy: mean over tasks of R[T][j]."""
        return _mean(self.rows[-1][: len(self.rows)])

    @property
    def average_along(self) -> float:
        """Average accuracy along the way: mean over i of the mean of R[i][j] over the tasks seen, j ≤ i."""
        return _mean(_mean(row[: i + 1]) for i, row in enumerate(self.rows))

    @property
    def learning(self) -> float:
        """Learning accuracy: mean of R[j][j]."""
        return _mean(row[i] for i, row in enumerate(self.rows))

    @property
    def backward_transfer(self) -> float:
        """Mean over all but the last task of R[T][j] − R[j][j]; 0 for one task."""
        past = range(len(self.rows) - 1)
        return _mean(self.rows[-1][j] - self.rows[j][j] for j in past) if past else 0.0

    @property
    def forgetting(self) -> float:
        """Mean over all but the last task of (most of R[i][j] over j ≤ i < T) − R[T][j]; 0 for one task."""
        past = range(len(self.rows) - 1)
        best = [max((row[j] for row in self.rows[j:-1] if not isnan(row[j])), default=nan) for j in past]
        return _mean(top - self.rows[-1][j] for j, top in enumerate(best)) if past else 0.0

    @property
    def forward_transfer(self) -> float:
        """Mean over all but the first task of R[j−1][j] − b[j], where the task was known by then; 0 for none."""
        later = [j for j in range(1, len(self.rows)) if len(self.rows[j - 1]) > j]
        return _mean(self.rows[j - 1][j] - self.before[j] for j in later) if later else 0.0

    def record(self) -> dict[str, Any]:
        """The matrix and every figure as JSON data."""
        names = ("average", "average_along", "learning", "backward_transfer", "forward_transfer", "forgetting")
        return {
            "matrix": [list(row) for row in self.rows],
            "before": list(self.before),
            **{name: getattr(self, name) for name in names},
        }

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Matrix":
        """The inverse of :meth:`record`."""
        rows = (*record["matrix"], record["before"])
        *matrix, before = (tuple(nan if value is None else value for value in row) for row in rows)
        return cls(tuple(matrix), before)


def _mean(values: Iterable[float]) -> float:
    there = [value for value in values if not isnan(value)]
    return fmean(there) if there else nan


def share_right(
    model: nn.Module,
    examples: Examples,
    classes: Tensor | None = None,
    size: int = 500,
    ask: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Accuracy: the share of examples whose greatest logit is their label's.

    Args:
        model: Gives logits ``[N, classes]``; evaluated as it answers outside training.
        examples: Inputs and labels.
        classes: The classes that answers are chosen among, ``[classes]`` bool; all unless given.
        size: Examples at a time.
        ask: How the network is asked; by calling it, unless given.
    """
    right = 0
    ask = ask or (lambda inputs: logits_in(model(inputs)))
    with evaluating(model) as device:
        for batch in examples.batches(size):
            logits = among(ask(batch.inputs.to(device)), classes)
            right += int((logits.argmax(-1).cpu() == batch.labels).sum())
    return right / len(examples)
