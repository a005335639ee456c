"""Try and mask networks that cannot be recorded, by running a changed copy of them."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.plan import Plan, PlanError
from regrow.surgery.compensate import bias_of, read_dim
from regrow.tracing.capture import evaluating
from regrow.tracing.meta_copy import cast_example, copy_model
from regrow.tracing.model_state import preserve_state


def trial_error(model: nn.Module, axes: AxisGraph, change: Callable[[nn.Module], object]) -> str:
    """Return the error of running a changed copy of the network on its example; empty if it runs."""
    example = cast_example(axes.example, model)
    changed = replace_parameters(model, {})
    change(changed)
    try:
        with evaluating(changed), torch.no_grad(), torch.random.fork_rng(), preserve_state(changed, outside=True):
            changed(*copy.deepcopy(example.args), **copy.deepcopy(dict(example.kwargs)))
    except Exception as error:
        line = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
        return f"the network does not run at that size: {line.strip()[:200]}"
    return ""


def mask_units(model: nn.Module, axes: AxisGraph, plan: Plan) -> nn.Module:
    """Return a full-size copy in which the weights that consume dropped units of declared axes are 0 there.

    Where the plan has means, their contribution is added to the bias of the layer.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    made: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for key in axes.declared:
        if key not in plan.changes:
            continue
        dropped = list(plan.changes[key].dropped)
        for slot in axes[key].consumers():
            name = axes.ties.get(slot.name, slot.name)
            value = made.setdefault(name, state[name].detach().clone())
            value.index_fill_(slot.dim, slot.positions(axes[key].size)[dropped].flatten().to(value.device), 0)
            if slot.name in plan.means:
                biases[bias_of(slot.name)] = _offset(model, axes, slot.name, plan.means[slot.name])
    changed = replace_parameters(model, {id(state[name]): value for name, value in made.items()})
    for name, value in biases.items():
        path, _, leaf = name.rpartition(".")
        setattr(changed.get_submodule(path), leaf, nn.Parameter(value))
    return changed


def _offset(model: nn.Module, axes: AxisGraph, weight: str, means: Mapping[int, float]) -> Tensor:
    path, _, leaf = weight.rpartition(".")
    owner, dim, full = model.get_submodule(path), read_dim(axes, weight), model.get_parameter(weight).detach()
    if leaf != "weight" or dim is None or "bias" not in owner._parameters:
        raise PlanError(f"{weight} has no bias that could take up the means of dropped inputs")
    fill = torch.zeros(full.shape[dim], dtype=full.dtype, device=full.device)
    fill[list(means)] = torch.tensor(list(means.values()), dtype=full.dtype, device=full.device)
    lost = torch.tensordot(full, fill, ([dim], [0]))
    lost = lost.reshape(len(lost), -1).sum(1)
    old = owner._parameters["bias"]
    return lost if old is None else old.detach() + lost


def replace_parameters(model: nn.Module, values: Mapping[int, Tensor]) -> nn.Module:
    """Return a copy that shares parameters with the model, except some; buffers and other tensors are copied."""

    def made(tensor: Tensor) -> Tensor:
        own = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
        return values.get(id(tensor), own)

    return copy_model(model, made)
