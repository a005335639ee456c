"""A data-free importance measure from the weights that produce a unit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regrow.core.axes import Axis, AxisGraph, Role
from regrow.core.scores import Scores
from regrow.scoring.weights import check_scores, scorable, tensors


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
