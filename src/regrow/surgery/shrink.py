"""What is left of each tensor after a plan: which entries of which dimension stay."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from regrow.axes import AxisGraph, Slot, size_of
from regrow.plan import Plan


def kept_entries(axes: AxisGraph, plan: Plan) -> dict[str, dict[int, Tensor]]:
    """Name of a tensor → dimension → the entries that stay (int64, ascending).

    A dimension that several axes share keeps an entry if all of them keep it.

    Args:
        axes: The network's axes before the plan.
        plan: What is cut.
    """
    masks: dict[str, dict[int, Tensor]] = {}
    for slot, size, keep in _cuts(plan):
        length = _length(axes, slot)
        mask = masks.setdefault(slot.name, {}).setdefault(slot.dim, torch.ones(length, dtype=torch.bool))
        gone = torch.ones(size, dtype=torch.bool)
        gone[list(keep)] = False
        mask[slot.positions(size)[gone].flatten()] = False
    return {name: {dim: mask.nonzero().flatten() for dim, mask in dims.items()} for name, dims in masks.items()}


def taken(tensor: Tensor, entries: Mapping[int, Tensor]) -> Tensor:
    """The part of a tensor that stays, in storage of its own."""
    for dim, index in entries.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def moved(slot: Slot, entries: Mapping[str, Mapping[int, Tensor]], size: int, units: Sequence[int]) -> Slot | None:
    """Where a slot lies after a cut; ``None`` where nothing of it is left.

    The old layout is regular, and every cut takes the same entries out of each of its blocks, so the new one is too:
    the place of the first entry that is left, of the same one in the next block, and counts give its new numbers.

    Args:
        slot: Where it lay.
        entries: What stays of each tensor.
        size: How many units the axis had.
        units: Which of them stay.
    """
    kept = entries.get(slot.name, {}).get(slot.dim)
    if kept is None:
        return slot
    places = slot.positions(size)[list(units)].view(len(units), slot.outer, slot.inner)
    stays = torch.isin(places, kept)
    if not bool(stays.any()):
        return None
    blocks, inner = stays.any(2).any(0).nonzero().flatten(), stays.any(1).any(0).nonzero().flatten()
    new = torch.searchsorted(kept, places[0, blocks][:, inner[0]].contiguous())
    width = len(inner)
    stride = int(new[1] - new[0]) if len(blocks) > 1 else len(units) * width
    return Slot(slot.name, slot.dim, len(blocks), stride, width, int(new[0]), slot.role)


def _cuts(plan: Plan) -> Iterator[tuple[Slot, int, tuple[int, ...]]]:
    for change in plan.changes.values():
        if len(change.keep) < change.size:
            for slot in change.slots:
                yield slot, change.size, change.keep


def _length(axes: AxisGraph, slot: Slot) -> int:
    return size_of(axes.shapes[slot.name][slot.dim], axes.sizes())
