"""The loop between two proposals of a method: it learns what the method says learns, and never learns its name."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regrow.axes import AxisGraph
from regrow.method import Evidence, Method, State, Training
from regrow.plan import Plan
from regrow.progress import Progress, silent


@dataclass(frozen=True)
class Learned:
    """Where a method stands, so that a killed run goes on as if nothing had happened.

    Args:
        step: Steps done.
        state: The method's state after them.
        optimiser: ``"moment name"`` → the optimiser's tensors for each learned tensor.
    """

    step: int
    state: State
    optimiser: dict[str, Tensor]


def proposed(
    model: nn.Module,
    axes: AxisGraph,
    method: Method,
    evidence: Evidence,
    state: State,
    *,
    done: Learned | None = None,
    on_done: Callable[[Learned], None] | None = None,
    progress: Progress = silent,
) -> tuple[Plan, State]:
    """Let a method learn until it makes a plan.

    Args:
        model: The network, in eval mode inside; its weights are not changed.
        axes: Its axes.
        method: What decides.
        evidence: What was measured for it, with the batches it may learn from.
        state: ``method.init(axes, budget)``.
        done: Where an earlier, interrupted call stood.
        on_done: Called with each stand that can be resumed from.
        progress: Called with (steps done, steps in all, what).

    Returns:
        The plan, and the state with the scores it was made from and the findings of the method.

    Raises:
        ValueError: If the loss is not finite, or the method ends without a plan.
    """
    evidence = replace(evidence, progress=progress)
    with _still(model):
        if done is None:
            plan, state = method.propose(model, axes, evidence, state)
            done = Learned(0, state, {})
            if plan is not None:
                return plan, state
            if on_done:
                on_done(done)
        training = method.training
        if training is None:
            raise ValueError("the method made no plan and has nothing to learn")
        return _learn(model, axes, method, training, evidence, done, on_done, progress)


def _learn(
    model: nn.Module,
    axes: AxisGraph,
    method: Method,
    training: Training,
    evidence: Evidence,
    done: Learned,
    on_done: Callable[[Learned], None] | None,
    progress: Progress,
) -> tuple[Plan, State]:
    state = done.state
    learned = {
        name: state.tensors[name].detach().clone().requires_grad_()
        for group in training.groups(state)
        for name in group.names
    }
    state = _with(state, {**state.tensors, **learned})
    optimiser = torch.optim.AdamW(
        [
            {"params": [learned[name] for name in group.names], "lr": group.lr, "weight_decay": group.weight_decay}
            for group in training.groups(state)
        ]
    )
    rates = [group["lr"] for group in optimiser.param_groups]
    _restore(optimiser, learned, done.optimiser)
    for step in range(done.step, training.steps):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / training.steps))
        batches, total = training.batches(evidence, step), 0.0
        for batch, number in batches:
            loss = training.loss(model, axes, batch, number, state) / len(batches)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss.item()} at step {step}: the weights or inputs hold NaN or infinity"
                )
            loss.backward()
            total += float(loss.detach())
        optimiser.step()
        optimiser.zero_grad()
        progress(step + 1, training.steps, f"learning, loss {total:.3f}")
        if (step + 1) % training.every == 0 or step + 1 == training.steps:
            plan, state = method.propose(model, axes, replace(evidence, step=step + 1), state)
            if plan is not None:
                return plan, state
            if on_done:
                on_done(Learned(step + 1, _with(state, _plain(state)), _moments(optimiser, learned)))
    raise ValueError("the method learned for all its steps and made no plan")


def _with(state: State, tensors: dict[str, Tensor]) -> State:
    return replace(state, tensors=tensors)


def _plain(state: State) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.tensors.items()}


def _moments(optimiser: torch.optim.Optimizer, learned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything the optimiser keeps for each learned tensor, as ``"what name"`` → tensor."""
    return {
        f"{what} {name}": torch.as_tensor(value).detach().clone()
        for name, tensor in learned.items()
        for what, value in optimiser.state[tensor].items()
    }


def _restore(optimiser: torch.optim.Optimizer, learned: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
    for key, value in moments.items():
        what, _, name = key.partition(" ")
        if name in learned:
            kept: Any = value.clone() if what == "step" else value.clone().to(learned[name])
            optimiser.state[learned[name]][what] = kept


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, its parameters without gradients; put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
