"""Run a network in eval mode without gradients on its own device, and restore its modes afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regrow.core.sources import Batch, device_of, logits_in, moved


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put the model in eval mode without gradients for the block; every module's mode is restored.

    Args:
        model: The network.

    Yields:
        The device of the model's parameters.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield device_of(model)
    finally:
        for module, mode in modes:
            module.training = mode


def logits_of(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Run the model on a batch and return its logits, in the dtype in which they were computed.

    Args:
        model: The network.
        batch: Its inputs; they are moved to the device.
        device: The device of the model.

    Raises:
        TypeError: If the model returns no tensor of logits.
    """
    return logits_in(model(*moved(batch.args, device), **moved(dict(batch.kwargs), device)))
