"""Choose the operations, filters and weights that a search removes at a commit, from masks and a cost target."""

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
    """Return the operations to drop, and for each axis that loses filters the positions of those that stay.

    Args:
        found: The gates: where operations, filters and weights lie, and which may be removed.
        masks: The present masks; what they set to 0 is removed.
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
    """Return masks that remove less: what is nearest to its threshold is put back while the cost fits.

    Args:
        found: The gates of the network.
        masks: The present masks.
        allowed: The cost that the network may have after this commit, in the target's unit.
        bare: Whether operations without parameters, such as pools, are put back too, although they cost almost nothing;
            they always are in sums of which a search leaves one operation.
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
    """Return masks that keep the target reachable: the cheapest operation of a needed set is put back.

    Those nearest to their thresholds are put back first, until the target can be reached; none if it never can.

    Args:
        found: The gates of the whole network, whether it is searched in this stage or not.
        masks: The present masks.
        target: The cost that the whole network may have in the end.
        searched: The levels that are searched: ``"operations"``, ``"filters"``, ``"weights"``.
    """
    ops, margin = masks.ops.clone(), masks.margins[0]
    lost = (_cheapest(found) > ops).nonzero()[:, 0].tolist() if least(found, searched) <= target else []
    for at in sorted(lost, key=lambda at: (-margin[at].item(), at)):
        if least(replace(found, alive=found.alive & (ops > 0)), searched) <= target:
            break
        ops[found.together(at)] = 1.0
    return replace(masks, ops=ops)


def savings(found: Gates, masks: GateMasks) -> dict[str, float]:
    """Return level → the cost that its masks remove: operations, then filters of the rest, then weights.

    Args:
        found: The gates of the network.
        masks: The present masks.
    """
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
    """Return the cost of the cheapest network that can still be reached.

    It has the cheapest operation of each node, the fewest filters of each axis, and no weight, as far as these are
    searched.

    If needed sets overlap, another choice may cost a little less.

    Args:
        found: The gates of the network.
        searched: The levels that are searched: ``"operations"``, ``"filters"``, ``"weights"``.
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
    """Return the cost of each operation with those decided with it, ``[operations]``; ∞ if gone or not running."""
    here = found.alive & found.runs
    own = torch.where(here, found.prices(), 0.0)
    return torch.where(here, torch.zeros_like(own).index_add(0, found.tied, own)[found.tied], torch.inf)


def _cheapest(found: Gates) -> Tensor:
    """Return a mask with the cheapest operation of each needed set that has none yet, ``[operations]``.

    What does not run stays as it is.
    """
    ops, prices = torch.zeros(len(found.ops)), _prices(found)
    for own in found.needed:
        if not ops[own].any():
            ops[found.together(int(own[prices[own].argmin()]))] = 1.0
    return torch.where(found.runs, ops, found.alive.float())


def threshold_for(share: float, importance: Tensor, whole: int) -> float:
    """Return the importance below which units are cut so that ``share`` of the original ``whole`` units stay.

    It is 0 if no more than that many units remain.

    Args:
        share: The fraction of ``whole`` that stays, in [0, 1]; at least one unit stays.
        importance: The importance of each unit that remains, ``[n]``.
        whole: How many units there were at first.

    >>> threshold_for(0.5, torch.tensor([0.1, 0.4, 0.2, 0.3]), 4)
    0.30000001192092896
    """
    many = len(importance) - max(1, ceil(share * whole))
    return float(importance.sort().values[many]) if many > 0 else 0.0


def fit_to_budget(found: Gates, masks: GateMasks, relative: Tensor, target: float) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the least important of what is still active until the cost meets the target, and no more.

    Weights are removed if they are searched and the measure counts only non-zero ones. Otherwise filters are removed,
    if they are searched, and then operations; if that is not enough, operations that a node needs are exchanged for
    cheaper ones, the least important first.

    Args:
        found: The gates of the network.
        masks: The present masks.
        relative: The magnitude of each weight relative to the mean of its tensor, ``[N]``.
        target: The cost that may be left.

    Returns:
        The masks of operations and of filters, and which weights are removed, ``[N]`` bool.

    Raises:
        ValueError: If the target cannot be reached; the message names the least cost that can.
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
    """Return the fewest operations (level 0) or filters (1), least important first, whose removal meets the target."""
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
    """Exchange operations that a node needs for cheaper ones until the target is met, ``[operations]``.

    The least important are exchanged for the cheapest that can replace them, until the target is met or all are the
    cheapest; then the former operations are put back where they fit, the most important first.
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
