"""Early stopping: evaluations on held-out data, after which the best state so far can be restored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from regrow.core.axes.axis import AxisTensor
from regrow.training.learner import Boundary, Context, Event, Learner

Tensors = Mapping[str, AxisTensor]


@dataclass(frozen=True)
class Check:
    """One evaluation on held-out data.

    Args:
        step: The number of training steps before it.
        held_out: The loss on held-out data.
    """

    step: int
    held_out: float


@dataclass(frozen=True)
class EarlyStopping:
    """The state of a learner with early stopping: its own tensors, the best snapshot, and all evaluations.

    Args:
        tensors: The tensors that the learner trains.
        best: The snapshot taken at the best evaluation.
        history: Every evaluation.
    """

    tensors: Tensors = field(default_factory=dict)
    best: Tensors = field(default_factory=dict)
    history: tuple[Check, ...] = ()

    @property
    def best_check(self) -> Check:
        """The evaluation with the lowest loss; the first of them in a tie."""
        return min(self.history, key=lambda check: check.held_out)


def trained_parameters(tensors: Tensors, context: Context) -> Tensors:
    """Return a copy of the network's parameters that have ``requires_grad``.

    Args:
        tensors: The learner's tensors; not used.
        context: The network.
    """
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
    """Return a learner that is also evaluated on held-out data before the first step and after every epoch.

    Args:
        learner: The learner; its state is the tensors that it trains, empty if only the network is trained.
        evaluate: (tensors, context) → the loss on held-out data.
        snapshot: (tensors, context) → the tensors to store for the best state.
        start: The initial state, if the evaluation before the first step has been made.
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
    """Set the parameters of a network to the snapshot of the best evaluation, in place.

    Args:
        model: The network, changed in place.
        state: The last state; its snapshot must be of parameters.
    """
    with torch.no_grad():
        for name, one in state.best.items():
            model.get_parameter(name).copy_(one.values)
