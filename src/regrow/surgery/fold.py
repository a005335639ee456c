"""Folds: when a size that stands in a divisor changes, the numbers next to it take up the change."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from regrow.axes import AxisGraph, Fold, size_of


@dataclass(frozen=True)
class Outcome:
    """What a plan comes to.

    Args:
        values: Name → tensor to set.
        constants: ``module:attribute`` → what to set.
        folds: The folds afterwards.
        removed: Biases that only compensation had made, and that are no more.
    """

    values: Mapping[str, Tensor]
    constants: Mapping[str, float | None]
    folds: tuple[Fold, ...]
    removed: tuple[str, ...] = ()


def divisor_size(fold: Fold, sizes: Mapping[str, int]) -> int:
    """The size that a fold divides by."""
    return prod(size_of(dim, sizes) for dim in fold.over)


def fold_values(model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], values: Mapping[str, Tensor]) -> Outcome:
    """Gains and the constants under roots folded: γ′ = γ·√(n_old/n_new), ε′ = ε·n_old/n_new.

    Args:
        model: The model before the cut.
        axes: Its axes before the cut.
        sizes: The size of each axis after it.
        values: The tensors that the cut replaces.
    """
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
    """The constants under roots at other sizes by ``module:attribute``, and the folds then.

    Args:
        model: The model before the cut.
        axes: Its axes before the cut.
        sizes: The size of each axis after it.
    """
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
    """Numbers that hold at the given sizes of the divisor, as they must be at ``n``; the very same where it is that."""
    change = sizes.double() / n
    factor = (change if fold.kind == "norm" else 1 / change).sqrt().to(values.device)
    moved = ((values.double() + fold.plus) * factor - fold.plus).to(values.dtype)
    return torch.where(sizes.to(values.device) == n, values, moved)
