"""Prefixes: the memory that a stage of a search over a growing network needs, predicted before it starts."""

from collections.abc import Callable
from functools import cache, partial

from torch import nn

from regrow.evaluation.memory import Step, predict_memory
from regrow.sources import Batch


def prefix_peaks(prefix: Callable[[int, int], nn.Module], batch: Batch, step: Step) -> Callable[[int, int], int]:
    """(first part that is whole, last part that runs) → the most bytes that learning there needs; each found once.

    Args:
        prefix: Builds the network that runs there: parts before the first have a share of their operations; those
            behind the last take their parameters and no more.
        batch: What it learns from; only its shapes count.
        step: The step that will learn, called with such a network and the batch.
    """

    @cache
    def peak(first: int, last: int) -> int:
        return predict_memory(partial(prefix, first, last), batch, step).peak

    return peak
