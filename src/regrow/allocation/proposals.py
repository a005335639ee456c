"""Proposals of a search: for each granularity, the masks that remove its cheapest units down to the same size."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regrow.allocation.commits import operation_prices, removable_filters, set_masks
from regrow.allocation.gates import GateMasks, Gates
from regrow.allocation.levels import GRANULARITIES


@dataclass(frozen=True)
class Saliency:
    """What the loss is estimated to rise by when one unit alone goes: ``[operations]``, ``[filters]``, ``[weights]``.

    ``operations`` holds the same number for operations that are tied; ``weights`` is ``None`` if they are not searched.
    """

    operations: Tensor
    filters: Tensor
    weights: Tensor | None = None


def propose_removals(
    gates: Gates, masks: GateMasks, saliency: Saliency, searched: Sequence[str], goal: float, least: float
) -> dict[str, GateMasks]:
    """Return granularity → masks that remove its units of least saliency per price, all of (nearly) equal savings.

    The cost of each is at most ``goal``, or that of the first proposal if that saves more: an operation is seldom as
    small as what is to be saved. A granularity that cannot save as much is helped by the others, the finest first.
    Units that would leave less than ``least`` stay where others can go. Without a proposal nothing could be saved.
    """

    def remove(found: GateMasks, granularity: str, least: float = least) -> GateMasks | None:
        return _remove(gates, found, saliency, granularity, goal, least)

    proposals: dict[str, GateMasks] = {}
    for granularity in (name for name in GRANULARITIES if name in searched):
        found = remove(masks, granularity)
        if found is None:
            continue
        for helper in reversed([name for name in GRANULARITIES if name in searched and name != granularity]):
            if _cost(gates, found) > goal:
                found = remove(found, helper) or found
        for helper in reversed([name for name in GRANULARITIES if name in searched]):
            if _cost(gates, found) > goal:
                found = remove(found, helper, 0.0) or found
        proposals[granularity] = found
        goal = min(goal, _cost(gates, found))
    if not proposals and "operations" in searched and (found := remove(masks, "operations", 0.0)):
        proposals["operations"] = found
    return proposals


def _cost(gates: Gates, masks: GateMasks) -> float:
    """Return the network's cost under masks."""
    return float(gates.levels.size(masks.ops, masks.filters, masks.weights))


def _remove(
    gates: Gates, masks: GateMasks, saliency: Saliency, granularity: str, goal: float, least: float
) -> GateMasks | None:
    """Return masks without the units of one granularity of least saliency per price, down to ``goal``.

    ``None`` if no unit can go.
    """
    if granularity == "weights":
        return _remove_weights(gates, masks, saliency, goal)
    base = len(masks.ops)
    if granularity == "operations":
        score = saliency.operations / operation_prices(gates).clamp_min(1e-12)
        first = [i for i in range(base) if gates.tied[i] == i]
        order = sorted((i for i in first if masks.ops[i] > 0), key=lambda i: float(score[i]))
        sure = 0
    else:
        score = saliency.filters / price_filters(gates, masks).clamp_min(1e-12)
        order = [base + i for i in removable_filters(gates, masks.filters, score)]
        masks = replace(masks, margins=(masks.margins[0], score))

        def fits(count: int) -> bool:
            return _cost(gates, _without(gates, masks, order[:count])) <= goal

        sure = max(0, bisect_left(range(len(order) + 1), True, key=fits) - 1)  # pricing one after the other takes long
    removed = order[:sure]
    found = _without(gates, masks, removed)
    for index in order[sure:]:
        if _cost(gates, found) <= goal:
            break
        if index < base and not all(
            bool(gates.removable(found.ops)[i]) for i in gates.tied_with(index).nonzero()[:, 0]
        ):
            continue
        trial = _without(gates, masks, [*removed, index])
        if _cost(gates, trial) >= least:
            found = trial
            removed.append(index)
    return found if removed else None


def _without(gates: Gates, masks: GateMasks, indices: Sequence[int]) -> GateMasks:
    """Return masks without operations and filters; ``indices`` are those of :func:`.commits.set_masks`."""
    ops, filters = set_masks(gates, masks, indices, 0.0)
    return replace(
        masks, ops=ops, filters=filters, op_scale=masks.op_scale * ops, filter_scale=masks.filter_scale * filters
    )


def _remove_weights(gates: Gates, masks: GateMasks, saliency: Saliency, goal: float) -> GateMasks | None:
    """Return masks without the weights of least saliency per price, down to ``goal``; ``None`` if there are none."""
    if masks.over is None or saliency.weights is None:
        return None
    levels = gates.levels
    active = levels.active(masks.ops, masks.filters) & (masks.over >= 0)
    price = torch.where(active, levels.price[: levels.entries], 0.0)
    order = torch.where(price > 0, saliency.weights / price.clamp_min(1e-12), torch.inf).argsort()
    before = price[order].cumsum(0) - price[order]
    removed = order[(before < _cost(gates, masks) - goal) & (price[order] > 0)]
    return replace(masks, over=masks.over.index_fill(0, removed, -1.0)) if len(removed) else None


def price_filters(gates: Gates, masks: GateMasks) -> Tensor:
    """Return what removing each filter alone would save, ``[filters]`` float64: the derivative of the cost."""
    filters = masks.filters.detach().double().requires_grad_()
    with torch.enable_grad():
        (price,) = torch.autograd.grad(gates.levels.size(masks.ops.detach(), filters, masks.weights), [filters])
    return price


def choose_proposal(losses: Mapping[str, Tensor]) -> str:
    """Return the coarsest granularity whose loss is within a standard error of the lowest one.

    ``losses``: granularity → the loss of each held-out part under its proposal, ``[parts]``, paired.

    >>> choose_proposal({"operations": torch.tensor([1.0, 1.2]), "filters": torch.tensor([1.1, 1.0])})
    'operations'
    """
    best = min(losses, key=lambda name: float(losses[name].mean()))
    for name in (one for one in GRANULARITIES if one in losses):
        more = losses[name] - losses[best]
        if float(more.mean()) <= float(more.std()) / len(more) ** 0.5:
            return name
    return best
