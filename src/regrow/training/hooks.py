"""What the hooks of several learners share: modes, penalties, protected entries, replay memories, early stopping."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from regrow.core.axes.axis import AxisTensor
from regrow.scoring.gradients import evaluation_mode
from regrow.training.learner import (
    Boundary,
    Context,
    Event,
    Learner,
    Stream,
    make_tensor,
    set_train_mode,
)

S = TypeVar("S")


@contextmanager
def freeze(*models: nn.Module) -> Iterator[None]:
    """Context manager in which networks are in eval mode and their parameters need no gradient; restores both."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluation_mode(model, differentiated=()))
        yield


def train_with_frozen_norms(state: S, context: Context, boundary: Boundary) -> S:
    """Hook ``boundary``: training mode when an epoch starts; after the first task, BatchNorm keeps its statistics."""
    set_train_mode(state, context, boundary)
    if boundary.event == Event.EPOCH_START and context.number:
        for module in context.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    return state


def copy_parameters(context: Context) -> dict[str, AxisTensor]:
    """Return a copy of every parameter by name, for a learner's state: a plan resizes the copies too."""
    return {name: make_tensor(context, name, p.detach().clone()) for name, p in context.parameters().items()}


def copy_weights(context: Context) -> dict[str, Tensor]:
    """Return a copy of every weight in ``context.weights`` by name, from which :func:`restore_entries` restores."""
    parameters = context.parameters()
    return {name: parameters[name].detach().clone() for name in context.weights}


def protect_entries(context: Context, protected: Mapping[str, Tensor]) -> None:
    """Set gradients of protected entries to 0, in place; ``protected``: parameter name → bool mask of its shape.

    After the first task, parameters without a mask lose their gradient, so that they are not trained.
    """
    for name, parameter in context.parameters().items():
        if name not in protected:
            parameter.grad = None if context.number else parameter.grad
        elif parameter.grad is not None:
            parameter.grad.masked_fill_(protected[name], 0.0)


def restore_entries(context: Context, values: Mapping[str, Tensor], protected: Mapping[str, Tensor]) -> None:
    """Set protected entries of parameters back to ``values``, in place.

    Both mappings are by name of a parameter; ``protected``: a bool mask, of its shape, for each name in ``values``.
    """
    parameters = context.parameters()
    with torch.no_grad():
        for name, value in values.items():
            parameter = parameters[name]
            torch.where(protected[name], value, parameter, out=parameter)


def name_inputs(inputs: Any) -> dict[str, Tensor]:
    """Return the tensors of an example's inputs by name, as a replay memory stores them; :func:`inputs_of` undoes it.

    A single tensor is ``inputs``, those that are given by name ``inputs NAME``; ``ValueError`` for several without.
    """
    if isinstance(inputs, Tensor):
        return {"inputs": inputs}
    if isinstance(inputs, dict):
        return {f"inputs {name}": value for name, value in inputs.items()}
    raise ValueError(f"a replay memory stores one input, or inputs by name, and got {len(inputs)}; give a dict")


def inputs_of(rows: Mapping[str, Tensor]) -> Any:
    """Return the inputs in tensors that :func:`name_inputs` named, among others."""
    named = {name.removeprefix("inputs "): value for name, value in rows.items() if name.startswith("inputs ")}
    return named or rows["inputs"]


def add_to_replay_memory(
    stored: Mapping[str, AxisTensor], seen: int, context: Context, size: int, rows: Mapping[str, Tensor]
) -> dict[str, AxisTensor]:
    """Offer a batch to a replay memory of ``size`` examples, by reservoir sampling; return the memory's tensors.

    ``stored``: the memory's tensors by name, changed in place; missing while it is empty: they are made. ``rows``:
    those of the batch, ``[N, ...]``, by the same names; ``seen``: how many examples have been offered before. Each of
    these is stored with the same probability. Source: Vitter's algorithm R (ACM TOMS 11, 1985).
    """
    memory = dict(stored)
    for name, like in rows.items():
        shape = (size, *like.shape[1:])
        if name not in memory:
            memory[name] = AxisTensor(torch.zeros(shape, dtype=like.dtype, device=like.device), shape)
        if memory[name].values.shape != shape:
            kept = tuple(memory[name].values.shape[1:])
            raise ValueError(
                f"replay keeps {name} of one shape, {kept}, got {shape[1:]}; pad all examples to one length"
            )
    generator = context.generator(Stream.REPLAY_STORE, seen)
    chosen: dict[int, int] = {}  # index in the memory → that in the batch
    for i in range(len(next(iter(rows.values())))):
        index = seen if seen < size else int(torch.randint(seen + 1, (), generator=generator))
        if index < size:
            chosen[index] = i
        seen += 1
    if chosen:
        to_index, from_index = torch.tensor([*chosen]), torch.tensor([*chosen.values()])
        for name, values in rows.items():
            memory[name].values[to_index.to(values.device)] = values[from_index.to(values.device)]
    return memory


