"""Continual learning metrics: the accuracy matrix and what follows from it (forgetting, transfer).

``R[i][j]`` is the accuracy on task ``j`` after task ``i`` has been learned, ``b[j]`` that of the network before any.
Entries that could not be measured, for lack of examples, are NaN and left out of means. The terms are those of
Lopez-Paz and Ranzato (arXiv 1706.08840) and Chaudhry et al. (arXiv 1801.10112).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan, nan
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from regrow.core.objectives import CLASSIFICATION, Objective, Score
from regrow.core.sources import Batch, logits_in
from regrow.core.tasks import ExampleSet, mask_classes, run_network
from regrow.evaluation.measure import evaluating

BATCH = 500  # examples that are evaluated at a time
METRICS = ("average", "average_along", "learning", "backward_transfer", "forward_transfer", "forgetting")


@dataclass(frozen=True)
class Matrix:
    """The matrix of accuracies (or other scores) in a sequence of tasks; NaN where there are no examples.

    Args:
        rows: ``R``: row i has the accuracies after learning task i on every task known by then, including later ones.
        before: ``b``: the accuracy on each task before any was learned.

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
        """The final average accuracy: mean over tasks of R[T][j]."""
        return _mean(self.rows[-1][: len(self.rows)])

    @property
    def average_along(self) -> float:
        """The average accuracy during learning: mean over i of the mean of R[i][j] over tasks j ≤ i."""
        return _mean(_mean(row[: i + 1]) for i, row in enumerate(self.rows))

    @property
    def learning(self) -> float:
        """The learning accuracy: mean of R[j][j], the accuracy on each task just after learning it."""
        return _mean(row[i] for i, row in enumerate(self.rows))

    @property
    def backward_transfer(self) -> float:
        """Backward transfer: mean over all but the last task of R[T][j] − R[j][j]; 0 for one task."""
        past = range(len(self.rows) - 1)
        return _mean(self.rows[-1][j] - self.rows[j][j] for j in past) if past else 0.0

    @property
    def forgetting(self) -> float:
        """Forgetting: mean over all but the last task of (max over j ≤ i < T of R[i][j]) − R[T][j]; 0 for one task."""
        past = range(len(self.rows) - 1)
        best = [max((row[j] for row in self.rows[j:-1] if not isnan(row[j])), default=nan) for j in past]
        return _mean(top - self.rows[-1][j] for j, top in enumerate(best)) if past else 0.0

    @property
    def forward_transfer(self) -> float:
        """Forward transfer: mean over later tasks j of R[j−1][j] − b[j], where j was known by then; else 0."""
        later = [j for j in range(1, len(self.rows)) if len(self.rows[j - 1]) > j]
        return _mean(self.rows[j - 1][j] - self.before[j] for j in later) if later else 0.0

    def record(self) -> dict[str, Any]:
        """Return the matrix, the accuracies before learning and all of ``METRICS`` as plain data; NaN stays."""
        metrics = {name: getattr(self, name) for name in METRICS}
        return {"matrix": [list(row) for row in self.rows], "before": list(self.before), **metrics}


def _mean(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN if there is none."""
    numbers = [value for value in values if not isnan(value)]
    return fmean(numbers) if numbers else nan


def mean_score(model: nn.Module, examples: ExampleSet, objective: Objective, classes: Tensor | None = None) -> float:
    """Return a network's mean score by an objective, in eval mode: for classification accuracy; NaN without examples.

    ``classes``: which classes a classifier may predict, ``[classes]`` bool; ``None``: all.
    """
    total = Score()
    with evaluating(model) as device:
        for batch in examples.batches(BATCH):
            output = run_network(model, batch.inputs, device, batch.where)
            if objective is CLASSIFICATION:
                output = mask_classes(logits_in(output), classes)
            total += objective.compute_score(output, Batch(labels=batch.labels.to(device), where=batch.where))
    return total.mean
