"""How growing affects training: the share of the gradient in new units, and when the loss has recovered."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.axes import AxisGraph
from regrow.axis_tensor import AxisTensor
from regrow.plan import Plan
from regrow.surgery.parametrize import resize_axis_tensor
from regrow.training.learner import Context, tensor_along
from regrow.training.state import GrowthEvent

SMOOTHING = 0.9
"""The weight of the smoothed loss in its next value."""


def mark_entries(context: Context) -> dict[str, AxisTensor]:
    """``True`` for every entry of every parameter, before a plan is applied."""
    parameters = context.parameters()
    return {name: tensor_along(context, name, torch.ones_like(p, dtype=torch.bool)) for name, p in parameters.items()}


def new_entries(marked: Mapping[str, AxisTensor], axes: AxisGraph, plan: Plan) -> dict[str, Tensor]:
    """Name of a parameter → which of its entries a plan has added, in its new shape.

    Args:
        marked: What :func:`mark_entries` gave before the plan.
        axes: The axes before the plan.
        plan: The plan.
    """
    return {name: ~resize_axis_tensor(one, axes, plan).values for name, one in marked.items()}


def gradient_shares(context: Context, new: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of the squared gradient norm that new entries have, and their share of all entries.

    Args:
        context: The network, with gradients.
        new: Which entries are new.
    """
    parameters = context.parameters()
    squares = {name: p.grad.double().square() for name, p in parameters.items() if p.grad is not None}
    whole = sum(float(square.sum()) for square in squares.values())
    added = sum(float(square[new[name]].sum()) for name, square in squares.items())
    many = sum(int(one.count_nonzero()) for one in new.values())
    return {
        "newborn_gradient": added / whole if whole else 0.0,
        "newborn_entries": many / sum(one.numel() for one in new.values()),
    }


def smooth(before: float | None, loss: float) -> float:
    """The smoothed loss after one more step; the first loss is taken as it is.

    >>> smooth(None, 2.0), round(smooth(2.0, 1.0), 3)
    (2.0, 1.9)
    """
    return loss if before is None else SMOOTHING * before + (1 - SMOOTHING) * loss


def start_watch(loss: float | None) -> dict[str, Any]:
    """The part of a new event that :func:`watch` fills in.

    Args:
        loss: The smoothed loss before the change.
    """
    return {"loss_before": loss, "steps_watched": 0, "recovery_steps": None}


def watch(events: Sequence[GrowthEvent], task: int, loss: float) -> tuple[GrowthEvent, ...]:
    """The events after one more step: counted in those of the current task until the smoothed loss has recovered.

    >>> events = ({"task": 0, **start_watch(1.0)},)
    >>> for loss in (1.2, 1.1, 0.9, 1.3):
    ...     events = watch(events, 0, loss)
    >>> events[0]["recovery_steps"], events[0]["steps_watched"]
    (3, 3)
    """
    first = len(events)
    while first and events[first - 1]["task"] == task:
        first -= 1
    if all(is_settled(event) for event in events[first:]):
        return tuple(events)
    return (*events[:first], *(event if is_settled(event) else _watched(event, loss) for event in events[first:]))


def _watched(event: GrowthEvent, loss: float) -> GrowthEvent:
    steps = event["steps_watched"] + 1
    recovered = steps if loss <= event["loss_before"] else None
    return {**event, "steps_watched": steps, "recovery_steps": recovered}


def is_settled(event: GrowthEvent) -> bool:
    """Whether there is nothing more to watch: the loss has recovered, or there was none before."""
    return event.get("recovery_steps") is not None or event.get("loss_before") is None
