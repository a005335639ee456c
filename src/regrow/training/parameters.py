"""Parameters beside which a learner keeps values of its own: copies, quadratic penalties, protected entries."""

from collections.abc import Mapping

import torch
from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.training.learner import Context, Loss, Step, task_loss, tensor_along


def copy_parameters(context: Context) -> dict[str, AxisTensor]:
    """Return a copy of every parameter by name, which follows plans.

    Args:
        context: The network.
    """
    return {name: tensor_along(context, name, one.detach().clone()) for name, one in context.parameters().items()}


def quadratic_loss(
    context: Context,
    step: Step,
    strength: float,
    importance: Mapping[str, AxisTensor],
    anchor: Mapping[str, AxisTensor],
) -> Loss:
    """Return the loss + ``strength`` · Σ importance (θ − anchor)²; the loss alone in the first task.

    Args:
        context: The network.
        step: The batch.
        strength: The weight of the penalty.
        importance: The importance of each parameter to earlier tasks, by name.
        anchor: The values that parameters are held at, by name.
    """
    loss = task_loss(None, context, step).value
    if context.number:
        for name, parameter in context.parameters().items():
            away = parameter - anchor[name].values
            loss = loss + strength * (importance[name].values * away.square()).sum()
    return Loss(loss)


def restore_entries(context: Context, values: Mapping[str, Tensor], protected: Mapping[str, Tensor]) -> None:
    """Set protected entries of parameters back to earlier values, in place.

    Args:
        context: The network.
        values: The earlier values, by name of the parameter.
        protected: Which entries are set back, bool, by name of the parameter.
    """
    parameters = context.parameters()
    with torch.no_grad():
        for name, value in values.items():
            parameter = parameters[name]
            torch.where(protected[name], value, parameter, out=parameter)
