"""Folds: when an axis size that is used as a divisor changes, rescale the gain and epsilon next to it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Fold, size_of


@dataclass(frozen=True)
class Outcome:
    """The tensors and constants that a plan sets, and the folds after it.

    Args:
        values: Name → the tensor to set.
        constants: ``module:attribute`` → the number to set.
        folds: The folds after the plan.
        removed: Biases that only compensation had added, and that are removed again.
    """

    values: Mapping[str, Tensor]
    constants: Mapping[str, float | None]
    folds: tuple[Fold, ...]
    removed: tuple[str, ...] = ()


def divisor_size(fold: Fold, sizes: Mapping[str, int]) -> int:
    """Return the divisor of a fold: the product of the sizes of its dimensions."""
    return prod(size_of(dim, sizes) for dim in fold.over)


def fold_values(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], values: Mapping[str, Tensor]) -> Outcome:
    """Return the tensors of a plan with rescaled gains and epsilons: γ′ = γ·√(n_old/n_new), ε′ = ε·n_old/n_new."""
    result = dict(values)
    constants, folds = fold_constants(model, axes, sizes)
    for fold in axes.folds:
        old, new = divisor_size(fold, axes.sizes()), divisor_size(fold, sizes)
        if old != new:
            gain = result.get(fold.weight)
            gain = model.get_parameter(fold.weight).detach() if gain is None else gain
            result[fold.weight] = rescale(gain, torch.tensor(old), new, fold)
    return Outcome(result, constants, folds)


def fold_constants(
    model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int]
) -> tuple[dict[str, float | None], tuple[Fold, ...]]:
    """Return the rescaled epsilons of norms by ``module:attribute``, and the folds with them."""
    constants: dict[str, float | None] = {}
    folds = []
    for fold in axes.folds:
        old, new = divisor_size(fold, axes.sizes()), divisor_size(fold, sizes)
        folds.append(replace(fold, value=fold.value * (old / new)))
        if old != new and fold.epsilon:
            path, _, name = fold.epsilon.partition(":")
            own = getattr(model.get_submodule(path), name)  # without one of its own, a norm takes its precision's
            usual = torch.finfo(model.get_parameter(fold.weight).dtype).eps
            constants[fold.epsilon] = (usual if own is None else fold.value) * (old / new)
    return constants, tuple(folds)


def rescale(values: Tensor, sizes: Tensor, n: int, fold: Fold) -> Tensor:
    """Rescale entries of a gain from the divisors at which they hold to the divisor ``n``."""
    change = sizes.double() / n
    factor = (change if fold.kind == "norm" else 1 / change).sqrt().to(values.device)
    moved = ((values.double() + fold.plus) * factor - fold.plus).to(values.dtype)
    return torch.where(sizes.to(values.device) == n, values, moved)
