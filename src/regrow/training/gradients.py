"""The first half of a training step: losses and gradients."""

import math
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from regrow.core.errors import InputError, first_line
from regrow.core.sources import MISFITS
from regrow.core.tasks import Examples
from regrow.distributed.parallel import ALONE, Parallel
from regrow.surgery.gate import parametrize
from regrow.training.learner import Context, Learner, Loss, Step
from regrow.training.shared_rows import sharing_rows
from regrow.training.state import axis_tensors

S = TypeVar("S")

NO_CONTEXT = nullcontext()
"""The context manager that does nothing."""


def compute_gradients(
    learner: Learner[S],
    state: S,
    context: Context,
    index: int,
    batches: Sequence[Any],
    second: Examples | None = None,
    precision: str = "float32",
    parallel: Parallel = ALONE,
) -> tuple[Step, float]:
    """Run the learner's loss on some batches, and add the gradient of their mean to the present gradients.

    Args:
        learner: The learner, which computes the loss.
        state: The learner's state.
        context: The network.
        index: The number of the step in its epoch.
        batches: The batches, at least one; each has a method ``to(device)``.
        second: A batch of the second part of the training examples.
        precision: The precision in which losses are computed: ``float32`` or ``bfloat16``.
        parallel: The processes that share the batches, or their examples.

    Returns:
        The step with the last batch of this process, its replacements and its ``aux``; and the mean loss.

    Raises:
        ValueError: If the loss is not finite.
    """
    device, total, damaged = context.device, 0.0, ""
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else None
    second = None if second is None else second.to(device)
    many = parallel.divisor(len(batches))
    for batch in parallel.share(batches):
        here, replaced = batch.to(device), learner.parametrize(state, context)
        step = Step(index, here, second, replaced)
        with ExitStack() as stack:
            if replaced.values:
                stack.enter_context(parametrize(context.model, replaced.values))
            if parallel.by_rows:
                stack.enter_context(sharing_rows(context.model, parallel.ranks))
            loss, mean = _run_backward(learner, state, context, step, autocast, many)
        value = mean.item()
        step, total = Step(index, here, second, replaced, loss.aux), total + value
        damaged = damaged or ("" if math.isfinite(value) else getattr(batch, "where", ""))
    if parallel.ranks.several:
        trained = [*context.parameters().values(), *(one.values for one in axis_tensors(state).values() if one.lr)]
        total = parallel.reduce(trained, total)
    if not math.isfinite(total):
        raise ValueError(
            f"the loss is {total} in {context.task.name}, epoch {context.epoch + 1}{damaged and f' ({damaged})'}: "
            "use a smaller learning rate (lr), and check that weights and inputs are finite, and something is labelled"
        )
    return step, total


def _run_backward(
    learner: Learner[S], state: S, context: Context, step: Step, autocast: torch.autocast | None, many: float
) -> tuple[Loss, Tensor]:
    """Run the loss and the backward pass of a batch; return the loss, and its part of the mean of ``many``."""
    try:
        with autocast or NO_CONTEXT:
            loss = learner.loss(state, context, step)
    except MISFITS as error:
        where = getattr(step.batch, "where", "")
        if not where or type(error) not in MISFITS:
            raise
        raise InputError(
            f"{where}: no loss of it can be computed: {type(error).__name__}: {first_line(error):.200}; give batches "
            "that the network and the loss take"
        ) from error
    mean = loss.value if many == 1 else loss.value / many
    mean.backward()
    return loss, mean
