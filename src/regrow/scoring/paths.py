"""Data-free importance measures from all weights that a unit passes through, both made and read."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from regrow.axes import Axis, AxisGraph, Role
from regrow.scores import Scores
from regrow.scoring.weights import check_scores, columns, scorable, tensors


def product_of_norms(weights: Mapping[str, Tensor], axes: AxisGraph, *, units: Sequence[Axis] | None = None) -> Scores:
    """Score units by the log of Π over the matrices they pass through of ‖W[unit]‖₂; needs no data.

    For a gated MLP these are the gate and up rows and the down column. The score is the sum of the logarithms, and at
    least −10⁶.

    The gain of a preceding normalisation layer is not included, since an axis does not say which layer that is.

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        units: The axes to score; ``axes.units()`` if none are named.

    Source: ours, after the neuron norms of gated units in common pruning practice.
    """
    values = {}
    for axis in scorable(axes, units):
        norms = [
            columns(weights[name], slot.dim)[where].sum(1).sqrt()
            for name, slot, where in tensors(axes, axis, weights)
            if weights[name].dim() > 1
        ]
        # The logarithm for a unit with a zero matrix is −∞: a number below every other stands for it.
        values[axis.key] = torch.stack(norms).log().sum(0).clamp_min(-1e6)
    return check_scores(Scores(values, "path/product-of-norms"))


def peak_to_peak(weights: Mapping[str, Tensor], axes: AxisGraph, *, units: Sequence[Axis] | None = None) -> Scores:
    """Score units by Σ over the matrices that produce them of (max W + abs(min W)) over the unit's rows.

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        units: The axes to score; ``axes.units()`` if none are named.

    Source: ours; large row extremes were reported to hold up best as the sole criterion for gated units (peremartra).
    """
    values = {}
    for axis in scorable(axes, units):
        total = torch.zeros(axis.size, dtype=torch.float64)
        for name, slot, where in tensors(axes, axis, weights):
            weight = weights[name].detach()
            if slot.role is not Role.PRODUCES or weight.dim() < 2:
                continue
            rest = [d for d in range(weight.dim()) if d != slot.dim]
            total += (weight.amax(rest) + weight.amin(rest).abs()).double().cpu()[where].mean(1)
        values[axis.key] = total
    return check_scores(Scores(values, "path/peak-to-peak"))


PATHS: Mapping[str, Callable[..., Scores]] = {"norms": product_of_norms, "peaks": peak_to_peak}
"""Name → data-free measure: (weights, axes, *, units) → scores."""
