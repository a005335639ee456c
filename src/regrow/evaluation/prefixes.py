"""Prefixes: the memory that a stage of a search over a network of cells needs, predicted before it starts."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from regrow.evaluation.memory import Step, predicted
from regrow.nets.cells import Cells, Prefix, thinned
from regrow.sources import Batch


def prefix_peaks(config: Mapping[str, Any], batch: Batch, step: Step, share: float) -> Callable[[int, int], int]:
    """(first cell that is whole, last cell that runs) → the most bytes that learning there needs; each found once.

    Cells before the first have a share of their operations; those behind the last take their parameters and no more.

    Args:
        config: The description of the network as it is now.
        batch: What it learns from; only its shapes count.
        step: The step that will learn, called with a :class:`~regrow.nets.cells.Prefix` and the batch.
        share: What share of its operations an earlier cell is taken to have. A search towards 0.3 that then regrows
            a fifth of what it took out has 0.3 + 0.2 · 0.7 = 0.44.
    """

    @cache
    def peak(first: int, last: int) -> int:
        heads = sorted({*config["heads"], last})
        small = thinned({**config, "heads": heads}, first, share)
        return predicted(lambda: Prefix(Cells(small), last), batch, step).peak

    return peak
