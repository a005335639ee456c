"""Calling a network on a batch: in eval mode, without gradients, on its device, and put back as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regrow.sources import Batch, logits_in, moved


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """The model in eval mode without gradients; every module's mode comes back afterwards.

    Yields:
        The device of the model's parameters.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            parameter = next(model.parameters(), None)
            yield torch.device("cpu") if parameter is None else parameter.device
    finally:
        for module, mode in modes:
            module.training = mode


def logits_of(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """The logits that the model gives for a batch, in the dtype it computes them in.

    Raises:
        TypeError: If the model returns no tensor of logits.
    """
    return logits_in(model(*moved(batch.args, device), **moved(dict(batch.kwargs), device)))
