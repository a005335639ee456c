"""Folds: when a size that stands in a divisor changes, the numbers next to it take up the change."""

from collections.abc import Mapping
from math import prod, sqrt

import torch
from torch import Tensor, nn

from regrow.axes import AxisGraph, Fold, size_of


def ratio(fold: Fold, before: Mapping[str, int], after: Mapping[str, int]) -> float:
    """n_old / n_new of the size a fold divides by."""
    old = prod(size_of(dim, before) for dim in fold.over)
    return old / prod(size_of(dim, after) for dim in fold.over)


def folded(
    model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors with gains folded, and the constants under roots: γ′ = γ·√(n_old/n_new), ε′ = ε·n_old/n_new.

    Args:
        model: The model before the cut.
        axes: Its axes before the cut.
        sizes: The size of each axis after it.
        values: The tensors that the cut replaces.

    Returns:
        The tensors to set, and ``module:attribute`` → constant.
    """
    result, constants = dict(values), {}
    for fold in axes.folds:
        change = ratio(fold, axes.sizes(), sizes)
        if change == 1:
            continue
        gain = result.get(fold.weight)
        gain = model.get_parameter(fold.weight).detach() if gain is None else gain
        factor = sqrt(change) if fold.kind == "norm" else sqrt(1 / change)
        result[fold.weight] = ((gain.double() + fold.plus) * factor - fold.plus).to(gain.dtype)
        if fold.epsilon:
            path, _, name = fold.epsilon.partition(":")
            own = getattr(model.get_submodule(path), name)  # without one of its own, a norm takes its precision's
            constants[fold.epsilon] = (torch.finfo(gain.dtype).eps if own is None else fold.value) * change
    return result, constants
