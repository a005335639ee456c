"""One training step: its gradients, Ctrl-C held back while the state changes, and steps after a change of shape."""

import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, size_of
from regrow.core.axes.axis import AxisTensor
from regrow.core.candidates import run_whole
from regrow.core.errors import InputError, first_line
from regrow.core.plan import Plan
from regrow.core.sources import MISFITS, to_host
from regrow.core.tasks import Examples
from regrow.distributed.parallel import Parallel
from regrow.surgery import apply
from regrow.surgery.gate import parametrize
from regrow.surgery.insert import renaming
from regrow.surgery.layout import resize_axis_tensor
from regrow.training.learner import Boundary, Context, Event, Learner, Step
from regrow.training.schedule import Optimizers
from regrow.training.shared_rows import sharing_rows
from regrow.training.state import GrowthEvent, axis_tensors, follow_plan

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
    many = parallel.divisor(len(batches))
    for batch in parallel.share(batches):
        where, replaced = getattr(batch, "where", ""), learner.parametrize(state, context)
        step = Step(index, batch.to(device), second, replaced)
        with ExitStack() as stack:
            if replaced.values:
                stack.enter_context(parametrize(context.model, replaced.values))
            if parallel.by_rows:
                stack.enter_context(sharing_rows(context.model, parallel.ranks))
            try:
                with autocast:
                    loss = learner.loss(state, context, step)
            except MISFITS as error:
                if not where or type(error) not in MISFITS:
                    raise
                raise InputError(
                    f"{where}: no loss of it can be computed: {type(error).__name__}: {first_line(error):.200}; give "
                    "batches that the network and the loss take"
                ) from error
            mean = loss.value if many == 1 else loss.value / many
            mean.backward()
        value = mean.item()
        step, total = replace(step, aux=loss.aux), total + value
        damaged = damaged or ("" if math.isfinite(value) else where)
    if parallel.ranks.several:
        trained = [
            *context.parameters().values(),
            *(tensor.values for tensor in axis_tensors(state).values() if tensor.lr),
        ]
        total = parallel.reduce(trained, total)
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
    with run_whole(context.model):
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


SMOOTHING = 0.9
"""The weight of the smoothed loss in its next value."""


def added_entries(model: nn.Module, axes: AxisGraph, plan: Plan) -> dict[str, Tensor]:
    """Return name of a parameter → which of its entries a growth has added; parameters without any are left out."""
    rename = renaming(model, plan)
    old = {rename(name): name for name in axes.shapes}
    result: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name not in old:
            result[name] = torch.ones_like(parameter, dtype=torch.bool)
            continue
        dims = axes.shapes[old[name]]
        before = torch.ones([size_of(dim, axes.sizes()) for dim in dims], dtype=torch.bool)
        new = ~resize_axis_tensor(AxisTensor(before, dims), axes, plan).values
        if bool(new.any()):
            result[name] = new.to(parameter.device)
    return result


def gradient_shares(context: Context, new: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the fraction of the squared gradient norm in new entries, and the fraction of entries that are new.

    ``new`` has positions in flattened parameters: an accelerator would wait for the host to count those of a mask.
    """
    parameters = context.parameters()
    squares = {name: p.grad.double().square() for name, p in parameters.items() if p.grad is not None}
    sums = [square.sum() for square in squares.values()]
    sums += [squares[name].flatten().index_select(0, new[name]).sum() for name in squares if name in new]
    numbers = [float(number) for number in to_host(sums)]
    whole, added = sum(numbers[: len(squares)]), sum(numbers[len(squares) :])
    many = sum(map(len, new.values()))
    return {
        "newborn_gradient": added / whole if whole else 0.0,
        "newborn_entries": many / sum(parameter.numel() for parameter in parameters.values()),
    }


def smooth(before: float | None, loss: float) -> float:
    """Return the exponentially smoothed loss after one more step; the first loss is not smoothed.

    >>> smooth(None, 2.0), round(smooth(2.0, 1.0), 3)
    (2.0, 1.9)
    """
    return loss if before is None else SMOOTHING * before + (1 - SMOOTHING) * loss


def start_watch(loss: float | None) -> dict[str, Any]:
    """Return the fields of a new growth event that :func:`watch` updates."""
    return {"loss_before": loss, "steps_watched": 0, "recovery_steps": None}


def watch(events: Sequence[GrowthEvent], task: int, loss: float) -> tuple[GrowthEvent, ...]:
    """Return the events after one more step: those of the current task count steps until the loss has recovered.

    >>> events = ({"task": 0, **start_watch(1.0)},)
    >>> for loss in (1.2, 1.1, 0.9, 1.3):
    ...     events = watch(events, 0, loss)
    >>> events[0]["recovery_steps"], events[0]["steps_watched"]
    (3, 3)
    """
    if not events or events[-1]["task"] != task:
        return tuple(events)
    return tuple(_watch_event(event, loss) if event["task"] == task else event for event in events)


def _watch_event(event: GrowthEvent, loss: float) -> GrowthEvent:
    if is_settled(event):
        return event
    steps = event["steps_watched"] + 1
    return {**event, "steps_watched": steps, "recovery_steps": steps if loss <= event["loss_before"] else None}


def is_settled(event: GrowthEvent) -> bool:
    """Whether an event needs no more watching: the loss has recovered, or there was no loss before the change."""
    return event.get("recovery_steps") is not None or event.get("loss_before") is None
