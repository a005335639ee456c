"""Initialise new units in the directions that give their outgoing weights a large gradient (after GradMax)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Mark
from regrow.core.objectives import class_loss
from regrow.core.plan import Plan, PlanError
from regrow.core.sources import Batch
from regrow.surgery.new_units import Entries, fit_new_units, new_units, split_entries
from regrow.tracing.capture import evaluating

Loss = Callable[[nn.Module, Batch], Tensor]

STEP = 1e-3
"""Size of the finite-difference step in zero-initialised weights, relative to the RMS of the parameter."""


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of a model on a labelled batch."""
    if batch.labels is None:
        raise ValueError("aligning needs batches with labels, or a loss of your own: loss=function")
    return class_loss(model(*batch.args, **batch.kwargs), batch.labels)


def align_new_units(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    loss: Loss = classification_loss,
    steps: int = 1,
) -> nn.Module:
    """Turn the weights of new units so that the loss has a large gradient in their zero weights, and they learn fast.

    With zero outgoing weights, ``G = ∂L/∂W_out`` depends on the incoming weights w of a new unit, and w is chosen to
    make ``‖G‖²`` large at the norm that w has. A step of the power method turns w halfway to ``∂‖G‖²/∂w``, these
    directions made orthogonal to one another; it takes two ordinary backward passes, the second with ``W_out`` moved a
    little along G. Between two linear layers w approaches the leading right singular vectors of Σ δ xᵀ (δ: gradient at
    the next layer's output, x: input of the previous one), as in GradMax; activations, norms, gates and attention are
    differentiated through.

    GradMax itself has the incoming weights at 0 and chooses the outgoing ones. Behind a batch normalisation and a ReLU
    such units are dead, so that is done only where the incoming weights are 0 anyway (a residual stream).

    Args:
        model: The network after the plan; changed in place.
        axes: Its axes after the plan.
        plan: The plan that added the units, by ``zero_out``.
        batches: Batches to take the gradients on; one to four are enough.
        loss: Function of the model and a batch that returns a scalar; cross entropy with the batch's labels unless
            given.
        steps: Steps of the power method. With one, units keep half of their random directions, and learn longest.

    Returns:
        The same model, whose new units also have outputs of the old ones' scale, as :func:`fit_new_units` sets it.

    Raises:
        PlanError: As :func:`fit_new_units`; or if no gradient reaches the units.

    Source: Evci et al., GradMax (arXiv 2201.05125).
    """
    new, batches = new_units(model, axes, plan), list(batches)
    drawn, zero = split_entries(model, axes, new)
    spread = Plan({key: plan.changes[key] for key in new if axes[key].mark is not Mark.FOLDED})
    with evaluating(model):
        pull = _gradients(model, zero, batches, loss)
    for key in new:
        if not any(bool(part.any()) for entries, part in pull.items() if entries.axis == key):
            raise PlanError(f"axis {key!r}: no gradient of these batches reaches its new units")
    if spread.changes:
        fit_new_units(model, axes, spread, batches)
    for _ in range(steps):
        with evaluating(model):
            pull = _gradients(model, zero, batches, loss)
            with _moved(model, pull):
                turn = _gradients(model, drawn, batches, loss)
        for entries, direction in turn.items():
            entries.turn(model, direction)
        for entries in zero:
            entries.set(model, torch.zeros(()))  # some new units of one axis are made by those of another
        if spread.changes:
            fit_new_units(model, axes, spread, batches)
    return model


def _gradients(
    model: nn.Module, entries: Sequence[Entries], batches: Sequence[Batch], loss: Loss
) -> dict[Entries, Tensor]:
    """Return the gradient of the loss, summed over the batches, in the given entries of parameters."""
    parameters = {part.name: model.get_parameter(part.name) for part in entries}
    trains = [parameter.requires_grad for parameter in parameters.values()]
    total: dict[Entries, Tensor] = {}
    device = parameters[entries[0].name].device
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                value = loss(model, batch.to(device))
                gradients = torch.autograd.grad(value, [*parameters.values()], materialize_grads=True)
            whole = dict(zip(parameters, gradients, strict=True))
            for part in entries:
                gradient = part.of(whole[part.name]).float()
                total[part] = total[part] + gradient if part in total else gradient
    finally:
        for parameter, train in zip(parameters.values(), trains, strict=True):
            parameter.requires_grad_(train)
    return total


@contextmanager
def _moved(model: nn.Module, pull: Mapping[Entries, Tensor]) -> Iterator[None]:
    """Context manager in which the zero entries are moved along the given directions, and 0 again afterwards."""
    try:
        for key in {entries.axis for entries in pull}:
            own = {entries: part for entries, part in pull.items() if entries.axis == key}
            size = max(_root_mean_square(model.get_parameter(entries.name)) for entries in own)
            most = max(map(_root_mean_square, own.values()))
            for entries, part in own.items():
                entries.set(model, part * (STEP * (size or 1.0) / most))
        yield
    finally:
        for entries in pull:
            entries.set(model, torch.zeros(()))


def _root_mean_square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())
