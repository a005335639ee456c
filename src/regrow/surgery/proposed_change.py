"""A plan that is worked out and not carried out yet, as the proof reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from regrow.axes import AxisGraph, Dim, axes_in
from regrow.plan import Plan
from regrow.surgery.carry import Prepared
from regrow.surgery.compensate import bias_of, read_dim
from regrow.surgery.layout import Layout, lay_out, unit_ids_after, units_after
from regrow.surgery.undo_store import UndoStore, locate_entries
from regrow.tracing.capture import Capture
from regrow.tracing.readings import Recording

RELATIVE_BOUND = 1e-9
"""What a float64 difference may be, as a part of the largest number that is compared."""


ROUNDING = 16
"""How many units in the last place of its precision a tensor may differ from what it is in float64."""


@dataclass(frozen=True)
class ProposedChange:
    """A plan that is worked out and not carried out yet.

    Args:
        model: The network as it is.
        axes: Its axes.
        plan: The plan.
        recording: The network's operations, and where they read axes.
        planned: The operations of the network that the plan leaves.
        ready: What the plan comes to.
        undo: What was cut before.
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
        """Whether units come back with what they held."""
        return any(change.recalled for change in self.plan.changes.values())

    @cached_property
    def units(self) -> dict[str, Layout]:
        """The units of each axis that changes, afterwards."""
        return {k: units_after(one, self.axes[k]) for k, one in self.plan.changes.items() if not one.idle}

    def lays(self, dims: Sequence[Dim]) -> dict[int, Layout]:
        """The entries afterwards of those of some dimensions that change."""
        sizes = self.axes.sizes()
        moved = {i: dim for i, dim in enumerate(dims) if not self.units.keys().isdisjoint(axes_in(dim))}
        return {i: lay_out(dim, sizes, self.units) for i, dim in moved.items()}

    @property
    def bound(self) -> float:
        """What a difference may be; what a cut has folded or compensated was rounded to the network's precision."""
        rounded = any(fold.weight in self.ready.done.values for fold in self.axes.folds)
        if not self.recalls or not (rounded or (self.undo is not None and self.undo.means)):
            return RELATIVE_BOUND
        return ROUNDING * max(torch.finfo(one.dtype).eps for one in self.model.parameters() if one.is_floating_point())


def computed_tensors(change: ProposedChange) -> set[str]:
    """The tensors in which a plan does not only select numbers, but works some out."""
    folds = {fold.weight for fold in change.axes.folds}
    biases = {bias_of(weight) for weight in change.plan.means}
    grown = {name for name, lays in change.ready.lays.items() if any(bool(lay.is_new.any()) for lay in lays.values())}
    return {name for name in folds | biases | grown if name in change.ready.done.values}


def restored_means(change: ProposedChange) -> dict[str, dict[int, float]]:
    """Weight → position of an input that comes back → what stood in for it."""
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
