"""Choose what a search removes at a commit, from masks and a cost target, and which operations it revives."""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from regrow.allocation.gates import GateMasks, Gates
from regrow.core.axes import AxisGraph


def select_removed(gates: Gates, masks: GateMasks, axes: AxisGraph) -> tuple[list[str], dict[str, list[int]]]:
    """Return what the masks set to 0: paths of operations to drop; axis key → indices of the filters that stay.

    Axes that lose no filter, or lie whole in dropped operations, are left out.
    """
    removed = gates.alive & gates.runs & (masks.ops == 0)
    drop = [gates.ops[i] for i in removed.nonzero()[:, 0].tolist()]
    keep = {}
    for key, (base, size, _) in zip(gates.levels.axes, gates.spans, strict=True):
        active = masks.filters[base : base + size] > 0
        has_slots_left = any(not any(gates.holds(path, slot.name) for path in drop) for slot in axes[key].slots)
        if has_slots_left and not bool(active.all()):
            keep[key] = active.nonzero()[:, 0].tolist()
    return drop, keep


def limit_removal(gates: Gates, masks: GateMasks, allowed: float, fill: float = 0.0) -> GateMasks:
    """Return masks that remove less: operations and filters are put back, up to a network cost of ``allowed``.

    Those nearest to their thresholds come first. Then other operations follow, each of which takes at least a tenth of
    what is left, until the cost is ``fill`` of ``allowed``.
    """
    margins = torch.cat(masks.margins)
    eligible = torch.cat([gates.alive & gates.runs, torch.ones_like(masks.filters, dtype=torch.bool)])
    removed = (eligible & (torch.cat([masks.ops, masks.filters]) == 0)).nonzero()[:, 0]
    order = removed[margins[removed].argsort(descending=True)].tolist()

    def cost(indices: Sequence[int]) -> float:
        return float(gates.levels.size(*set_masks(gates, masks, indices, 1.0), masks.weights))

    most = bisect_left(range(1, len(order) + 1), True, key=lambda n: cost(order[:n]) > allowed)  # pricing all is slow
    back, size = order[:most], cost(order[:most])
    for index in (i for i in order[most:] if i < len(masks.ops)):
        if size < fill * allowed and (allowed - size) / 10 <= (more := cost([*back, index]) - size) <= allowed - size:
            back, size = [*back, index], size + more
    ops, filters = set_masks(gates, masks, back, 1.0)
    return replace(masks, ops=ops, filters=filters)


def set_masks(gates: Gates, masks: GateMasks, indices: Sequence[int], value: float) -> tuple[Tensor, Tensor]:
    """Return copies of the masks of operations and filters, set to ``value`` at ``indices``; tied operations follow.

    An index below the number of operations is one of an operation; those after it count filters. What rounding asks
    for stays (:meth:`Gates.round_filters`).
    """
    ops, filters = masks.ops.clone(), masks.filters.clone()
    for index in indices:
        if index < len(ops):
            ops[gates.tied_with(index)] = value
        else:
            filters[index - len(ops)] = value
    return ops, gates.round_filters(filters, masks.margins[1])


def protect_cheapest(gates: Gates, masks: GateMasks, target: float, searched: Collection[str]) -> GateMasks:
    """Return masks with which the cost ``target`` can still be reached, by putting cheap operations back.

    Put back is the cheapest operation of sets of which one must stay, nearest to its threshold first, until the target
    can be reached; nothing if it never can. ``searched``: what may be removed, see :func:`least_cost`.
    """
    ops, margin = masks.ops.clone(), masks.margins[0]
    can_reach = least_cost(gates, searched) <= target
    removed = (_select_cheapest(gates) > ops).nonzero()[:, 0].tolist() if can_reach else []
    for op in sorted(removed, key=lambda op: (-margin[op].item(), op)):
        if least_cost(replace(gates, alive=gates.alive & (ops > 0)), searched) <= target:
            break
        ops[gates.tied_with(op)] = 1.0
    return replace(masks, ops=ops)


def savings(gates: Gates, masks: GateMasks) -> dict[str, float]:
    """Return the cost that masks remove, by ``"operations"``, then ``"filters"`` and ``"weights"`` of what is left."""
    size, ones = gates.levels.size, torch.ones_like(masks.filters)
    whole, ops, filters = size(gates.alive.float(), ones), size(masks.ops, ones), size(masks.ops, masks.filters)
    weights = size(masks.ops, masks.filters, masks.weights)
    return {"operations": float(whole - ops), "filters": float(ops - filters), "weights": float(filters - weights)}


def least_cost(gates: Gates, searched: Collection[str]) -> float:
    """Return the cost of the cheapest network that can still be reached.

    It has the cheapest operation of each set of which one must stay, the fewest filters of each axis, and no weight,
    each if it is ``searched`` (``"operations"``, ``"filters"``, ``"weights"``). If sets overlap, another choice may
    cost a little less.
    """
    levels = gates.levels
    ops, weights = gates.alive.float(), None
    filters = ops.new_ones(levels.filters)
    if "operations" in searched and len(ops):
        ops = _select_cheapest(gates)
    for base, size, fewest in gates.spans if "filters" in searched else ():
        filters[base + min(fewest, size) : base + size] = 0.0
    if "weights" in searched:
        weights = ops.new_zeros(levels.entries)
    return float(levels.size(ops, filters, weights))


