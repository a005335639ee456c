"""What is left of each tensor after a plan: which entries of which dimension stay."""

from collections.abc import Iterator, Mapping

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


def moved(slot: Slot, entries: Mapping[str, Mapping[int, Tensor]], left: int) -> Slot:
    """Where a slot lies after a cut that leaves ``left`` units of its axis.

    The old layout is regular, and every cut takes the same entries out of each of its blocks, so the new one is too:
    counting the entries kept in front of the slot, in one block and in one unit gives its new numbers.
    """
    kept = entries.get(slot.name, {}).get(slot.dim)
    if kept is None:
        return slot

    def count(start: int, length: int) -> int:
        return int(((kept >= start) & (kept < start + length)).sum())

    first = int(kept[kept >= slot.offset][0])
    block = (first - slot.offset) // slot.stride * slot.stride
    unit = slot.offset + block + (first - slot.offset - block) // slot.inner * slot.inner
    inner = count(unit, slot.inner)
    stride = count(slot.offset + block, slot.stride) if slot.outer > 1 else left * inner
    own = sum(count(slot.offset + o * slot.stride, slot.stride) > 0 for o in range(slot.outer))
    return Slot(slot.name, slot.dim, max(own, 1), stride, inner, count(0, slot.offset), slot.role)


def _cuts(plan: Plan) -> Iterator[tuple[Slot, int, tuple[int, ...]]]:
    for change in plan.changes.values():
        if len(change.keep) < change.size:
            for slot in change.slots:
                yield slot, change.size, change.keep


def _length(axes: AxisGraph, slot: Slot) -> int:
    return size_of(axes.shapes[slot.name][slot.dim], axes.sizes())
