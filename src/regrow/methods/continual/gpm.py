"""Gradient projection memory (GPM): steps are orthogonal to the inputs that earlier tasks gave each layer.

Saha, Garg, Roy, ICLR 2021 (arXiv 2103.09762): after a task, a layer's basis M gains the principal directions of its
inputs that M lacks, until it holds a fraction ``energy`` of their sum of squares; then  Δ ← Δ − Δ M Mᵀ  for every step
Δ. For plain SGD that is to project gradients, as there; it also holds with weight decay and AdamW. Unlike there, the
bias is one more input, which is 1, so that it is trained too. Parameters of other layers, such as those of norms, and
of layers with very many inputs are frozen after the first task.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regrow.core.axes.axis import AxisTensor
from regrow.nets.devices import choose_precision
from regrow.protection.factors import BATCH, layer_parameters, measure_factors
from regrow.protection.guards import lower_precision, multiply, side_by_side, write_rows
from regrow.settings.constraints import CheckedSettings, Count, Fraction
from regrow.training.hooks import train_with_frozen_norms
from regrow.training.learner import Boundary, Context, Event, Learner, Step, Stream
from regrow.training.state import derived

LARGEST = 8192  # a layer with more inputs is frozen after the first task
CITATION = "Saha, Garg, Roy, Gradient projection memory for continual learning, ICLR 2021 (arXiv 2103.09762)"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of gradient projection memory: how much of the inputs of earlier tasks is protected.

    Args:
        energy: The fraction of the sum of squares of a layer's inputs that its basis holds.
        first_energy: The same for the first layer.
        samples: The number of examples of each task whose inputs are measured.
    """

    energy: Fraction = 0.99
    first_energy: Fraction = 0.95
    samples: Count = 300


@dataclass(frozen=True)
class GpmState:
    """The orthonormal directions M of each layer's inputs, by name of its weight, as columns."""

    basis: Mapping[str, AxisTensor] = field(default_factory=dict)  # [*inputs, directions]
    bias: Mapping[str, AxisTensor] = field(default_factory=dict)  # of the constant input of the bias, [directions]
    before: Mapping[str, Tensor] = derived(dict)  # weights and biases before the step, by name of the weight
    directions: Mapping[str, Tensor] = derived(dict)  # what :meth:`columns` returns, as steps are multiplied with it

    def columns(self, name: str) -> Tensor:
        """Return the directions of a layer, ``[n + 1, directions]``."""
        inputs = self.basis[name].values
        return torch.cat([inputs.reshape(-1, inputs.shape[-1]), self.bias[name].values[None]])


def build(settings: Settings) -> Learner[GpmState]:
    """Return the learner that trains with gradient projection memory."""
    hooks: dict[str, Any] = {"project": _copy_parameters, "after_step": _project_steps}
    return Learner(GpmState(), **hooks, boundary=partial(_react, settings), classes_only=True, lr=0.05)


def _copy_parameters(state: GpmState, context: Context, step: Step) -> GpmState:
    """Hook ``project``: copy layers with a basis; other parameters lose their gradients after the first task."""
    if not context.number:
        return state
    parameters, projected, before = context.parameters(), set[str](), dict[str, Tensor]()
    for name in state.basis:
        names = layer_parameters(parameters, name)
        gradients = [gradient for part in names if (gradient := parameters[part].grad) is not None]
        if len(gradients) == len(names):
            before[name] = side_by_side([parameters[part] for part in names])
            projected.update(names)
    for name in parameters.keys() - projected:
        parameters[name].grad = None
    directions, is_low = state.directions, choose_precision(context.model) == "bfloat16"
    if directions.keys() != before.keys():
        directions = {name: lower_precision(state.columns(name)[: before[name].shape[1]], is_low) for name in before}
    return replace(state, before=before, directions=directions)


@torch.no_grad()
def _project_steps(state: GpmState, context: Context, step: Step) -> GpmState:
    """Hook ``after_step``: Δ ← Δ − Δ M Mᵀ of what the optimizer changed, in place."""
    parameters = context.parameters()
    for name, before in state.before.items():
        parts = [parameters[part] for part in layer_parameters(parameters, name)]
        now, columns = side_by_side(parts), state.directions[name]
        write_rows(parts, now.sub_(multiply(multiply(now - before, columns), columns.T)))
    return state


def _react(settings: Settings, state: GpmState, context: Context, boundary: Boundary) -> GpmState:
    """Hook ``boundary``: set modes of modules; at the end of a task add its directions to the bases."""
    train_with_frozen_norms(state, context, boundary)
    if boundary.event != Event.TASK_END:
        return replace(state, directions={})
    train = context.task.train
    order = torch.randperm(len(train), generator=context.generator(Stream.FISHER_EXAMPLES))
    examples = train.take(order[: settings.samples]).batches(BATCH)
    measured = measure_factors(
        context.model, examples, context.generator(Stream.FISHER_LABELS), context.classes, LARGEST
    )
    basis, bias, energy = dict(state.basis), dict(state.bias), settings.first_energy
    for key in (key for key, value in measured.items() if key.endswith(" inputs") and value.dim() > 1):
        name = key.removesuffix(" inputs")
        moments = measured[key].double()
        if len(layer_parameters(context.parameters(), name)) == 1:
            moments[-1], moments[:, -1] = 0, 0
        old = state.columns(name).double() if name in basis else moments[:, :0]
        columns = torch.cat([old, _find_directions(moments, old, energy)], 1).to(measured[key])
        shape, dims = context.parameters()[name].shape[1:], tuple(context.axes.shapes[name][1:])
        count = columns.shape[1]
        basis[name] = AxisTensor(columns[:-1].reshape(*shape, count), (*dims, count))
        bias[name] = AxisTensor(columns[-1].clone(), (count,))
        energy = settings.energy
    return GpmState(basis, bias)


def _find_directions(moments: Tensor, old: Tensor, energy: float) -> Tensor:
    """Return the fewest orthonormal directions, ``[n, new]``, that hold ``energy`` of the moments with ``old``.

    ``moments``: second moments of inputs, ``[n, n]``; ``old``: orthonormal directions, ``[n, k]``.

    >>> _find_directions(torch.diag(torch.tensor([6.0, 3.0, 1.0])), torch.tensor([[1.0], [0.0], [0.0]]), 0.9).abs()
    tensor([[0.],
            [1.],
            [0.]])
    """
    outside = torch.eye(len(moments)).to(moments) - old @ old.T
    values, vectors = torch.linalg.eigh(outside @ moments @ outside)
    values = values.clamp_min(0).flip(0)
    total = moments.trace()
    held = (total - values.sum() + values.cumsum(0)) / total
    missing = energy - (1 - values.sum() / total)
    count = int((held < energy).sum()) + 1 if float(missing) > 0 else 0
    count = min(count, int((values > 1e-9 * total).sum()))  # the others are of rounding, or within ``old``
    return vectors.flip(1)[:, :count]
