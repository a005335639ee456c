"""The undo store: keeps the weights that cuts remove, so that units and branches can be restored exactly."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Dim, axes_in, size_of
from regrow.core.axes.operations import Branch
from regrow.core.plan import Plan, PlanError
from regrow.surgery.compensate import PlannedTensors
from regrow.surgery.layout import Layout, ids_after, lay_out, next_ids_after
from regrow.tracing.model_state import state_of

T = TypeVar("T")


@dataclass(frozen=True)
class RemovedWeights:
    """The last values of a tensor's entries, for every unit that ever existed; ``held`` (bool): which were stored."""

    values: Tensor
    held: Tensor


@dataclass(frozen=True)
class RemovedBranch:
    """A dropped branch: the axes before, the store of cuts inside it, and path → module that a placeholder replaced."""

    branch: Branch
    axes: AxisGraph
    undo: "UndoStore"
    modules: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass
class UndoStore:
    """Weights that cuts removed, to restore them exactly; give it to every :func:`regrow.apply` from the first cut on.

    Entries are addressed by unit ids along each dimension, so the order in which units were cut does not matter. It
    needs one full-size CPU copy of each tensor that a cut reached, plus one byte per entry. Optimizer moments are not
    kept. A plan that rewrites weights that stay (compensates for dropped inputs, or changes the divisor of a norm or
    attention scale) empties it of units: those that were cut until then cannot be restored.

    Args:
        weights: Name of a tensor → its stored values; tied tensors under their first name.
        next_ids: Axis key → how many places its units have in the stored tensors.
        restorable: Axis key → the ids of the units that can be restored.
        branches: Path of a dropped module → the removed branch. Its modules live in memory only; no file keeps them.
        network: The :attr:`regrow.core.axes.AxisGraph.network` whose weights it has; empty before the first change.

    >>> from torch import nn
    >>> from regrow import apply, trace
    >>> net, undo = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), UndoStore()
    >>> axes, old = trace(net, torch.ones(1, 4)), net[0].weight
    >>> net, axes = apply(net, axes, Plan.keeping(axes, {"0.weight:0": range(3)}), undo=undo)
    >>> net, axes = apply(net, axes, Plan.restoring(axes, undo.restorable), undo=undo)
    >>> torch.equal(net[0].weight, old)
    True
    """

    weights: Mapping[str, RemovedWeights] = field(default_factory=dict)
    next_ids: Mapping[str, int] = field(default_factory=dict)
    restorable: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    branches: Mapping[str, RemovedBranch] = field(default_factory=dict)
    network: str = field(default="", compare=False)

    def replace_contents(self, other: "UndoStore") -> None:
        """Replace all contents of this store by those of another, in place, once a plan was applied."""
        vars(self).update(vars(other))

    def split_off(self, branches: Iterable[Branch], axes: AxisGraph) -> "tuple[dict[str, RemovedBranch], UndoStore]":
        """Return path → dropped branch with its part of the store, and the store without them; change nothing."""
        parts, rest = {}, self
        for branch in branches:
            inner, rest = rest._split(branch, axes)
            # Branches dropped before stay in this store; otherwise each branch would contain all earlier ones.
            parts[branch.module] = RemovedBranch(branch, axes, replace(inner, branches={}))
        return parts, rest

    def _split(self, branch: Branch, axes: AxisGraph) -> "tuple[UndoStore, UndoStore]":
        """Return the part of the store that lies in a branch, and the rest."""
        stays = axes.without([branch]).axes.keys()
        inner = self.rename(
            lambda name: name if branch.holds(name) else None, lambda key: None if key in stays else key
        )
        rest = self.rename(lambda name: None if branch.holds(name) else name, lambda key: key if key in stays else None)
        return inner, rest

    def rejoin(self, removed: RemovedBranch) -> "UndoStore":
        """Return the store once a branch is restored: with the part that the branch held, and without the branch."""
        inner = removed.undo
        return replace(
            self,
            weights={**self.weights, **inner.weights},
            next_ids={**self.next_ids, **inner.next_ids},
            restorable={**self.restorable, **inner.restorable},
            branches={path: branch for path, branch in self.branches.items() if path != removed.branch.module},
        )

    def rename(self, rename: Callable[[str], str | None], rekey: Callable[[str], str | None]) -> "UndoStore":
        """Return the store with tensors renamed by ``rename`` and axis keys by ``rekey``; ``None`` leaves one out."""

        def moved(stored: Mapping[str, T], new_name: Callable[[str], str | None]) -> dict[str, T]:
            return {new: value for name, value in stored.items() if (new := new_name(name)) is not None}

        return replace(
            self,
            weights=moved(self.weights, rename),
            next_ids=moved(self.next_ids, rekey),
            restorable=moved(self.restorable, rekey),
        )

    def contents(self) -> dict[str, Tensor]:
        """Return unique name → stored tensor, not copied; those of dropped branches are among them."""
        result = {f"shelf {name}": removed.values for name, removed in self.weights.items()}
        for path, removed in self.branches.items():
            modules = removed.modules.items()
            held = {f"{at}.{name}": t for at, module in modules for name, t in module.state_dict().items()}
            held |= removed.undo.contents()
            result |= {f"branch {path} {name}": tensor for name, tensor in held.items()}
        return result

    def check_network(self, axes: AxisGraph) -> None:
        """Raise ``PlanError`` if the store has weights of another network than the one of these axes."""
        if self.network and self.network != axes.network:
            raise PlanError(
                "the undo store holds what was cut out of another network, of this one before it was traced anew, or "
                "before a plan without the store rewrote its weights; give the axes that apply returned, or a new store"
            )

    def check(self, axes: AxisGraph, plan: Plan) -> None:
        """Raise ``PlanError`` unless the store belongs to the network and has every unit that the plan restores."""
        self.check_network(axes)
        for key, n in self.next_ids.items():
            axis = axes.axes.get(key)
            if axis is None or axis.next_id < n or set(self.restorable.get(key, ())) & set(axis.ids):
                raise PlanError(
                    f"the undo store numbers the units of axis {key!r} otherwise than these axes do; use it with the "
                    "axes that apply returned, or replay the plans from the start"
                )
        for key, change in plan.changes.items():
            if lost := sorted(set(change.restore) - set(self.restorable.get(key, ()))):
                raise PlanError(
                    f"axis {key!r}: unit {lost[0]} is not in the undo store, it was cut without it, or a later plan "
                    "rewrote weights that stayed; add a new unit: Plan.growing"
                )

    def enlarge(self, axes: AxisGraph, next_ids: Mapping[str, int]) -> "UndoStore":
        """Return the store with its tensors enlarged for units added since; ``PlanError`` if it is of another network.

        ``next_ids``: axis key → how many units the axis ever had.
        """
        before = {**next_ids, **self.next_ids}
        weights = {}
        for name, removed in self.weights.items():
            dims = axes.shapes.get(name, ())
            if tuple(removed.values.shape) != tuple(size_of(dim, before) for dim in dims):
                raise PlanError(
                    f"the undo store holds {name} in another shape than this network has it; it is of another"
                )
            shape = [size_of(dim, next_ids) for dim in dims]
            if list(removed.values.shape) != shape:
                where = _indices(dims, next_ids, {key: range(n) for key, n in before.items()})
                values, held = (_put_entries(x.new_zeros(shape), where, x) for x in (removed.values, removed.held))
                removed = RemovedWeights(values, held)
            weights[name] = removed
        return replace(self, weights=weights, next_ids=dict(next_ids))


