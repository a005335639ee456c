"""Bias compensation: add the mean contribution of dropped inputs to the bias of the layer that read them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Dim
from regrow.core.plan import Plan, PlanError
from regrow.scoring.compensate import holders, sharing_module
from regrow.surgery.layout import Layout


def offsets(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    lays: Mapping[str, Mapping[int, Layout]],
    values: Mapping[str, Tensor],
    exact: bool = False,
) -> dict[str, Tensor]:
    """Return the biases that compensate for dropped inputs by their means: b′ = b + Σ_dropped W[:, i] · E[x_i]."""
    result: dict[str, Tensor] = {}
    held = holders(model) if plan.means else {}
    for name, means in plan.means.items():
        path, _, leaf = name.rpartition(".")
        dim = read_dim(axes, name)
        if leaf != "weight" or dim is None or "bias" not in model.get_submodule(path)._parameters:
            raise PlanError(f"{name} has no bias that could take up the means of dropped inputs")
        if (sharing := sharing_module(model, name, held)) is not None:
            raise PlanError(
                f"means are given for {name}, which {sharing or 'the model'} holds too and would read without them; "
                "leave them out"
            )
        weight = model.get_parameter(name).detach()
        dropped = sorted(means)
        lay = lays.get(name, {}).get(dim)
        if lay is None or bool(torch.isin(torch.tensor(dropped), lay.kept).any()) or dropped[-1] >= weight.shape[dim]:
            raise PlanError(f"the plan gives means for inputs of {name} that it does not drop")
        positions = torch.tensor(dropped, device=weight.device)
        constants = torch.tensor([means[i] for i in dropped], dtype=torch.float64, device=weight.device)
        columns = weight.index_select(dim, positions).double().movedim(dim, 0)
        lost = torch.einsum("i...,i->...", columns, constants)
        lost = lost.reshape(lost.shape[0], -1).sum(1)  # a convolution without padding: every tap sees the mean
        for other, own in lays.get(name, {}).items():
            lost = lost if other == dim else lost.index_select(0, own.source.to(lost.device))
        bias = bias_of(name)
        old = values.get(bias, model.get_submodule(path)._parameters["bias"])
        made = lost if old is None else old.detach().double() + lost
        result[bias] = made if exact else made.to(weight.dtype)
    return result


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
