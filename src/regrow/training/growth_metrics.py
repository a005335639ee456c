"""Metrics of growth: the fraction of the gradient in new units, and the steps until the loss has recovered."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.core.axes import AxisGraph
from regrow.core.axis_tensor import AxisTensor
from regrow.core.plan import Plan
from regrow.core.sources import to_host
from regrow.surgery.layout import resize_axis_tensor
from regrow.training.learner import Context, tensor_along
from regrow.training.state import GrowthEvent

SMOOTHING = 0.9
"""The weight of the smoothed loss in its next value."""


def mark_entries(context: Context) -> dict[str, AxisTensor]:
    """Return an all-``True`` tensor for every parameter, from which :func:`new_entries` finds what a plan adds.

    Args:
        context: The network before the plan.
    """
    parameters = context.parameters()
    return {name: tensor_along(context, name, torch.ones_like(p, dtype=torch.bool)) for name, p in parameters.items()}


def new_entries(marked: Mapping[str, AxisTensor], axes: AxisGraph, plan: Plan) -> dict[str, Tensor]:
    """Return the positions in every flattened parameter that a plan has added, by name, ``[entries]`` int64.

    Args:
        marked: The result of :func:`mark_entries` before the plan.
        axes: The axes before the plan.
        plan: The plan.
    """
    kept = {name: resize_axis_tensor(one, axes, plan).values for name, one in marked.items()}
    return {name: (~one).flatten().nonzero().flatten() for name, one in kept.items()}


def gradient_shares(context: Context, new: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of the squared gradient norm in new entries, and the fraction of entries that are new.

    Args:
        context: The network, with gradients.
        new: Parameter name → the positions of its new entries, in the flattened parameter.
    """
    parameters = context.parameters()
    squares = {name: p.grad.double().square() for name, p in parameters.items() if p.grad is not None}
    sums = [square.sum() for square in squares.values()]
    sums += [square.flatten().index_select(0, new[name]).sum() for name, square in squares.items()]
    numbers = [float(one) for one in to_host(sums)]
    whole, added = sum(numbers[: len(squares)]), sum(numbers[len(squares) :])
    many = sum(map(len, new.values()))
    return {
        "newborn_gradient": added / whole if whole else 0.0,
        "newborn_entries": many / sum(parameters[name].numel() for name in new),
    }


def smooth(before: float | None, loss: float) -> float:
    """Return the exponentially smoothed loss after one more step; the first loss is not smoothed.

    Args:
        before: The smoothed loss so far; ``None`` before the first step.
        loss: The loss of the step.

    >>> smooth(None, 2.0), round(smooth(2.0, 1.0), 3)
    (2.0, 1.9)
    """
    return loss if before is None else SMOOTHING * before + (1 - SMOOTHING) * loss


def start_watch(loss: float | None) -> dict[str, Any]:
    """Return the fields of a new growth event that :func:`watch` updates.

    Args:
        loss: The smoothed loss before the change of shape.
    """
    return {"loss_before": loss, "steps_watched": 0, "recovery_steps": None}


def watch(events: Sequence[GrowthEvent], task: int, loss: float) -> tuple[GrowthEvent, ...]:
    """Return the events after one more step: those of the current task count steps until the loss has recovered.

    Args:
        events: One row per change of shape.
        task: The number of the current task.
        loss: The smoothed loss.

    >>> events = ({"task": 0, **start_watch(1.0)},)
    >>> for loss in (1.2, 1.1, 0.9, 1.3):
    ...     events = watch(events, 0, loss)
    >>> events[0]["recovery_steps"], events[0]["steps_watched"]
    (3, 3)
    """
    if not events:
        return ()
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
    """Whether an event needs no more watching: the loss has recovered, or there was no loss before the change.

    Args:
        event: The event.
    """
    return event.get("recovery_steps") is not None or event.get("loss_before") is None
