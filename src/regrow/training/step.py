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
from regrow.training.shared_rows import sharing_rows
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
    """Run the learner's loss on some batches, and add the gradient of their mean to the present gradients."""
    device, total, damaged = context.device, 0.0, ""
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    second = None if second is None else second.to(device)
    many = len(batches)
    for batch in parallel.share(batches):
        where, replaced = getattr(batch, "where", ""), learner.parametrize(state, context)
        step = Step(index, batch.to(device), second, replaced)
        with ExitStack() as stack:
            if replaced.values:
                stack.enter_context(parametrize(context.model, replaced.values))
            if parallel.by_rows:
                stack.enter_context(sharing_rows(context.model, parallel.ranks))
            with autocast:
                loss = learner.loss(state, context, step)
            mean = loss.value if many == 1 else loss.value / many
            mean.backward()
        value = mean.item()
        step, total = replace(step, aux=loss.aux), total + value
        damaged = damaged or ("" if math.isfinite(value) else where)
    if parallel.ranks.several:
        learned = [tensor.values for tensor in axis_tensors(state).values() if tensor.lr]
        total = parallel.reduce([*context.parameters().values(), *learned], total)
    if not math.isfinite(total):
        raise ValueError(
            f"the loss is {total} in {context.task.name}, epoch {context.epoch + 1}{damaged and f' ({damaged})'}: "
            "use a smaller learning rate (lr), and check that weights and inputs are finite, and something is labelled"
        )
    return step, total


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Hold back Ctrl-C inside the ``with`` block; ``KeyboardInterrupt`` is raised at its end."""
    before = signal.getsignal(signal.SIGINT)
    # SIGINT is ignored in background jobs of a shell, and only the main thread handles signals.
    if before in (None, signal.SIG_IGN) or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def apply_plan(
    learner: Learner[S], state: S, context: Context, plan: Plan, optimizers: Optimizers | None = None
) -> tuple[Context, S]:
    """Apply a plan to the network, the learner's state and the optimizers' moments."""
    before, old = context, axis_tensors(state)
    # No optimizer knows the group of what a plan brings back yet.
    following = [optimizers.network] if optimizers and not plan.back else []
    with all_parts_active(context.model):
        model, axes = apply(context.model, context.axes, plan, optimizers=following, undo=context.undo)
    context = replace(context, model=model, axes=axes, applied=context.applied + 1)
    state = follow_plan(state, before.axes, plan)
    tensors = axis_tensors(state)
    for tensor in tensors.values():
        if tensor.lr is not None:
            tensor.values.requires_grad_()
    if optimizers:
        optimizers.follow(old, tensors, before.axes, plan)
    state = learner.boundary(state, context, Boundary(Event.PLAN_APPLIED, plan, before))
    if optimizers:
        optimizers.collect(context.parameters(), axis_tensors(state))
    return context, state
