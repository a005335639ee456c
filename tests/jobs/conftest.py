"""What tests of commands share: the memory plan of a search space is made once."""

from collections.abc import Callable, Iterator

import pytest
import torch

from regrow.core.candidates import Prefix
from regrow.core.sources import Batch
from regrow.evaluation import prefix_peaks
from regrow.evaluation.memory import Step
from regrow.jobs import spaces

PEAKS: dict[tuple[str, bool, tuple[int, ...], int, int], int] = {}
"""Modules, whether they recompute, shape of the batch, first and last part → the predicted peak in bytes."""


@pytest.fixture(scope="module")
def plan_once() -> Iterator[None]:
    """Predict the memory of equal prefixes of a space once; a prediction depends on modules and shapes alone."""

    def cached(prefix: Callable[[int, int], Prefix], batch: Batch, step: Step) -> Callable[[int, int], int]:
        predict = prefix_peaks(prefix, batch, step)

        def peak(first: int, last: int) -> int:
            with torch.device("meta"):
                net = prefix(first, last)
            key = (repr(net), bool(net.net.recomputed), tuple(batch.args[0].shape), first, last)
            if key not in PEAKS:
                PEAKS[key] = predict(first, last)
            return PEAKS[key]

        return peak

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spaces, "prefix_peaks", cached)
        yield
