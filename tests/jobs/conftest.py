"""What tests of commands share: the memory plan of a search space is made once."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

from regrow.core.candidates import Prefix
from regrow.core.sources import Batch
from regrow.evaluation.memory import Memory, Step, predict_memory
from regrow.jobs import spaces

MEMORY: dict[tuple[str, bool, tuple[int, ...], tuple[int, ...]], Memory] = {}
"""Modules, whether they recompute, shape of the batch, first and last part → the predicted memory."""


@pytest.fixture(scope="module")
def plan_once() -> Iterator[None]:
    """Predict the memory of equal prefixes of a space once; a prediction depends on modules and shapes alone."""

    def cached(model: nn.Module | partial[Prefix], batch: Batch, step: Step) -> Memory:
        if isinstance(model, nn.Module):
            return predict_memory(model, batch, step)
        with torch.device("meta"):
            net = model()
        key = (repr(net), bool(net.net.recomputed), tuple(batch.args[0].shape), model.args)
        if key not in MEMORY:
            MEMORY[key] = predict_memory(model, batch, step)
        return MEMORY[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spaces, "predict_memory", cached)
        yield
