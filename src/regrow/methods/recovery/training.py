"""Training after a cut: one course of steps that can be stopped anywhere, judged on text that no step has seen."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.methods.recovery.task import Stand, Task, device_of
from regrow.sources import Batch, drawn

SECONDS = 120.0
"""A stand is kept at least this often, besides at every check."""


@dataclass(frozen=True)
class Course:
    """How a network is trained.

    Args:
        lr: The largest learning rate: it rises over the first tenth of the steps, then falls as a half cosine.
        weight_decay: AdamW's.
        passes: How often each batch is seen.
        windows: Batches per step, taken from the sources in turn.
        checks: How often the held-out part judges; the best of these and of the start is kept.
        held_out: Which share of each source that is.
        clip: Largest norm of the gradient.
    """

    lr: float
    weight_decay: float = 0.0
    passes: int = 1
    windows: int = 4
    checks: int = 4
    held_out: float = 0.125
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("passes", "windows", "checks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1; got {getattr(self, name)}")


def trained(
    task: Task, parameters: Mapping[str, nn.Parameter], loss: Callable[[Batch], Tensor], course: Course
) -> dict[str, Any]:
    """Train some parameters, which end at the best of the stands that the held-out part has judged.

    Args:
        task: What to learn from, and where an earlier call stood.
        parameters: Name → what moves; the rest of the network rests.
        loss: A batch (on the network's device) → a scalar with a gradient, mean per position.
        course: How.

    Returns:
        ``steps``, ``best`` (the step that was kept) and ``history``: the held-out loss after some steps, as JSON data.

    Raises:
        ValueError: If there is nothing to learn from, or the loss stops being finite.
    """
    fit, held = task.parts(course.held_out)
    device = device_of(task.model)
    held = [batch.to(device) for batch in held]
    steps = max(1, round(course.passes * sum(map(len, fit)) / course.windows))
    marks = {round(steps * (i + 1) / course.checks) for i in range(course.checks)} | {steps}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(list(parameters.values()), course.lr, weight_decay=course.weight_decay)
    if task.done is None:
        history = [{"step": 0, "held_out": _judged(held, loss)}]
        best, first = {name: p.detach().clone() for name, p in parameters.items()}, 0
    else:
        history, first = [dict(row) for row in task.done.values["history"]], task.done.step
        best = _resumed(task.done, parameters, optimiser)
    at, last = first, time.monotonic()
    try:
        for step in range(first, steps + 1):
            if step in marks and history[-1]["step"] < step:
                found = _judged(held, loss)
                if found < min(row["held_out"] for row in history):
                    best = {name: p.detach().clone() for name, p in parameters.items()}
                history.append({"step": step, "held_out": found})
                last = -math.inf
            if time.monotonic() - last > SECONDS:
                task.kept(_stand(at, parameters, optimiser, best, history))
                last = time.monotonic()
            if step < steps:
                for group in optimiser.param_groups:
                    group["lr"] = course.lr * rate(step, steps)
                batches = [batch.to(device) for _, batch in drawn(fit, course.windows, step, task.seed)]
                total = _pushed(batches, loss, optimiser, list(parameters.values()), course.clip)
                with unbroken():
                    optimiser.step()
                    at = step + 1
                task.progress(at, steps, f"training, loss {total:.3f}")
    except KeyboardInterrupt:
        task.kept(_stand(at, parameters, optimiser, best, history))
        raise
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    kept = min(history, key=lambda row: row["held_out"])
    return {"steps": steps, "best": kept["step"], "history": history}


@contextmanager
def unbroken() -> Iterator[None]:
    """Let Ctrl-C wait until what is inside is done, so that it is done as a whole."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as of jobs that a shell runs behind
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a rise over the first tenth, then a half cosine.

    >>> [round(rate(step, 20), 2) for step in (0, 1, 2, 11, 19)]
    [0.5, 1.0, 1.0, 0.5, 0.01]
    """
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _pushed(
    batches: list[Batch],
    loss: Callable[[Batch], Tensor],
    optimiser: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    clip: float,
) -> float:
    """Put gradients in place; the loss."""
    total = 0.0
    optimiser.zero_grad(set_to_none=True)
    for batch in batches:
        one = loss(batch) / len(batches)
        if not torch.isfinite(one):
            raise ValueError("the loss is no longer finite; use a smaller learning rate (lr)")
        one.backward()
        total += float(one.detach())
    nn.utils.clip_grad_norm_(parameters, clip)
    return total


def _judged(held: list[Batch], loss: Callable[[Batch], Tensor]) -> float:
    with torch.no_grad():
        return math.fsum(float(loss(batch)) for batch in held) / len(held)


def _stand(
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    history: list[dict[str, Any]],
) -> Stand:
    tensors = {f"now {name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"best {name}": tensor for name, tensor in best.items()}
    for name, parameter in parameters.items():
        moments = optimiser.state[parameter]
        tensors |= {f"{what} {name}": torch.as_tensor(moment) for what, moment in moments.items()}
    return Stand(step, tensors, {"history": [dict(row) for row in history]})


def _resumed(
    done: Stand, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> dict[str, Tensor]:
    best = {}
    for key, tensor in done.tensors.items():
        what, _, name = key.partition(" ")
        parameter = parameters[name]
        match what:
            case "now":
                with torch.no_grad():
                    parameter.copy_(tensor)
            case "best":
                best[name] = tensor.to(parameter)
            case _:
                optimiser.state[parameter][what] = tensor.clone() if what == "step" else tensor.clone().to(parameter)
    return best
