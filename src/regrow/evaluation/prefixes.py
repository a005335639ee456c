"""Predict the memory of each stage of a search over a growing network before it starts."""

from collections.abc import Callable
from functools import cache, partial

from torch import nn

from regrow.evaluation.memory import Step, predict_memory
from regrow.sources import Batch


def prefix_peaks(prefix: Callable[[int, int], nn.Module], batch: Batch, step: Step) -> Callable[[int, int], int]:
    """Return a function (first whole part, last part that runs) → predicted peak bytes of training; cached.

    Args:
        prefix: Builds the network that runs: parts before the first keep a fraction of their operations; parts behind
            the last only have their parameters.
        batch: The training batch; only its shapes matter.
        step: The training step, called with such a network and the batch.
    """

    @cache
    def peak(first: int, last: int) -> int:
        return predict_memory(partial(prefix, first, last), batch, step).peak

    return peak
