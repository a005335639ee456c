"""Carry a plan through the undo store: store the weights that it cuts, fetch those that it restores.

Tensors that a fold or a compensation rewrites are stored as they were before, with the divisor and the means that they
hold for, and computed anew from that. So undoing needs no inverse, which rounding would spoil: restored weights are
equal bit by bit.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from regrow.core.axes import AxisGraph, Dim, Fold, Role, size_of
from regrow.surgery.compensate import PlannedTensors, bias_dim, bias_of, divisor_size, fold_constants, read_dim, rescale
from regrow.surgery.layout import Layout, ids_after, next_ids_after
from regrow.surgery.undo_store import RemovedWeights, UndoStore, get, locate_entries, put
from regrow.tracing.model_state import select_state


def plan_with_undo(
    undo: UndoStore, tensors: PlannedTensors, values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float | None], tuple[Fold, ...], tuple[str, ...], UndoStore]:
    """Compute a plan's tensors, constants, folds, removed biases, and the undo store after it; change nothing.

    ``values`` are the tensors without folds.
    """
    axes, plan = tensors.axes, tensors.plan
    undo.check(axes, plan)
    steps = _UndoSteps(undo, tensors)
    before, after = undo.means, steps.means_after()
    biases = {bias_of(weight): weight for weight in {**before, **after}}
    result, removed = dict(values), []
    for name in steps.names_reached():
        if name not in biases:
            result[name] = steps.rewrite(name, values.get(name))
    for bias, weight in biases.items():
        old, new = before.get(weight, {}), after.get(weight, {})
        if old != new or bias in values or steps.size(bias, False) != steps.size(bias, True):
            result[bias] = steps.compensate(bias, weight, old, new, values.get(bias))
            if bias in steps.added and not new and not bool(result[bias].any()):
                removed.append(bias)
                del result[bias], steps.weights[bias]
    epsilons, folds, constants = fold_constants(tensors.model, axes, tensors.sizes, undo.constants)
    restorable = {}
    for axis in axes:
        change = plan.changes.get(axis.key)
        dropped = {axis.ids[unit] for unit in change.dropped} if change else set()
        if ids := ({*undo.restorable.get(axis.key, ())} | dropped) - {*steps.ids_after[axis.key]}:
            restorable[axis.key] = tuple(sorted(ids))
    added = tuple(name for name in steps.added if name not in removed)
    store = UndoStore(steps.weights, steps.next_ids, restorable, after, constants, added, undo.branches, axes.network)
    return result, epsilons, folds, tuple(removed), store


class _UndoSteps:
    """Shared state of the steps of :func:`plan_with_undo`."""

    def __init__(self, undo: UndoStore, tensors: PlannedTensors) -> None:
        self.model, self.lays = tensors.model, tensors.lays
        self.axes, self.plan = axes, plan = tensors.axes, tensors.plan
        self.next_ids, self.ids_after = next_ids_after(axes, plan), ids_after(axes, plan)
        self.undo = undo.enlarged(axes, self.next_ids)
        self.weights, self.added = dict(self.undo.weights), [*undo.added]
        self.recalls = any(change.recalled for change in plan.changes.values())
        self.ids = {axis.key: axis.ids for axis in axes}
        self.sizes = (axes.sizes(), tensors.sizes)
        self.folds = {axes.ties.get(fold.weight, fold.weight): fold for fold in axes.folds}

    def dims(self, name: str) -> tuple[Dim, ...]:
        # A bias that compensation is about to add has its weight's output dimension.
        return self.axes.shapes.get(name) or (bias_dim(self.axes, name),)

    def entries_before(self, name: str) -> list[Tensor]:
        return locate_entries(self.dims(name), self.next_ids, self.ids)

    def entries_after(self, name: str) -> list[Tensor]:
        return locate_entries(self.dims(name), self.next_ids, self.ids_after)

    def size(self, name: str, after: bool) -> int:
        """Return the divisor that a tensor compensates for; 1 for any other tensor."""
        fold = self.folds.get(name)
        return divisor_size(fold, self.sizes[after]) if fold else 1

    def state(self, name: str) -> Tensor | None:
        tensor = select_state(self.model, [name]).get(name)
        return None if tensor is None else tensor.detach()

    def names_reached(self) -> list[str]:
        """Return the tensors to process, by first names: cut, restored, or rescaled for a divisor."""
        moves = any(change.dropped or change.restore for change in self.plan.changes.values())
        moved = {self.axes.ties.get(name, name) for name in self.axes.shapes if moves and self.lays(name)}
        return sorted(moved | {name for name in self.folds if self.size(name, False) != self.size(name, True)})

    def store(self, name: str, now: Tensor, lost: Tensor | None = None) -> RemovedWeights:
        """Store a tensor's present values and return it; stored values from which the present ones follow stay."""
        where, n, now = self.entries_before(name), self.size(name, False), now.cpu()
        stored = self.weights.get(name)
        if stored is None:
            shape = [size_of(dim, self.next_ids) for dim in self.dims(name)]
            sizes = torch.zeros(shape, dtype=torch.int32) if name in self.folds else None
            stored = RemovedWeights(now.new_zeros(shape), torch.zeros(shape, dtype=torch.bool), sizes)
        stored = replace(stored, values=stored.values.to(now.dtype))  # the network may have been cast since
        same = get(stored.held, where) & (self._written(name, stored, where, n, lost) == now)
        plain = now if lost is None else (now.double() - lost[where[0]]).to(now.dtype)
        values = put(stored.values, where, torch.where(same, get(stored.values, where), plain))
        held, sizes = put(stored.held, where, torch.ones_like(same)), stored.sizes
        if sizes is not None:
            sizes = put(sizes, where, get(sizes, where).masked_fill(~same, n))
        self.weights[name] = RemovedWeights(values, held, sizes)
        return self.weights[name]

    def _written(
        self, name: str, stored: RemovedWeights, where: list[Tensor], n: int, lost: Tensor | None = None
    ) -> Tensor:
        """Return stored values rescaled to a divisor ``n``, plus the contribution ``lost`` of dropped inputs."""
        values = get(stored.values, where)
        if stored.sizes is not None:
            values = rescale(values, get(stored.sizes, where), n, self.folds[name])
        return values if lost is None else (values.double() + lost[where[0]]).to(values.dtype)

    def rewrite(self, name: str, made: Tensor | None) -> Tensor:
        """Return a tensor after the plan: stored values in restored places, and all kept ones at the new divisor."""
        now = self.state(name)
        assert now is not None
        stored, where, n = self.store(name, now), self.entries_after(name), self.size(name, True)
        was, new = _followed(self.lays(name), now.cpu())
        made = was if made is None else made.cpu()
        held, kept = get(stored.held, where), torch.eq(was, made)
        if self.recalls:
            made = torch.where(new & ~held & self._never_met(name, held), torch.zeros_like(made), made)
        if stored.sizes is not None:
            made = rescale(made, torch.tensor(self.size(name, False)), n, self.folds[name])
        old = held & torch.where(new, torch.tensor(self.recalls), kept)
        return torch.where(old, self._written(name, stored, where, n), made).to(now.device)

    def _never_met(self, name: str, held: Tensor) -> Tensor:
        """Return the entries between units that never existed together: one was added while the other was cut."""
        reads = any(slot.name == name and slot.role is Role.CONSUMES for axis in self.axes for slot in axis.slots)
        known = torch.full_like(held, reads)
        for dim in range(held.dim()):
            rest = [other for other in range(held.dim()) if other != dim]
            known &= held.any(rest, keepdim=True) if rest else held
        return known

    def means_after(self) -> dict[str, dict[int, float]]:
        """Return the means that replace dropped inputs after the plan, by their places in the stored weight."""
        result = {weight: dict(row) for weight, row in self.undo.means.items()}
        for weight, row in self.plan.means.items():
            at = self.entries_before(weight)[_read(self.axes, weight)]
            result[weight] = result.get(weight, {}) | {int(at[position]): mean for position, mean in row.items()}
        for weight in list(result):
            back = set(self.entries_after(weight)[_read(self.axes, weight)].tolist())
            result[weight] = {at: mean for at, mean in sorted(result[weight].items()) if at not in back}
        return {weight: row for weight, row in result.items() if row}

    def compensate(
        self, bias: str, weight: str, old: Mapping[int, float], new: Mapping[int, float], made: Tensor | None
    ) -> Tensor:
        """Return a bias after the plan: its own value plus the mean contribution of the inputs that are cut."""
        now, before, after = self.state(bias), self.size(bias, False), self.size(bias, True)
        if now is None:
            value = self.state(weight)
            assert value is not None
            now = value.new_zeros(len(self.entries_before(bias)[0]))
            self.added.append(bias)
        stored = self.store(bias, now, self._contribution(weight, old, before) if old else None)
        lost = self._contribution(weight, new, after) if new else None
        written = self._written(bias, stored, self.entries_after(bias), after, lost)
        if made is None:
            return written.to(now.device)
        held = get(stored.held, self.entries_after(bias))
        return torch.where(held, written, made.cpu()).to(now.device)

    def _contribution(self, weight: str, means: Mapping[int, float], n: int) -> Tensor:
        """Return Σ W[:, i] · E[x_i] over the dropped inputs, one number per output of the weight (float64).

        Added one by one, in the order of the places: the same numbers always make the same sum.
        """
        name = self.axes.ties.get(weight, weight)
        stored, dim = self.weights[name], _read(self.axes, weight)
        values = stored.values.double() * stored.held
        if stored.sizes is not None:
            values = torch.where(stored.held, rescale(values, stored.sizes, n, self.folds[name]), values)
        columns = values.movedim(dim, 0).flatten(2) if values.dim() > 2 else values.movedim(dim, 0)[..., None]
        total = torch.zeros(columns.shape[1], dtype=torch.float64)
        for at, mean in means.items():
            for tap in columns[at].unbind(-1):
                total = total + tap * mean
        return total


def _followed(lays: Mapping[int, Layout], now: Tensor) -> tuple[Tensor, Tensor]:
    """Return the present values at their new places, and which entries are new."""
    for dim, lay in lays.items():
        now = now.index_select(dim, lay.source)
    new = torch.zeros(now.shape, dtype=torch.bool)
    for dim, lay in lays.items():
        new |= lay.is_new.view([-1 if i == dim else 1 for i in range(now.dim())])
    return now, new


def _read(axes: AxisGraph, weight: str) -> int:
    dim = read_dim(axes, weight)
    assert dim is not None  # the means were taken up
    return dim
