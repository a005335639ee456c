"""A plan whose result is computed but not yet written, as the proof takes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from regrow.core.axes import AxisGraph, Dim, axes_in
from regrow.core.plan import Plan
from regrow.surgery.carry import Prepared
from regrow.surgery.compensate import bias_of, read_dim
from regrow.surgery.layout import Layout, lay_out, unit_ids_after, units_after
from regrow.surgery.undo_store import UndoStore, locate_entries
from regrow.tracing.capture import Capture
from regrow.tracing.readings import Recording

RELATIVE_BOUND = 1e-9
"""The largest float64 difference allowed, relative to the largest value that is compared."""


ROUNDING = 16
"""How many units in the last place a tensor may differ from its value in float64."""


@dataclass(frozen=True)
class ProposedChange:
    """A plan whose result is computed but not yet written.

    Args:
        model: The network before the plan.
        axes: Its axes.
        plan: The plan.
        recording: The network's operations, and where they read axes.
        planned: The operations of the network after the plan.
        ready: The computed tensors and sizes.
        undo: The undo store before the plan; ``None`` without one.
    """

    model: nn.Module
    axes: AxisGraph
    plan: Plan
    recording: Recording
    planned: Capture
    ready: Prepared
    undo: UndoStore | None = None

    @property
    def recalls(self) -> bool:
        """Whether units are restored with the weights they had when cut."""
        return any(change.recalled for change in self.plan.changes.values())

    @cached_property
    def units(self) -> dict[str, Layout]:
        """Axis key → the layout of its units after the plan, for each axis that changes."""
        return {k: units_after(one, self.axes[k]) for k, one in self.plan.changes.items() if not one.idle}

    def lays(self, dims: Sequence[Dim]) -> dict[int, Layout]:
        """Return dimension index → its layout after the plan, for those of ``dims`` that change."""
        sizes = self.axes.sizes()
        moved = {i: dim for i, dim in enumerate(dims) if not self.units.keys().isdisjoint(axes_in(dim))}
        return {i: lay_out(dim, sizes, self.units) for i, dim in moved.items()}

    @property
    def bound(self) -> float:
        """The largest relative difference allowed; larger where earlier folds were rounded to its precision."""
        rounded = any(fold.weight in self.ready.done.values for fold in self.axes.folds)
        if not self.recalls or not (rounded or (self.undo is not None and self.undo.means)):
            return RELATIVE_BOUND
        return ROUNDING * max(torch.finfo(one.dtype).eps for one in self.model.parameters() if one.is_floating_point())


def computed_tensors(change: ProposedChange) -> set[str]:
    """Return the names of the tensors that a plan computes (folded, compensated, widened) rather than selects from."""
    folds = {fold.weight for fold in change.axes.folds}
    biases = {bias_of(weight) for weight in change.plan.means}
    grown = {name for name, lays in change.ready.lays.items() if any(bool(lay.is_new.any()) for lay in lays.values())}
    return {name for name in folds | biases | grown if name in change.ready.done.values}


def restored_means(change: ProposedChange) -> dict[str, dict[int, float]]:
    """Return weight → position of a restored input → the mean that had replaced it while it was cut."""
    axes, plan = change.axes, change.plan
    if change.undo is None:
        return {}
    grown = {key: one.grow for key, one in plan.changes.items()}
    next_ids = {axis.key: axis.next_id + grown.get(axis.key, 0) for axis in axes}
    ids = {
        axis.key: sorted(unit_ids_after(plan.changes[axis.key], axis)) if axis.key in grown else axis.ids
        for axis in axes
    }
    left = change.ready.undo.means if change.ready.undo is not None else {}
    result: dict[str, dict[int, float]] = {}
    for weight, row in change.undo.means.items():
        dim = read_dim(axes, weight)
        assert dim is not None
        for position, place in enumerate(locate_entries(axes.shapes[weight], next_ids, ids)[dim].tolist()):
            if place in row and place not in left.get(weight, {}):
                result.setdefault(weight, {})[position] = row[place]
    return result
