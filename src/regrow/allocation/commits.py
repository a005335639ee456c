"""Choose the operations, filters and weights that a search removes at a commit, from masks and a cost target."""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from regrow.allocation.gates import GateMasks, Gates
from regrow.core.axes import AxisGraph
from regrow.core.branches import lies_in


def select_removed(gates: Gates, masks: GateMasks, axes: AxisGraph) -> tuple[list[str], dict[str, list[int]]]:
    """Return the operations to drop, and for each axis that loses filters the positions of those that stay.

    Args:
        gates: The gates: where operations, filters and weights lie, and which may be removed.
        masks: The present masks; what they set to 0 is removed.
        axes: The network's axes.
    """
    there = zip(gates.ops, gates.alive & gates.runs, masks.ops, strict=True)
    drop = [path for path, here, mask in there if here and not mask]
    keep = {}
    for key, (base, size, _) in zip(gates.levels.axes, gates.spans, strict=True):
        own = masks.filters[base : base + size] > 0
        stays = any(not any(lies_in(slot.name, path) for path in drop) for slot in axes[key].slots)
        if stays and not bool(own.all()):
            keep[key] = own.nonzero()[:, 0].tolist()
    return drop, keep


def limit_removal(gates: Gates, masks: GateMasks, allowed: float, bare: bool = True) -> GateMasks:
    """Return masks that remove less: what is nearest to its threshold is put back while the cost fits.

    Args:
        gates: The gates of the network.
        masks: The present masks.
        allowed: The cost that the network may have after this commit, in the target's unit.
        bare: Whether operations without parameters, such as pools, are put back too, although they cost almost nothing;
            they always are in sums of which a search leaves one operation.
    """
    margins = torch.cat(masks.margins)
    here = torch.cat([gates.alive & gates.runs, torch.ones_like(masks.filters, dtype=torch.bool)])
    if not bare:
        here[: len(gates.ops)] &= gates.single | ~gates.bare()
    lost = (here & (torch.cat([masks.ops, masks.filters]) == 0)).nonzero()[:, 0]
    order = lost[margins[lost].argsort(descending=True)].tolist()

    def back(many: int) -> tuple[Tensor, Tensor]:
        ops, filters = masks.ops.clone(), masks.filters.clone()
        for at in order[:many]:
            mask, i = (ops, gates.together(at)) if at < len(ops) else (filters, at - len(ops))
            mask[i] = 1.0
        return ops, filters

    def too_large(many: int) -> bool:
        return float(gates.levels.size(*back(many), masks.weights)) > allowed

    ops, filters = back(bisect_left(range(1, len(order) + 1), True, key=too_large))  # pricing everything takes long
    return replace(masks, ops=ops, filters=filters)


def protect_cheapest(gates: Gates, masks: GateMasks, target: float, searched: Collection[str]) -> GateMasks:
    """Return masks that keep the target reachable: the cheapest operation of a needed set is put back.

    Those nearest to their thresholds are put back first, until the target can be reached; none if it never can.

    Args:
        gates: The gates of the whole network, whether it is searched in this stage or not.
        masks: The present masks.
        target: The cost that the whole network may have in the end.
        searched: The levels that are searched: ``"operations"``, ``"filters"``, ``"weights"``.
    """
    ops, margin = masks.ops.clone(), masks.margins[0]
    lost = (_cheapest(gates) > ops).nonzero()[:, 0].tolist() if least(gates, searched) <= target else []
    for at in sorted(lost, key=lambda at: (-margin[at].item(), at)):
        if least(replace(gates, alive=gates.alive & (ops > 0)), searched) <= target:
            break
        ops[gates.together(at)] = 1.0
    return replace(masks, ops=ops)


def savings(gates: Gates, masks: GateMasks) -> dict[str, float]:
    """Return level → the cost that its masks remove: operations, then filters of the rest, then weights.

    Args:
        gates: The gates of the network.
        masks: The present masks.
    """
    ones = torch.ones_like(masks.filters)
    steps = [
        gates.levels.size(gates.alive.float(), ones),
        gates.levels.size(masks.ops, ones),
        gates.levels.size(masks.ops, masks.filters),
        gates.levels.size(masks.ops, masks.filters, masks.weights),
    ]
    names = ("operations", "filters", "weights")
    return {name: float(steps[i] - steps[i + 1]) for i, name in enumerate(names)}


def least(gates: Gates, searched: Collection[str]) -> float:
    """Return the cost of the cheapest network that can still be reached.

    It has the cheapest operation of each node, the fewest filters of each axis, and no weight, as far as these are
    searched.

    If needed sets overlap, another choice may cost a little less.

    Args:
        gates: The gates of the network.
        searched: The levels that are searched: ``"operations"``, ``"filters"``, ``"weights"``.
    """
    levels = gates.levels
    ops, weights = gates.alive.float(), None
    filters = ops.new_ones(levels.filters)
    if "operations" in searched and len(ops):
        ops = _cheapest(gates)
    for base, size, fewest in gates.spans if "filters" in searched else ():
        filters[base + min(fewest, size) : base + size] = 0.0
    if "weights" in searched:
        weights = ops.new_zeros(levels.entries)
    return float(levels.size(ops, filters, weights))


def _prices(gates: Gates) -> Tensor:
    """Return the cost of each operation with those decided with it, ``[operations]``; ∞ if gone or not running."""
    here = gates.alive & gates.runs
    own = torch.where(here, gates.prices(), 0.0)
    return torch.where(here, torch.zeros_like(own).index_add(0, gates.tied, own)[gates.tied], torch.inf)


