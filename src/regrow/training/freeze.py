"""Freezing of networks: evaluation mode and no gradients, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def freeze(*models: nn.Module) -> Iterator[None]:
    """Put networks in evaluation mode and turn off their gradients inside the ``with`` block; restore both after it.

    Args:
        *models: The networks.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    for model in models:
        model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
