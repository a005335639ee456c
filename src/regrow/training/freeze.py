"""Networks that are not trained for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def freeze(*models: nn.Module) -> Iterator[None]:
    """Inside, networks are in evaluation mode and their parameters have no gradients; both are restored afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]
    for model in models:
        model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
