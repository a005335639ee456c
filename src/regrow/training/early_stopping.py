"""Early stopping: checks on held-out data, after which the best state so far can be restored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from regrow.axis_tensor import AxisTensor
from regrow.training.learner import Boundary, Context, Event, Learner

Tensors = Mapping[str, AxisTensor]


@dataclass(frozen=True)
class Check:
    """A loss on held-out data.

    Args:
        step: The number of steps taken before.
        held_out: The loss.
    """

    step: int
    held_out: float


@dataclass(frozen=True)
class EarlyStopping:
    """The state of a learner with early stopping.

    Args:
        tensors: The state of the learner.
        best: What the snapshot gave at the best check.
        history: Every check.
    """

    tensors: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    history: tuple[Check, ...] = ()

    @property
    def best_check(self) -> Check:
        """The first check with the lowest loss."""
        return min(self.history, key=lambda check: check.held_out)


def trained_parameters(tensors: Tensors, context: Context) -> Tensors:
    """A copy of the network's parameters that are trained."""
    return {
        name: AxisTensor(parameter.detach().clone(), tuple(parameter.shape))
        for name, parameter in context.parameters().items()
        if parameter.requires_grad
    }


def with_early_stopping(
    learner: Learner[Tensors],
    evaluate: Callable[[Tensors, Context], float],
    snapshot: Callable[[Tensors, Context], Tensors] = trained_parameters,
    start: EarlyStopping | None = None,
) -> Learner[EarlyStopping]:
    """A learner that is evaluated on held-out data before the first step and after every epoch.

    Args:
        learner: Its state is the tensors that it trains; none if only the network is trained.
        evaluate: (tensors, context) → the loss on held-out data.
        snapshot: (tensors, context) → what to remember of the best state.
        start: The first state, if the check before the first step has been made.
    """

    def check(state: EarlyStopping, context: Context, step: int) -> EarlyStopping:
        with torch.no_grad():
            loss = evaluate(state.tensors, context)
            better = not state.history or loss < state.best_check.held_out
            best = snapshot(state.tensors, context) if better else state.best
        return replace(state, best=best, history=(*state.history, Check(step, loss)))

    def boundary(state: EarlyStopping, context: Context, boundary: Boundary) -> EarlyStopping:
        state = replace(state, tensors=learner.boundary(state.tensors, context, boundary))
        if boundary.event == Event.TASK_START and not state.history:
            return check(state, context, 0)
        if boundary.event == Event.EPOCH_END:
            return check(state, context, state.history[-1].step + context.steps)
        return state

    return Learner(
        start or EarlyStopping(learner.state),
        loss=lambda state, context, step: learner.loss(state.tensors, context, step),
        boundary=boundary,
        scheduled=learner.scheduled,
    )


def restore_best(model: nn.Module, state: EarlyStopping) -> None:
    """Set the parameters of a network to those of the best check.

    Args:
        model: The network, changed in place.
        state: The last state; its snapshots are of parameters.
    """
    with torch.no_grad():
        for name, one in state.best.items():
            model.get_parameter(name).copy_(one.values)