def plan_with_undo(
    undo: UndoStore, tensors: PlannedTensors, values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], UndoStore]:
    """Return a plan's tensors, with the stored weights in restored units, and the store after it; change nothing.

    ``values``: name → tensor after the plan, as ``tensors`` computed it.
    """
    axes, plan = tensors.axes, tensors.plan
    if tensors.rewrites:
        undo.check_network(axes)
        return dict(values), UndoStore(branches=undo.branches)
    undo.check(axes, plan)
    next_ids, new_ids = next_ids_after(axes, plan), ids_after(axes, plan)
    old_ids = {axis.key: axis.ids for axis in axes}
    undo = undo.enlarge(axes, next_ids)
    result, weights, state = dict(values), dict(undo.weights), state_of(tensors.model)
    moves = any(change.dropped or change.restore for change in plan.changes.values())
    restores = any(change.restore for change in plan.changes.values())
    for name in sorted({axes.ties.get(name, name) for name in values} if moves else ()):
        dims, current = axes.shapes[name], state[name].detach()
        stored = _store(weights.get(name), current.cpu(), _indices(dims, next_ids, old_ids), dims, next_ids)
        weights[name] = stored
        if restores:
            reads = name in axes.consumed
            new = _restore(stored, values[name].cpu(), _indices(dims, next_ids, new_ids), tensors.layouts(name), reads)
            result[name] = new.to(current.device)
    restorable = {}
    for axis in axes:
        change = plan.changes.get(axis.key)
        dropped = {axis.ids[unit] for unit in change.dropped} if change else set()
        if ids := ({*undo.restorable.get(axis.key, ())} | dropped) - {*new_ids[axis.key]}:
            restorable[axis.key] = tuple(sorted(ids))
    return result, replace(undo, weights=weights, restorable=restorable)


