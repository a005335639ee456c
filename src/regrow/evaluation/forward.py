"""Run a network in eval mode without gradients on its own device, and restore its modes afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from regrow.core.sources import device_of


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put the model in eval mode without gradients for the block; every module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield device_of(model)
    finally:
        for module, mode in modes:
            module.training = mode
