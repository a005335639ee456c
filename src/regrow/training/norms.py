"""Running statistics of BatchNorm in training: kept or updated."""

from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.training.learner import Boundary, Context, Event, set_train_mode

S = TypeVar("S")


def freeze_norms(model: nn.Module) -> None:
    """Put BatchNorm modules in evaluation mode, so that they use and keep their running statistics.

    Args:
        model: The network, changed in place.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def train_with_frozen_norms(state: S, context: Context, boundary: Boundary) -> S:
    """Hook ``boundary``: training mode when an epoch starts; after the first task, BatchNorm keeps its statistics.

    Args:
        state: The learner's state, returned as it is.
        context: The network.
        boundary: The event.
    """
    set_train_mode(state, context, boundary)
    if boundary.event == Event.EPOCH_START and context.number:
        freeze_norms(context.model)
    return state
