"""One training step, and one change of shape: gradients, plans, and Ctrl-C held back while the state changes."""

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch

from regrow.core.candidates import all_parts_active
from regrow.core.plan import Plan
from regrow.core.tasks import Examples
from regrow.distributed.parallel import Parallel
from regrow.surgery import apply
from regrow.surgery.gate import parametrize
from regrow.training.learner import Boundary, Context, Event, Learner, Step
from regrow.training.schedule import Optimizers
from regrow.training.shared_rows import share_rows
from regrow.training.state import axis_tensors, follow_plan

S = TypeVar("S")


def compute_gradients(
    learner: Learner[S],
    state: S,
    context: Context,
    index: int,
    batches: Sequence[Any],
    second: Examples | None,
    precision: str,
    parallel: Parallel,
) -> tuple[Step, float]:
    """Add the gradient of the mean loss over ``batches`` to ``.grad``; return the last batch's step and the mean loss.

    Both are over the batches of all ranks. ``index``: the number of the step in its epoch, from 0; ``second``: its
    batch of the second part of the training examples (``second_share``). Raise ValueError if the loss is not finite.
    """
    device, total, bad_batch = context.device, 0.0, ""
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    second = None if second is None else second.to(device)
    for batch in parallel.share(batches):
        replaced = learner.parametrize(state, context)
        step = Step(index, batch.to(device), second, replaced)
        with ExitStack() as stack:
            if replaced.values:
                stack.enter_context(parametrize(context.model, replaced.values))
            if parallel.by_rows:
                stack.enter_context(share_rows(context.model, parallel.ranks))
            with autocast:
                loss = learner.loss(state, context, step)
            part = loss.value if len(batches) == 1 else loss.value / len(batches)  # of the mean
            part.backward()
        step = replace(step, aux=loss.aux)
        value = part.item()
        total += value
        if not (bad_batch or math.isfinite(value)):
            bad_batch = getattr(batch, "where", "")
    if parallel.ranks.several:
        learned = [tensor.values for tensor in axis_tensors(state).values() if tensor.lr]
        total = parallel.reduce([*context.parameters().values(), *learned], total)
    if not math.isfinite(total):
        place = f" ({bad_batch})" if bad_batch else ""
        raise ValueError(
            f"the loss is {total} in {context.task.name}, epoch {context.epoch + 1}{place}: "
            "use a smaller learning rate (lr), and check that weights and inputs are finite, and something is labelled"
        )
    return step, total


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Hold back Ctrl-C inside the ``with`` block; ``KeyboardInterrupt`` is raised at its end."""
    handler = signal.getsignal(signal.SIGINT)
    # SIGINT is ignored in background jobs of a shell, and only the main thread handles signals.
    if handler in (None, signal.SIG_IGN) or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        raise KeyboardInterrupt


def apply_plan(
    learner: Learner[S], state: S, context: Context, plan: Plan, optimizers: Optimizers | None = None
) -> tuple[Context, S]:
    """Apply a plan to the network, in place, the learner's state and the optimizers' moments.

    Return the new context and the new state, after the learner's ``boundary`` hook for ``Event.PLAN_APPLIED``.
    ``optimizers``: ``None`` outside training.
    """
    before, old_tensors = context, axis_tensors(state)
    # No optimizer knows the group of what a plan brings back yet.
    resized = [optimizers.network] if optimizers and not plan.back else []
    with all_parts_active(context.model):
        model, axes = apply(context.model, context.axes, plan, optimizers=resized, undo=context.undo)
    context = replace(context, model=model, axes=axes, plans_applied=context.plans_applied + 1)
    state = follow_plan(state, before.axes, plan)
    tensors = axis_tensors(state)
    for tensor in tensors.values():
        if tensor.lr is not None:
            tensor.values.requires_grad_()
    if optimizers:
        optimizers.follow(old_tensors, tensors, before.axes, plan)
    state = learner.boundary(state, context, Boundary(Event.PLAN_APPLIED, plan, before))
    if optimizers:
        optimizers.register(context.parameters(), axis_tensors(state))
    return context, state