def _store(
    stored: RemovedWeights | None, now: Tensor, where: list[Tensor], dims: tuple[Dim, ...], next_ids: Mapping[str, int]
) -> RemovedWeights:
    """Return a tensor's stored values (``None``: none yet) with those of ``now`` at ``where``: indices by dimension."""
    if stored is None:
        shape = [size_of(dim, next_ids) for dim in dims]
        stored = RemovedWeights(now.new_zeros(shape), torch.zeros(shape, dtype=torch.bool))
    values = stored.values.to(now.dtype)  # the network may have been cast since
    held = _put_entries(stored.held, where, torch.ones_like(now, dtype=torch.bool))
    return RemovedWeights(_put_entries(values, where, now.clone()), held)


def _restore(
    stored: RemovedWeights, planned: Tensor, where: list[Tensor], layouts: Mapping[int, Layout], reads: bool
) -> Tensor:
    """Return ``planned``, a tensor after a plan, with the stored values in restored units.

    ``where``: its indices in the stored tensor, per dimension; ``layouts``: the layouts of its dimensions. Where it
    consumes units (``reads``), an entry of two that never existed together is 0: one was added while the other was cut.
    """
    held, new = _take_entries(stored.held, where), torch.zeros(planned.shape, dtype=torch.bool)
    for dim, layout in layouts.items():
        new |= layout.is_new.view([-1 if i == dim else 1 for i in range(planned.dim())])
    known = torch.full_like(held, reads)
    for dim in range(held.dim()):
        rest = [other for other in range(held.dim()) if other != dim]
        known &= held.any(rest, keepdim=True) if rest else held
    planned = torch.where(new & ~held & known, torch.zeros_like(planned), planned)
    return torch.where(new & held, _take_entries(stored.values, where), planned)


def _indices(dims: tuple[Dim, ...], next_ids: Mapping[str, int], ids: Mapping[str, Iterable[int]]) -> list[Tensor]:
    """Return per dimension the indices of the entries of units in a tensor as it is stored, for all ids ever given.

    ``next_ids``: axis key → number of these; ``ids``: axis key → the ids of the units.
    """
    keys = {key for dim in dims for key in axes_in(dim)} & ids.keys()
    units = {key: Layout.of(torch.tensor(list(ids[key]), dtype=torch.long)) for key in keys}
    return [lay_out(dim, next_ids, units).source for dim in dims]


def _take_entries(full: Tensor, where: list[Tensor]) -> Tensor:
    """Return the entries of a stored tensor at the given indices of each dimension (ascending)."""
    for dim, at in enumerate(where):
        full = full if len(at) == full.shape[dim] else full.index_select(dim, at)
    return full


def _put_entries(full: Tensor, where: list[Tensor], part: Tensor, dim: int = 0) -> Tensor:
    """Return a stored tensor with the entries at indices ``where``, from dimension ``dim`` on, replaced by ``part``."""
    if dim == len(where):
        return part
    if len(where[dim]) == full.shape[dim]:
        return _put_entries(full, where, part, dim + 1)
    return full.index_copy(dim, where[dim], _put_entries(full.index_select(dim, where[dim]), where, part, dim + 1))
