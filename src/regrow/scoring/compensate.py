"""Bias compensation as in FLAP: add the mean contribution of dropped inputs to the bias of the next layer."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph
from regrow.core.scores import Moments, Statistics
from regrow.scoring.weights import readers


def means(
    model: nn.Module, axes: AxisGraph, kept: Mapping[str, Iterable[int]], statistics: Statistics
) -> dict[str, dict[int, float]]:
    """Return weight name → index of a dropped input → its mean (``Plan.means``), where a bias can absorb it exactly.

    b′ = b + Σ over dropped j of W_j · E[x_j], exact for a linear map and for an ungrouped convolution without padding
    whose weight no other module shares; :func:`note_uncompensated` names the others. ``kept``: axis key → units kept;
    ``statistics``: sums of the weights' inputs; weights without any are left out.

    Source: An et al., FLAP (arXiv 2312.11983), section "Baseline bias compensation".
    """
    held = find_holders(model)
    inputs: dict[str, list[Tensor]] = {}
    expected: dict[str, Tensor] = {}
    for reader in readers(axes, [axes[key] for key in kept]):
        name, moments = reader.slot.name, statistics.moments.get(reader.weight)
        if moments is None or len(moments.total) != reader.width or not takes_constant(model, name, held):
            continue
        dropped = torch.ones(reader.size, dtype=torch.bool)
        dropped[list(kept[reader.axis])] = False
        where = reader.positions(reader.width)[dropped].flatten()
        if len(where):
            inputs.setdefault(name, []).append(where)
            expected[name] = moments.mean
    result = {}
    for name, parts in inputs.items():
        ascending = torch.cat(parts).unique()
        result[name] = dict(zip(ascending.tolist(), expected[name][ascending].tolist(), strict=True))
    return result


def weights_without_bias(model: nn.Module, axes: AxisGraph, units: Sequence[Axis]) -> tuple[str, ...]:
    """Return the names of weights that read the axes ``units``, and whose layer gets a new bias by compensation."""
    held = find_holders(model)
    names = dict.fromkeys(reader.slot.name for reader in readers(axes, units))
    bare = (name for name in names if getattr(_owner_of(model, name), "bias", 0) is None)
    return tuple(name for name in bare if takes_constant(model, name, held))


# ``id`` of a parameter → path and module of each that holds it.
Holders = Mapping[int, Sequence[tuple[str, nn.Module]]]


def find_holders(model: nn.Module) -> Holders:
    """Return ``id`` of a parameter → (path, module) of each module that holds it."""
    result: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for value in module._parameters.values():
            if value is not None:
                result.setdefault(id(value), []).append((path, module))
    return result


def sharing_module(model: nn.Module, name: str, held: Holders) -> str | None:
    """Return the path of another module that has the parameter ``name``, or ``None``; ``held``: :func:`find_holders`.

    >>> net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    >>> net["b"].weight = net["a"].weight
    >>> sharing_module(net, "a.weight", find_holders(net)), sharing_module(net, "a.bias", find_holders(net))
    ('b', None)
    """
    owner = _owner_of(model, name)
    others = held.get(id(model.get_parameter(name)), ())
    return next((path for path, module in others if module is not owner), None)


def takes_constant(model: nn.Module, name: str, held: Holders) -> bool:
    """Whether a constant input of the weight ``name`` can move exactly into a bias (``held``: :func:`find_holders`).

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding=1))
    >>> takes_constant(net, "0.weight", find_holders(net)), takes_constant(net, "1.weight", find_holders(net))
    (True, False)
    """
    owner = _owner_of(model, name)
    # Units of a recurrent layer have means of their own at the first step.
    if isinstance(owner, nn.RNNBase | nn.RNNCellBase) or sharing_module(model, name, held) is not None:
        return False
    if not isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return model.get_parameter(name).dim() == 2
    return owner.groups == 1 and (owner.padding == "valid" or not any(owner.padding))


def constant_inputs(model: nn.Module, moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """Return weight name → mean inputs, ``[channels]``, by ``moments``, where the weight's bias can absorb them."""
    held = find_holders(model)
    return {name: value.mean for name, value in moments.items() if takes_constant(model, name, held)}


def note_uncompensated(model: nn.Module, axes: AxisGraph, kept: Mapping[str, Iterable[int]]) -> tuple[str, ...]:
    """Return one sentence on the weights that read cut axes but whose bias cannot absorb a mean; ``()`` if none does.

    ``kept``: axis key → units kept, for the axes that are cut.
    """
    held = find_holders(model)
    names = dict.fromkeys(reader.slot.name for reader in readers(axes, [axes[key] for key in kept]))
    left_out = [name for name in names if not takes_constant(model, name, held)]
    if not left_out:
        return ()
    more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    why = "padding, groups or shared weights, with which it is not exact"
    return (f"no bias compensation for {left_out[0]}{more}, which have {why}",)


def _owner_of(model: nn.Module, name: str) -> nn.Module:
    """Return the module that has the parameter ``name``."""
    return model.get_submodule(name.rpartition(".")[0])
