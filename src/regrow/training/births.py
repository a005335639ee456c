"""What a growth does to training: how much of the gradient new entries get, and when the loss is back."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from regrow.axes import AxisGraph
from regrow.axis_tensor import AxisTensor
from regrow.learner import Stand, along
from regrow.plan import Plan
from regrow.surgery.parametrize import resize_axis_tensor

SMOOTHING = 0.9
"""How much of the smoothed loss stays at each step."""


def entries(at: Stand) -> dict[str, AxisTensor]:
    """True for every entry of every parameter, before a plan is carried out."""
    return {name: along(at, name, torch.ones_like(p, dtype=torch.bool)) for name, p in at.parameters().items()}


def young(there: Mapping[str, AxisTensor], axes: AxisGraph, plan: Plan) -> dict[str, Tensor]:
    """Name of a parameter → which of its entries a plan added, in its new shape.

    Args:
        there: What :func:`entries` gave before it.
        axes: The axes before it.
        plan: The plan.
    """
    return {name: ~resize_axis_tensor(one, axes, plan).values for name, one in there.items()}


def shares(at: Stand, young: Mapping[str, Tensor]) -> dict[str, float]:
    """What new entries have of the gradient as it stands, by its squared norm, and of all entries.

    Args:
        at: Where the network stands; gradients have been taken.
        young: Which entries are new.
    """
    parameters = at.parameters()
    squares = {name: p.grad.double().square() for name, p in parameters.items() if p.grad is not None}
    whole = sum(float(square.sum()) for square in squares.values())
    new = sum(float(square[young[name]].sum()) for name, square in squares.items())
    many = sum(int(one.count_nonzero()) for one in young.values())
    return {
        "newborn_gradient": new / whole if whole else 0.0,
        "newborn_entries": many / sum(one.numel() for one in young.values()),
    }


def smoothed(before: float | None, loss: float) -> float:
    """The smoothed loss after one more step; the first stands for itself.

    >>> smoothed(None, 2.0), round(smoothed(2.0, 1.0), 3)
    (2.0, 1.9)
    """
    return loss if before is None else SMOOTHING * before + (1 - SMOOTHING) * loss


def begun(loss: float | None) -> dict[str, Any]:
    """What an event holds of recovery when the growth has just happened, and the smoothed loss was this."""
    return {"loss_before": loss, "steps_watched": 0, "recovery_steps": None}


def watched(events: Sequence[dict[str, Any]], task: int, loss: float) -> None:
    """Note of the growths of a task that one more step has been made, and whether the smoothed loss is back.

    >>> event = {"task": 0, **begun(1.0)}
    >>> for loss in (1.2, 1.1, 0.9, 1.3):
    ...     watched([event], 0, loss)
    >>> event["recovery_steps"], event["steps_watched"]
    (3, 3)
    """
    for event in takewhile(lambda event: event["task"] == task, reversed(events)):
        if not over(event):
            event["steps_watched"] += 1
            if loss <= event["loss_before"]:
                event["recovery_steps"] = event["steps_watched"]


def over(event: Mapping[str, Any]) -> bool:
    """Whether there is nothing more to watch: the loss is back, or there was none before."""
    return event.get("recovery_steps") is not None or event.get("loss_before") is None
