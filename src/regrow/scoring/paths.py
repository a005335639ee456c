"""Measures of a unit that need no activations, beyond the weights that read it: both ends of its path."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from regrow.axes import Axis, AxisGraph, Role, Slot
from regrow.scores import Scores
from regrow.scoring.weights import check_scores, columns, scorable, tensors


def product_of_norms(weights: Mapping[str, Tensor], axes: AxisGraph, *, units: Sequence[Axis] | None = None) -> Scores:
    """Π over the weight matrices a unit runs through of ‖W[unit]‖₂ (of gate and up rows and the down column).

    The gain of the norm before them is not folded in: which norm that is cannot be read from an axis.

    Source: ours, after the neuron norms of gated units in common pruning practice.
    """
    values = {}
    for axis in scorable(axes, units):
        norms = [
            columns(weights[name], slot.dim)[where].sum(1).sqrt()
            for name, slot, where in tensors(axes, axis, weights)
            if weights[name].dim() > 1
        ]
        values[axis.key] = torch.stack(norms).log().sum(0)
    return check_scores(Scores(_finite(values), "path/product-of-norms"))


def peak_to_peak(weights: Mapping[str, Tensor], axes: AxisGraph, *, units: Sequence[Axis] | None = None) -> Scores:
    """Σ over the matrices that make a unit of (max W + |min W|) over its rows.

    Source: ours; large row extremes were reported to hold up best as the sole criterion for gated units (peremartra).
    """
    values = {}
    for axis in scorable(axes, units):
        total = torch.zeros(axis.size, dtype=torch.float64)
        for weight, slot, where in _made(weights, axes, axis):
            rest = [d for d in range(weight.dim()) if d != slot.dim]
            total += (weight.amax(rest) + weight.amin(rest).abs()).double().cpu()[where].mean(1)
        values[axis.key] = total
    return check_scores(Scores(values, "path/peak-to-peak"))


def through(weights: Mapping[str, Tensor], axes: AxisGraph, *, units: Sequence[Axis] | None = None) -> Scores:
    """‖W_read W_made‖_F of each unit: how large the linear map through it is (of a head: its output–value circuit).

    Of the matrices that make a unit, only those count whose rows inside the unit are the very entries that the reader
    contracts: a second axis lies in both (a head's value size). Axes without one are scored by the product of norms.

    Source: ours; the output–value circuit of Elhage et al., A Mathematical Framework for Transformer Circuits, 2021.
    """
    values = dict(product_of_norms(weights, axes, units=units).values)
    for axis in scorable(axes, units):
        pairs = list(_circuits(weights, axes, axis))
        if pairs:
            values[axis.key] = torch.stack(pairs).sum(0).sqrt()
    return check_scores(Scores(values, "path/through"))


PATHS: Mapping[str, Callable[..., Scores]] = {"norms": product_of_norms, "peaks": peak_to_peak, "through": through}
"""Name → (weights, axes, *, units) → scores."""


def _circuits(weights: Mapping[str, Tensor], axes: AxisGraph, axis: Axis) -> Iterator[Tensor]:
    """Per (reader, maker) that share an inner axis: ‖W_read W_made‖² of each unit."""
    for inner in axes:
        if inner.inside != axis.key:
            continue
        read = [s for s in axis.slots if s.role is Role.CONSUMES and s.name in weights]
        made = [s for s in axis.slots if s.role is Role.PRODUCES and s.name in weights and weights[s.name].dim() == 2]
        for reader in read:
            for maker in made:
                own = {slot.name: slot for slot in inner.slots}
                if reader.name not in own or maker.name not in own or own[reader.name].role is not Role.CONSUMES:
                    continue
                entries = _common(own[maker.name].positions(inner.size), maker.positions(axis.size)[0])
                if entries.shape[1] == 1:  # more than one: blocks of heads, whose entries attention mixes
                    yield _circuit(weights, axis, inner, reader, maker, own)


def _circuit(
    weights: Mapping[str, Tensor], axis: Axis, inner: Axis, reader: Slot, maker: Slot, own: Mapping[str, Slot]
) -> Tensor:
    a, b = weights[reader.name].double().movedim(reader.dim, 0).flatten(1), weights[maker.name].double()
    b = b.movedim(maker.dim, 0).flatten(1)
    outer_read, outer_made = reader.positions(axis.size), maker.positions(axis.size)
    inner_read, inner_made = own[reader.name].positions(inner.size), own[maker.name].positions(inner.size)
    total = torch.zeros(axis.size, dtype=torch.float64)
    for unit in range(axis.size):
        rows = b[_common(inner_made, outer_made[unit])[:, 0]]
        gram = rows @ rows.T
        for column in _common(inner_read, outer_read[unit]).unbind(1):
            part = a[column]
            total[unit] += float(((part @ part.T) * gram).sum())
    return total


def _common(inner: Tensor, outer: Tensor) -> Tensor:
    """The entries of each inner unit that lie in one outer unit, ``[inner size, k]``."""
    return torch.stack([row[torch.isin(row, outer)] for row in inner])


def _made(weights: Mapping[str, Tensor], axes: AxisGraph, axis: Axis) -> Iterator[tuple[Tensor, Slot, Tensor]]:
    for name, slot, where in tensors(axes, axis, weights):
        if slot.role is Role.PRODUCES and weights[name].dim() > 1:
            yield weights[name].detach(), slot, where


def _finite(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A unit with a zero matrix has the logarithm −∞: below every other, but a number."""
    return {key: value.clamp_min(-1e6) for key, value in values.items()}