def _cheapest(gates: Gates) -> Tensor:
    """Return a mask with the cheapest operation of each needed set that has none yet, ``[operations]``.

    What does not run stays as it is.
    """
    prices = _prices(gates)
    ops = prices.new_zeros(len(gates.ops), dtype=torch.float32)
    for own in gates.needed:
        if not ops[own].any():
            ops[gates.together(int(own[prices[own].argmin()]))] = 1.0
    return torch.where(gates.runs, ops, gates.alive.float())


def fit_to_budget(
    gates: Gates, masks: GateMasks, relative: Tensor | None, target: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the least important of what is still active until the cost meets the target, and no more.

    Weights are removed if they are searched and the measure counts only non-zero ones. Otherwise filters are removed,
    if they are searched, and then operations; if that is not enough, operations that a node needs are exchanged for
    cheaper ones, the least important first.

    Args:
        gates: The gates of the network.
        masks: The present masks.
        relative: The magnitude of each weight relative to the mean of its tensor, ``[N]``, if weights
            are masked.
        target: The cost that may be left.

    Returns:
        The masks of operations and of filters, and which weights are removed, ``[N]`` bool.

    Raises:
        ValueError: If the target cannot be reached; the message names the least cost that can.
    """
    ops, filters, weights = masks.ops.clone(), masks.filters.clone(), masks.weights
    none = gates.alive.new_zeros(gates.levels.entries)

    def size() -> float:
        return float(gates.levels.size(ops, filters, weights))

    if weights is not None and relative is not None and gates.levels.sparse:
        active = gates.levels.standing(ops, filters) & (weights > 0)
        price = torch.where(active, gates.levels.price[: len(relative)], 0.0)
        order = torch.where(active, relative, torch.inf).argsort()
        before = price[order].cumsum(0) - price[order]
        gone = none.clone()
        gone[order[before < size() - target]] = True
        if size() - float(price.sum()) > target:
            raise ValueError(
                f"the target {target:g} is below what is left without any weight, {size() - price.sum():g}"
            )
        return ops, filters, gone & active
    searched = [level for level in (1, 0) if bool((masks.margins[level] != 1).any())]
    for level in searched:
        for at in _going(gates, level, (ops, filters), masks.margins[level], target):
            (ops, filters)[level][gates.together(at) if level == 0 else at] = 0.0
    if 0 in searched and size() > target:
        ops = _exchanged(gates, masks.ops, (ops, filters), masks.margins[0], target)
    if size() > target:
        raise ValueError(
            f"the target {target:g} cannot be reached: {size():g} is the least that this search can leave; take a "
            "higher one, or search filters or weights too"
        )
    return ops, filters, none


def _going(gates: Gates, level: int, masks: tuple[Tensor, Tensor], margin: Tensor, target: float) -> list[int]:
    """Return the fewest operations (level 0) or filters (1), least important first, whose removal meets the target."""
    order = _openings(gates, masks[level], margin) if level == 1 else []
    last = masks[level].clone()
    for at in margin.argsort(stable=True).tolist() if level == 0 else ():
        if bool(gates.open(level, last)[at]):
            last[gates.together(at)] = 0.0
            order.append(at)

    def enough(many: int) -> bool:
        left = [mask.clone() for mask in masks]
        for at in order[:many]:
            left[level][gates.together(at) if level == 0 else at] = 0.0
        return float(gates.levels.size(left[0], left[1])) <= target

    return order[: bisect_left(range(len(order) + 1), True, key=enough)]  # pricing everything takes long


def _openings(gates: Gates, filters: Tensor, margin: Tensor) -> list[int]:
    """Return the filters that can be removed one after the other, least important first, until no axis has more."""
    axis = [i for i, (_, size, _) in enumerate(gates.spans) for _ in range(size)]
    active = (filters > 0).tolist()
    spare = [sum(active[base : base + size]) - least for base, size, least in gates.spans]
    order = []
    for at in margin.argsort(stable=True).tolist():
        if active[at] and spare[axis[at]] > 0:
            spare[axis[at]] -= 1
            order.append(at)
    return order


def _exchanged(gates: Gates, before: Tensor, masks: tuple[Tensor, Tensor], margin: Tensor, target: float) -> Tensor:
    """Exchange operations that a node needs for cheaper ones until the target is met, ``[operations]``.

    The least important are exchanged for the cheapest that can replace them, until the target is met or all are the
    cheapest; then the former operations are put back where they fit, the most important first.
    """
    ops, filters, prices = masks[0].clone(), masks[1], _prices(gates)

    def fits(ops: Tensor) -> bool:
        return float(gates.levels.size(ops, filters)) <= target

    for at in margin.argsort(stable=True).tolist():
        if fits(ops):
            break
        sets = [own for own in gates.needed if bool((own == at).any()) and int((ops[own] > 0).sum()) == 1]
        best = [int(own[prices[own].argmin()]) for own in sets]
        if ops[at] and float(prices[[*{*best}]].sum()) < float(prices[at]):
            ops[gates.together(at)] = 0.0
            for one in best:
                ops[gates.together(one)] = 1.0
    if not fits(ops):
        ops = _cheapest(gates)
    for at in margin.argsort(stable=True, descending=True).tolist():
        more = ops.clone()
        more[gates.together(at)] = 1.0
        if before[at] and not ops[at] and fits(more):
            ops = more
    return ops