def draw_from_replay_memory(
    stored: Mapping[str, AxisTensor], seen: int, recalled: int, context: Context, size: int, n: int
) -> dict[str, Tensor]:
    """Return up to ``n`` random examples of a replay memory by name of a tensor, drawn with replacement.

    No more than it holds; ``{}`` for none. ``stored``, ``seen`` and ``size``: as in
    :func:`add_to_replay_memory`; ``recalled``: the number of earlier draws.
    """
    filled = min(seen, size)
    if not min(n, filled):
        return {}
    indices = torch.randint(filled, (min(n, filled),), generator=context.generator(Stream.REPLAY_DRAW, recalled + 1))
    return {name: memory.values[indices.to(memory.values.device)] for name, memory in stored.items()}


AxisTensors = Mapping[str, AxisTensor]  # tensors of a learner by name


@dataclass(frozen=True)
class Check:
    """An evaluation on held-out data, of a training with early stopping."""

    step: int  # the number of training steps before it
    held_out: float  # the loss on held-out data


@dataclass(frozen=True)
class EarlyStopping:
    """The state of a learner with early stopping: its own tensors, the best snapshot, and all held-out evaluations."""

    tensors: AxisTensors = field(default_factory=dict)  # the tensors that the learner trains
    best: AxisTensors = field(default_factory=dict)  # the snapshot taken at the best evaluation
    history: tuple[Check, ...] = ()  # every evaluation

    @property
    def best_check(self) -> Check:
        """The evaluation with the lowest loss; the first of them in a tie."""
        return min(self.history, key=lambda check: check.held_out)


def trained_parameters(tensors: AxisTensors, context: Context) -> AxisTensors:
    """Return copies, by name, of the parameters that require gradients: the default ``snapshot``."""
    return {
        name: AxisTensor(parameter.detach().clone(), tuple(parameter.shape))
        for name, parameter in context.parameters().items()
        if parameter.requires_grad
    }


def with_early_stopping(
    learner: Learner[AxisTensors],
    evaluate: Callable[[AxisTensors, Context], float],
    snapshot: Callable[[AxisTensors, Context], AxisTensors] = trained_parameters,
) -> Learner[EarlyStopping]:
    """Return a learner that is also evaluated on held-out data before the first step and after every epoch.

    It stops nothing: its state keeps the best ``snapshot``. ``evaluate``: (learner's tensors, context) → held-out loss;
    ``snapshot``: (the same) → what to keep. Of ``learner``, only ``loss``, ``boundary`` and ``scheduled`` are used.
    """

    def check(state: EarlyStopping, context: Context, step: int) -> EarlyStopping:
        with torch.no_grad():
            loss = evaluate(state.tensors, context)
            is_best = not state.history or loss < state.best_check.held_out
            best = snapshot(state.tensors, context) if is_best else state.best
        return replace(state, best=best, history=(*state.history, Check(step, loss)))

    def boundary(state: EarlyStopping, context: Context, boundary: Boundary) -> EarlyStopping:
        state = replace(state, tensors=learner.boundary(state.tensors, context, boundary))
        if boundary.event == Event.TASK_START and not state.history:
            return check(state, context, 0)
        if boundary.event == Event.EPOCH_END:
            return check(state, context, state.history[-1].step + context.steps)
        return state

    return Learner(
        EarlyStopping(learner.state),
        loss=lambda state, context, step: learner.loss(state.tensors, context, step),
        boundary=boundary,
        scheduled=learner.scheduled,
    )


def restore_best(model: nn.Module, state: EarlyStopping) -> None:
    """Set parameters of a network to the snapshot of the best evaluation (name → values), in place."""
    with torch.no_grad():
        for name, best in state.best.items():
            model.get_parameter(name).copy_(best.values)
