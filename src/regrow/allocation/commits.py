"""What a commit of a search takes out: what does not stand, what a share tells, or what a target still asks for."""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from regrow.allocation.gates import GateMasks, Gates
from regrow.axes import AxisGraph
from regrow.branches import lies_in


def select_removed(found: Gates, masks: GateMasks, axes: AxisGraph) -> tuple[list[str], dict[str, list[int]]]:
    """The operations that do not stand, and of each axis that loses filters those that do.

    Args:
        found: What may go.
        masks: What stands.
        axes: The network's axes.
    """
    there = zip(found.ops, found.alive & found.runs, masks.ops, strict=True)
    drop = [path for path, here, mask in there if here and not mask]
    keep = {}
    for key, (base, size, _) in zip(found.levels.axes, found.spans, strict=True):
        own = masks.filters[base : base + size] > 0
        stays = any(not any(lies_in(slot.name, path) for path in drop) for slot in axes[key].slots)
        if stays and not bool(own.all()):
            keep[key] = own.nonzero()[:, 0].tolist()
    return drop, keep


def limit_removal(found: Gates, masks: GateMasks, allowed: float, bare: bool = True) -> GateMasks:
    """Masks under which no more goes than must: the nearest to their thresholds stay, as long as all that is allowed.

    Args:
        found: What may go.
        masks: What stands.
        allowed: What the network may cost.
        bare: Whether operations that hold nothing but their scale stay too, which fills nothing up. Where one of a sum
            is left at the end, they do.
    """
    margins = torch.cat(masks.margins)
    here = torch.cat([found.alive & found.runs, torch.ones_like(masks.filters, dtype=torch.bool)])
    if not bare:
        here[: len(found.ops)] &= found.single | ~found.bare()
    lost = (here & (torch.cat([masks.ops, masks.filters]) == 0)).nonzero()[:, 0]
    order = lost[margins[lost].argsort(descending=True)].tolist()

    def back(many: int) -> tuple[Tensor, Tensor]:
        ops, filters = masks.ops.clone(), masks.filters.clone()
        for at in order[:many]:
            mask, i = (ops, found.together(at)) if at < len(ops) else (filters, at - len(ops))
            mask[i] = 1.0
        return ops, filters

    def too_large(many: int) -> bool:
        return float(found.levels.size(*back(many), masks.weights)) > allowed

    ops, filters = back(bisect_left(range(1, len(order) + 1), True, key=too_large))  # pricing everything takes long
    return replace(masks, ops=ops, filters=filters)


def protect_cheapest(found: Gates, masks: GateMasks, target: float, searched: Collection[str]) -> GateMasks:
    """Masks under which a target can still be met later: of sets whose cheapest operation would go, it stays.

    Those nearest to their thresholds stay, one after the other, until the target is within reach, if it ever is.

    Args:
        found: What may go in the whole network, be it searched in this stage or not.
        masks: What stands.
        target: What the whole network may cost in the end.
        searched: Which levels are.
    """
    ops, margin = masks.ops.clone(), masks.margins[0]
    lost = (_cheapest(found) > ops).nonzero()[:, 0].tolist() if least(found, searched) <= target else []
    for at in sorted(lost, key=lambda at: (-margin[at].item(), at)):
        if least(replace(found, alive=found.alive & (ops > 0)), searched) <= target:
            break
        ops[found.together(at)] = 1.0
    return replace(masks, ops=ops)


def savings(found: Gates, masks: GateMasks) -> dict[str, float]:
    """What each level leaves out, one after the other: operations, filters of the rest, weights of those."""
    ones = torch.ones_like(masks.filters)
    steps = [
        found.levels.size(found.alive.float(), ones),
        found.levels.size(masks.ops, ones),
        found.levels.size(masks.ops, masks.filters),
        found.levels.size(masks.ops, masks.filters, masks.weights),
    ]
    names = ("operations", "filters", "weights")
    return {name: float(steps[i] - steps[i + 1]) for i, name in enumerate(names)}


def least(found: Gates, searched: Collection[str]) -> float:
    """What the cheapest choice costs: of each node the cheapest operation, of each axis the fewest filters, no weight.

    Where sets of which one operation stays overlap, another choice may cost a little less.

    Args:
        found: What may go.
        searched: Which levels are.
    """
    levels = found.levels
    ops, filters, weights = found.alive.float(), torch.ones(levels.filters), None
    if "operations" in searched and len(ops):
        ops = _cheapest(found)
    for base, size, fewest in found.spans if "filters" in searched else ():
        filters[base + min(fewest, size) : base + size] = 0.0
    if "weights" in searched:
        weights = torch.zeros(len(levels.reads))
    return float(levels.size(ops, filters, weights))


def _prices(found: Gates) -> Tensor:
    """What an operation costs with those decided with it, ``[operations]``; ∞ if it is gone or does not run."""
    here = found.alive & found.runs
    own = torch.where(here, found.prices(), 0.0)
    return torch.where(here, torch.zeros_like(own).index_add(0, found.tied, own)[found.tied], torch.inf)