def operation_prices(gates: Gates) -> Tensor:
    """Return the cost of each operation with those tied to it, ``[operations]``; ∞ if it is dropped or does not run."""
    running = gates.alive & gates.runs
    each = torch.where(running, gates.prices(), 0.0)
    return torch.where(running, torch.zeros_like(each).index_add(0, gates.tied, each)[gates.tied], torch.inf)


def _select_cheapest(gates: Gates) -> Tensor:
    """Return a mask, ``[operations]``: 1 for the cheapest of each set of which one must stay, and what does not run."""
    prices = operation_prices(gates)
    ops = prices.new_zeros(len(gates.ops), dtype=torch.float32)
    for needed in gates.needed:
        if not ops[needed].any():
            ops[gates.tied_with(int(needed[prices[needed].argmin()]))] = 1.0
    return torch.where(gates.runs, ops, gates.alive.float())


def fit_to_budget(
    gates: Gates, masks: GateMasks, relative: Tensor | None, target: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return masks that also remove the least important of what is active, until the network's cost is ≤ ``target``.

    ``relative``: the importance of each weight, ``[N]``, which is needed if weights are searched. Returns (mask of
    operations, mask of filters, weights removed, ``[N]`` bool); ``ValueError`` if the target cannot be met. Weights are
    removed if they are searched and the measure counts only non-zero ones. What no weight can save is taken from
    filters, if they are searched, and then operations; if that is not enough, operations that a node needs are
    exchanged for cheaper ones, the least important first.
    """
    ops, filters, weights = masks.ops.clone(), masks.filters.clone(), masks.weights
    none = gates.alive.new_zeros(gates.levels.entries)
    searched = relative if weights is not None and gates.levels.sparse else None
    floor = torch.zeros_like(weights) if searched is not None and weights is not None else weights

    def size() -> float:
        return float(gates.levels.size(ops, filters, floor))

    # Margins of a level that is not searched are all 1.
    searches_ops, searches_filters = (bool((margin != 1).any()) for margin in masks.margins)
    removable = [len(ops) + i for i in removable_filters(gates, filters, masks.margins[1])] if searches_filters else []
    removable += _removable_operations(gates, ops, masks.margins[0]) if searches_ops else []

    def fits(count: int) -> bool:
        return float(gates.levels.size(*set_masks(gates, masks, removable[:count], 0.0), floor)) <= target

    fewest = bisect_left(range(len(removable) + 1), True, key=fits)  # pricing everything takes long
    ops, filters = set_masks(gates, masks, removable[:fewest], 0.0)
    if searches_ops and size() > target:
        ops = _exchange_operations(gates, masks.ops, (ops, filters), masks.margins[0], target)
    if size() > target:
        raise ValueError(
            f"the target {target:g} cannot be reached: {size():g} is the least that this search can leave; take a "
            "higher one, or search filters or weights too"
        )
    if searched is not None and weights is not None:
        active = gates.levels.active(ops, filters) & (weights > 0)
        price = torch.where(active, gates.levels.price[: len(searched)], 0.0)
        order = torch.where(active, searched, torch.inf).argsort()
        before = price[order].cumsum(0) - price[order]
        over = float(gates.levels.size(ops, filters, weights)) - target
        none = none.index_fill(0, order[before < over], True) & active
    return ops, filters, none


def _removable_operations(gates: Gates, ops: Tensor, margin: Tensor) -> list[int]:
    """Return the indices of operations of mask ``ops`` that can be removed in turn, the lowest ``margin`` first."""
    remaining, order = ops.clone(), []
    for op in margin.argsort(stable=True).tolist():
        if bool(gates.removable(remaining)[op]):
            remaining[gates.tied_with(op)] = 0.0
            order.append(op)
    return order


def removable_filters(gates: Gates, filters: Tensor, margin: Tensor) -> list[int]:
    """Return the indices of filters of mask ``filters`` that can be removed in turn, the lowest ``margin`` first."""
    axis = [i for i, (_, size, _) in enumerate(gates.spans) for _ in range(size)]
    active = (filters > 0).tolist()
    spare = [sum(active[base : base + size]) - least for base, size, least in gates.spans]
    order = []
    for i in margin.argsort(stable=True).tolist():
        if active[i] and spare[axis[i]] > 0:
            spare[axis[i]] -= 1
            order.append(i)
    return order


def _exchange_operations(
    gates: Gates, before: Tensor, masks: tuple[Tensor, Tensor], margin: Tensor, target: float
) -> Tensor:
    """Return the mask of operations, ``[operations]``, once those that a node needs are exchanged for cheaper ones.

    ``before``: the mask of operations that may come back; ``masks``: the present masks of operations and filters;
    ``margin``: how far each operation is above its threshold. Those of the lowest margin are exchanged for the cheapest
    that can replace them, until the target is met or all are the cheapest; then the former operations are put back
    where they fit, those of the highest margin first.
    """
    ops, filters, prices = masks[0].clone(), masks[1], operation_prices(gates)

    def fits(ops: Tensor) -> bool:
        return float(gates.levels.size(ops, filters)) <= target

    for op in margin.argsort(stable=True).tolist():
        if fits(ops):
            break
        sets = [needed for needed in gates.needed if bool((needed == op).any()) and int((ops[needed] > 0).sum()) == 1]
        best = {int(needed[prices[needed].argmin()]) for needed in sets}
        if ops[op] and float(prices[[*best]].sum()) < float(prices[op]):
            ops[gates.tied_with(op)] = 0.0
            for cheaper in best:
                ops[gates.tied_with(cheaper)] = 1.0
    if not fits(ops):
        ops = _select_cheapest(gates)
    for op in margin.argsort(stable=True, descending=True).tolist():
        larger = ops.clone()
        larger[gates.tied_with(op)] = 1.0
        if before[op] and not ops[op] and fits(larger):
            ops = larger
    return ops


def sample_operations(
    dropped: Sequence[str],
    alive: Sequence[str],
    drift: Mapping[str, float],
    weight: Mapping[str, float],
    count: int,
    generator: torch.Generator,
) -> list[str]:
    """Return the paths of at most ``count`` dropped operations to revive, sampled by the regrowth rule of MGAS's code.

    ``dropped``, ``alive``: paths of operations. ``drift`` and ``weight``: path of each one alive → the magnitude of the
    smoothed gradient of its importance logit, and its importance. For each cell i and kind j, G is the mean drift and A
    the mean importance over the operations of that kind alive (half of the least in the cell if there is none). Both
    are normalised over j: p_ij = (G + A) / 2. A cell's share q_i is the mean of its normalised drift and importance per
    operation alive. Each of ``count`` draws picks (i, j) with probability q_i · p_ij and revives one dropped operation
    of kind j in cell i; if there is none, the draw is lost.

    Source: the authors' code (train_search.py), read; the normalisations as there.
    """
    cells = [*dict.fromkeys(map(cell_of, (*alive, *dropped)))]
    every_kind = [*dict.fromkeys(map(kind_of, (*alive, *dropped)))]
    chance = torch.zeros(len(cells), len(every_kind), dtype=torch.float64)
    share = torch.zeros(len(cells), 2, dtype=torch.float64)
    for i, cell in enumerate(cells):
        active = [path for path in alive if cell_of(path) == cell]
        for k, values in enumerate((drift, weight)):
            means: list[float | None] = []
            for kind in every_kind:
                each = [values[path] for path in active if kind_of(path) == kind]
                means.append(sum(each) / len(each) if each else None)
            least = min((mean for mean in means if mean is not None), default=0.0) / 2
            row = torch.tensor([least if mean is None else mean for mean in means], dtype=torch.float64)
            share[i, k] = row.sum() / max(1, len(active))
            chance[i] += _normalize(row) / 2
    q = (_normalize(share[:, 0]) + _normalize(share[:, 1])) / 2
    ends = (q[:, None] * chance).flatten().cumsum(0)
    remaining, result = list(dropped), []
    for draw in torch.rand(count, generator=generator, dtype=torch.float64).tolist():
        i = min(int(torch.searchsorted(ends, draw)), len(ends) - 1)
        cell, kind = cells[i // len(every_kind)], every_kind[i % len(every_kind)]
        if fitting := [path for path in remaining if (cell_of(path), kind_of(path)) == (cell, kind)]:
            before = float(ends[i - 1]) if i else 0.0
            inside = (draw - before) / max(float(ends[i]) - before, 1e-12)  # where in its interval the draw lies
            chosen = fitting[min(int(inside * len(fitting)), len(fitting) - 1)]
            remaining.remove(chosen)
            result.append(chosen)
    return result


def kind_of(path: str) -> str:
    """Return the kind of an operation: the last part of its path without the number of its source.

    >>> kind_of("cells.1.nodes.0.ops.sep3_2"), cell_of("cells.1.nodes.0.ops.sep3_2")
    ('sep3', 'cells.1')
    """
    leaf = path.rpartition(".")[2]
    name, _, source = leaf.rpartition("_")
    return name if source.isdigit() and name else leaf


def cell_of(path: str) -> str:
    """Return the path of the cell that an operation lies in.

    That is what comes before its node, or the sum of candidates itself where there are no nodes.

    >>> cell_of("blocks.3.ops.skip")
    'blocks.3'
    """
    total = path.rpartition(".ops.")[0]
    return total.rpartition(".nodes.")[0] or total


def _normalize(values: Tensor) -> Tensor:
    """Return values divided by their sum; equal shares if that is not positive."""
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / len(values))
