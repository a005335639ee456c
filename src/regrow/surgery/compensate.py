"""Bias compensation: add the mean contribution of dropped inputs to the bias of the layer that read them."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Dim, Fold, size_of
from regrow.core.plan import Plan, PlanError
from regrow.scoring.compensate import holders, sharing_module
from regrow.surgery.layout import Layouts


def offsets(
    model: nn.Module, axes: AxisGraph, plan: Plan, lays: Layouts, values: Mapping[str, Tensor], exact: bool = False
) -> dict[str, Tensor]:
    """Return the biases that compensate for dropped inputs by their means: b′ = b + Σ_dropped W[:, i] · E[x_i]."""
    result: dict[str, Tensor] = {}
    held = holders(model) if plan.means else {}
    for name, means in plan.means.items():
        dim, old = check_bias(model, axes, name)
        if (sharing := sharing_module(model, name, held)) is not None:
            raise PlanError(
                f"means are given for {name}, which {sharing or 'the model'} holds too and would read without them; "
                "leave them out"
            )
        weight = model.get_parameter(name).detach()
        lay, dropped = lays.get(name, {}).get(dim), torch.tensor(list(means))
        if lay is None or bool(torch.isin(dropped, lay.kept).any()) or max(means) >= weight.shape[dim]:
            raise PlanError(f"the plan gives means for inputs of {name} that it does not drop")
        lost = mean_contribution(weight, dim, means)
        for other, own in lays[name].items():
            lost = lost if other == dim else lost.index_select(0, own.source.to(lost.device))
        old = values.get(bias_of(name), old)
        made = lost if old is None else old.detach().double() + lost
        result[bias_of(name)] = made if exact else made.to(weight.dtype)
    return result


def check_bias(model: nn.Module, axes: AxisGraph, weight: str) -> tuple[int, Tensor | None]:
    """Return the dimension of a weight that consumes axes, and the bias of its layer, which can take up means."""
    path, _, leaf = weight.rpartition(".")
    dim, parameters = read_dim(axes, weight), model.get_submodule(path)._parameters
    if leaf != "weight" or dim is None or "bias" not in parameters:
        raise PlanError(f"{weight} has no bias that could take up the means of dropped inputs")
    return dim, parameters["bias"]


def mean_contribution(weight: Tensor, dim: int, means: Mapping[int, float]) -> Tensor:
    """Return Σ W[:, i] · E[x_i] over the inputs that have a mean, one number per output (float64)."""
    positions = sorted(means)
    constants = torch.tensor([means[i] for i in positions], dtype=torch.float64, device=weight.device)
    columns = weight.index_select(dim, torch.tensor(positions, device=weight.device)).double().movedim(dim, 0)
    lost = torch.einsum("i...,i->...", columns, constants)
    return lost.reshape(lost.shape[0], -1).sum(1)  # a convolution without padding: every tap sees the mean


def read_dim(axes: AxisGraph, weight: str) -> int | None:
    """Return the one dimension of a weight that consumes axes; ``None`` if there is none, or several."""
    reads = axes.consumed.get(weight, frozenset())
    return next(iter(reads)) if len(reads) == 1 else None


def bias_of(weight: str) -> str:
    """Return the name of the bias of the layer that has a weight."""
    return weight.removesuffix("weight") + "bias"


def bias_dim(axes: AxisGraph, bias: str) -> Dim:
    """Return the dimension of a layer's bias: the output dimension of its weight."""
    weight = bias.removesuffix("bias") + "weight"
    read = read_dim(axes, weight)
    return next(dim for i, dim in enumerate(axes.shapes[weight]) if i != read)


def divisor_size(fold: Fold, sizes: Mapping[str, int]) -> int:
    """Return the divisor of a fold: the product of the sizes of its dimensions."""
    return prod(size_of(dim, sizes) for dim in fold.over)


def fold_values(
    model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int], values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the gains that compensate for the divisors that a plan changes: γ′ = γ·√(n_old/n_new)."""
    result = {}
    for fold in axes.folds:
        old, new = divisor_size(fold, axes.sizes()), divisor_size(fold, sizes)
        if old != new:
            gain = values.get(fold.weight)
            gain = model.get_parameter(fold.weight).detach() if gain is None else gain
            result[fold.weight] = rescale(gain, torch.tensor(old), new, fold)
    return result


def fold_constants(
    model: nn.Module, axes: AxisGraph, sizes: Mapping[str, int]
) -> tuple[dict[str, float | None], tuple[Fold, ...]]:
    """Return the rescaled epsilons of norms, ε′ = ε·n_old/n_new, by ``module:attribute``; and the folds with them."""
    constants: dict[str, float | None] = {}
    folds = []
    for fold in axes.folds:
        old, new = divisor_size(fold, axes.sizes()), divisor_size(fold, sizes)
        folds.append(replace(fold, value=fold.value * (old / new)))
        if old != new and fold.epsilon:
            path, _, name = fold.epsilon.partition(":")
            epsilon = fold.value
            if getattr(model.get_submodule(path), name) is None:  # the norm takes that of its precision
                epsilon = torch.finfo(model.get_parameter(fold.weight).dtype).eps
            constants[fold.epsilon] = epsilon * (old / new)
    return constants, tuple(folds)


def rescale(values: Tensor, sizes: Tensor, n: int, fold: Fold) -> Tensor:
    """Rescale entries of a gain from the divisors at which they hold to the divisor ``n``."""
    change = sizes.double() / n
    factor = (change if fold.kind == "norm" else 1 / change).sqrt().to(values.device)
    moved = ((values.double() + fold.plus) * factor - fold.plus).to(values.dtype)
    return torch.where(sizes.to(values.device) == n, values, moved)
