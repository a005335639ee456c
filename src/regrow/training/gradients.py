"""The first half of a training step: losses and gradients."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch

from regrow.sources import device_of
from regrow.surgery.parametrize import parametrize
from regrow.training.learner import Context, Learner, Step

S = TypeVar("S")


def compute_gradients(
    learner: Learner[S], state: S, context: Context, step: Step, batches: Sequence[Any], precision: str = "float32"
) -> tuple[Step, float]:
    """Run the learner's loss on some batches, and add the gradient of their mean to the present gradients.

    Args:
        learner: The learner, which computes the loss.
        state: The learner's state.
        context: The network.
        step: The step, without a batch.
        batches: The batches; each has a method ``to(device)``.
        precision: The precision in which losses are computed: ``float32`` or ``bfloat16``.

    Returns:
        The step with the last batch, its replacements and its ``aux``; and the mean loss.

    Raises:
        ValueError: If the loss is not finite.
    """
    device, total = device_of(context.model), 0.0
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    second = step.second.to(device) if step.second else None
    for batch in batches:
        step = Step(step.index, batch.to(device), second, learner.parametrize(state, context))
        with parametrize(context.model, step.replaced.values):
            with autocast:
                loss = learner.loss(state, context, step)
            mean = loss.value if len(batches) == 1 else loss.value / len(batches)
            mean.backward()
        step, total = replace(step, aux=loss.aux), total + float(mean.detach())
    if not math.isfinite(total):
        raise ValueError(
            f"the loss is {total} in {context.task.name}, epoch {context.epoch + 1}: use a smaller learning rate (lr), "
            "and check that weights and inputs are finite"
        )
    return step, total