def _cheapest(found: Gates) -> Tensor:
    """Of each set that needs an operation and has none yet the cheapest, ``[operations]``; and all that do not run."""
    ops, prices = torch.zeros(len(found.ops)), _prices(found)
    for own in found.needed:
        if not ops[own].any():
            ops[found.together(int(own[prices[own].argmin()]))] = 1.0
    return torch.where(found.runs, ops, found.alive.float())


def threshold_for(share: float, importance: Tensor, whole: int) -> float:
    """The threshold at which a share of ``whole`` units stands; 0 where no more are left.

    >>> threshold_for(0.5, torch.tensor([0.1, 0.4, 0.2, 0.3]), 4)
    0.30000001192092896
    """
    many = len(importance) - max(1, ceil(share * whole))
    return float(importance.sort().values[many]) if many > 0 else 0.0


def fit_to_budget(found: Gates, masks: GateMasks, relative: Tensor, target: float) -> tuple[Tensor, Tensor, Tensor]:
    """What a target leaves of what stands: the least important goes, as little as must.

    Weights pay where they are searched and cost anything; else filters, where they are, and then operations, of which
    the least important that must not all go are exchanged for cheaper ones where nothing else is left.

    Args:
        found: What may go.
        masks: What stands.
        relative: How large each weight is, ``[N]``.
        target: What may be left.

    Returns:
        Masks of operations and of filters, and which weights go, ``[N]`` bool.

    Raises:
        ValueError: If not so much can go; names the least that can be reached.
    """
    ops, filters, weights = masks.ops.clone(), masks.filters.clone(), masks.weights
    none = torch.zeros(len(relative), dtype=torch.bool)

    def size() -> float:
        return float(found.levels.size(ops, filters, weights))

    if weights is not None and found.levels.sparse:
        stands = found.levels.standing(ops, filters) & (weights > 0)
        price = torch.where(stands, found.levels.price[: len(relative)], 0.0)
        order = torch.where(stands, relative, torch.inf).argsort()
        before = price[order].cumsum(0) - price[order]
        gone = none.clone()
        gone[order[before < size() - target]] = True
        if size() - float(price.sum()) > target:
            raise ValueError(
                f"the target {target:g} is below what is left without any weight, {size() - price.sum():g}"
            )
        return ops, filters, gone & stands
    searched = [level for level in (1, 0) if bool((masks.margins[level] != 1).any())]
    for level in searched:
        for at in _going(found, level, (ops, filters), masks.margins[level], target):
            (ops, filters)[level][found.together(at) if level == 0 else at] = 0.0
    if 0 in searched and size() > target:
        ops = _exchanged(found, masks.ops, (ops, filters), masks.margins[0], target)
    if size() > target:
        raise ValueError(
            f"the target {target:g} cannot be reached: {size():g} is the least that this search can leave; take a "
            "higher one, or search filters or weights too"
        )
    return ops, filters, none


def _going(found: Gates, level: int, masks: tuple[Tensor, Tensor], margin: Tensor, target: float) -> list[int]:
    """The fewest operations (level 0) or filters (1), least important first, without which the target is met."""
    last, order = masks[level].clone(), []
    for at in margin.argsort(stable=True).tolist():
        if bool(found.open(level, last)[at]):
            last[found.together(at) if level == 0 else at] = 0.0
            order.append(at)

    def enough(many: int) -> bool:
        left = [mask.clone() for mask in masks]
        for at in order[:many]:
            left[level][found.together(at) if level == 0 else at] = 0.0
        return float(found.levels.size(left[0], left[1])) <= target

    return order[: bisect_left(range(len(order) + 1), True, key=enough)]  # pricing everything takes long


def _exchanged(found: Gates, stood: Tensor, masks: tuple[Tensor, Tensor], margin: Tensor, target: float) -> Tensor:
    """What a target leaves of operations of which none can go any more, ``[operations]``.

    The least important are exchanged for the cheapest that can stand for them, until the target is met or all are the
    cheapest; then what stood comes back where it fits, the most important first.
    """
    ops, filters, prices = masks[0].clone(), masks[1], _prices(found)

    def fits(ops: Tensor) -> bool:
        return float(found.levels.size(ops, filters)) <= target

    for at in margin.argsort(stable=True).tolist():
        if fits(ops):
            break
        sets = [own for own in found.needed if bool((own == at).any()) and int((ops[own] > 0).sum()) == 1]
        best = [int(own[prices[own].argmin()]) for own in sets]
        if ops[at] and float(prices[[*{*best}]].sum()) < float(prices[at]):
            ops[found.together(at)] = 0.0
            for one in best:
                ops[found.together(one)] = 1.0
    if not fits(ops):
        ops = _cheapest(found)
    for at in margin.argsort(stable=True, descending=True).tolist():
        more = ops.clone()
        more[found.together(at)] = 1.0
        if stood[at] and not ops[at] and fits(more):
            ops = more
    return ops
