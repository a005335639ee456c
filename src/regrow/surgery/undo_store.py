"""The undo store: keeps the weights that cuts remove, so that units and branches can be restored exactly."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Dim, axes_in, size_of
from regrow.core.axes.operations import Branch
from regrow.core.plan import Plan, PlanError
from regrow.surgery.layout import Layout, lay_out

FORMAT = "regrow-undo-store/1"
T = TypeVar("T")


@dataclass(frozen=True)
class RemovedWeights:
    """All values that one tensor has had, with a place for every unit that ever existed.

    ``held`` says which entries have a value; ``sizes`` (int32) at which divisor each holds, if it compensates for one.
    """

    values: Tensor
    held: Tensor
    sizes: Tensor | None = None

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors by field name, without those that are ``None``."""
        return {name: part for name, part in vars(self).items() if part is not None}


@dataclass(frozen=True)
class Constant:
    """The constant under a norm's root before a cut, at a divisor; ``own`` is the module's attribute."""

    own: float | None
    value: float
    size: int

    def at(self, size: int) -> float:
        """Return the constant that has the same effect at another divisor."""
        return self.value if self.size == size else self.value * (self.size / size)


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
    needs one full-size CPU copy of each tensor that a cut reached, plus one byte per entry, and four more in tensors
    that compensate for a divisor. Optimiser moments are not kept.

    Args:
        weights: Name of a tensor → its stored values; tied tensors under their first name.
        next_ids: Axis key → how many places its units have in the stored tensors.
        restorable: Axis key → the ids of the units that can be restored.
        means: Weight → place of a dropped input → the mean that replaces it in the bias.
        constants: ``module:attribute`` → the constant before any cut.
        added: Names of biases that only compensation has added.
        branches: Path of a dropped module → the removed branch. Its modules live in memory only; no file keeps them.
        network: The :attr:`regrow.core.axes.AxisGraph.network` whose weights it has; empty before the first change, and
            after reading from a file, since a replay traces the network anew.

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
    means: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    branches: Mapping[str, RemovedBranch] = field(default_factory=dict)
    network: str = field(default="", compare=False)

    def parted(self, branches: Iterable[Branch], axes: AxisGraph) -> "tuple[dict[str, RemovedBranch], UndoStore]":
        """Split the store for branches that are dropped: each branch with its own part, and the rest."""
        parts, rest = {}, self
        for branch in branches:
            removed, rest = rest._without(branch, axes)
            parts[branch.module] = removed
        return parts, rest

    def _without(self, branch: Branch, axes: AxisGraph) -> "tuple[RemovedBranch, UndoStore]":
        stays = axes.without([branch]).axes.keys()
        inner = self.renamed(
            lambda name: name if branch.holds(name) else None, lambda key: None if key in stays else key
        )
        rest = self.renamed(
            lambda name: None if branch.holds(name) else name, lambda key: key if key in stays else None
        )
        # Branches dropped before stay in this store; otherwise each branch would contain all earlier ones.
        return RemovedBranch(branch, axes, replace(inner, branches={})), rest

    def rejoined(self, removed: RemovedBranch) -> "UndoStore":
        """Return the store after a branch is restored, with the cuts inside it restorable again."""
        inner = removed.undo
        return replace(
            self,
            weights={**self.weights, **inner.weights},
            next_ids={**self.next_ids, **inner.next_ids},
            restorable={**self.restorable, **inner.restorable},
            means={**self.means, **inner.means},
            constants={**self.constants, **inner.constants},
            added=(*self.added, *inner.added),
            branches={path: branch for path, branch in self.branches.items() if path != removed.branch.module},
        )

    def renamed(self, rename: Callable[[str], str | None], rekey: Callable[[str], str | None]) -> "UndoStore":
        """Return the store with other names of tensors and keys of axes, without those that have no new name."""

        def named(stored: Mapping[str, T]) -> dict[str, T]:
            split = ((*name.partition(":"), value) for name, value in stored.items())
            return {
                new + colon + rest: value for name, colon, rest, value in split if (new := rename(name)) is not None
            }

        def keyed(stored: Mapping[str, T]) -> dict[str, T]:
            return {new: value for key, value in stored.items() if (new := rekey(key)) is not None}

        return replace(
            self,
            weights=named(self.weights),
            means=named(self.means),
            constants=named(self.constants),
            next_ids=keyed(self.next_ids),
            restorable=keyed(self.restorable),
            added=tuple(name for name in map(rename, self.added) if name is not None),
        )

    def contents(self) -> dict[str, Tensor]:
        """Return every stored tensor under a unique name, those of dropped branches too; not copied."""
        result = {f"shelf {name}": removed.values for name, removed in self.weights.items()}
        for path, removed in self.branches.items():
            held = {f"{at}.{name}": t for at, one in removed.modules.items() for name, t in one.state_dict().items()}
            held |= removed.undo.contents()
            result |= {f"branch {path} {name}": tensor for name, tensor in held.items()}
        return result

    def tensors(self) -> dict[str, Tensor]:
        """Return the stored tensors by name; :meth:`read` takes them with :meth:`record`."""
        return {f"{part}:{name}": t for name, removed in self.weights.items() for part, t in removed.parts().items()}

    def record(self) -> dict[str, object]:
        """Return everything but the tensors, as JSON data."""
        if self.branches:
            raise PlanError(
                f"{next(iter(self.branches))} is in the undo store as a module, which no file keeps; bring it back"
            )
        return {
            "format": FORMAT,
            "shelves": list(self.weights),
            "born": dict(self.next_ids),
            "gone": {key: list(ids) for key, ids in self.restorable.items()},
            "means": {name: {str(at): mean for at, mean in row.items()} for name, row in self.means.items()},
            "constants": {name: asdict(constant) for name, constant in self.constants.items()},
            "added": list(self.added),
        }

    @classmethod
    def read(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "UndoStore":
        """Rebuild an undo store from its tensors and its record, which :mod:`regrow.store.schemas` has checked."""
        weights = {}
        for name in record["shelves"]:
            removed = RemovedWeights(tensors[f"values:{name}"], tensors[f"held:{name}"], tensors.get(f"sizes:{name}"))
            if len({part.shape for part in removed.parts().values()}) > 1:
                raise ValueError(f"the numbers of {name} have several shapes")
            weights[name] = removed
        return cls(
            weights,
            dict(record["born"]),
            {key: tuple(ids) for key, ids in record["gone"].items()},
            {name: {int(position): mean for position, mean in row.items()} for name, row in record["means"].items()},
            {name: Constant(row["own"], row["value"], row["size"]) for name, row in record["constants"].items()},
            tuple(record["added"]),
        )

    def check_network(self, axes: AxisGraph) -> None:
        """Raise ``PlanError`` if the store has weights of another network than the one of these axes."""
        if self.network and self.network != axes.network:
            raise PlanError(
                "the undo store holds what was cut out of another network, or of this one before it was traced anew; "
                "use it with the axes that apply returned, or replay the plans from the start"
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
            if lost := sorted(set(change.recalled) - set(self.restorable.get(key, ()))):
                raise PlanError(
                    f"axis {key!r}: unit {lost[0]} is not in the undo store, it was cut without it; "
                    "restore it with fresh numbers: Plan.restoring(axes, units, Fill())"
                )

    def enlarged(self, axes: AxisGraph, next_ids: Mapping[str, int]) -> "UndoStore":
        """Return the store with places for the units that were added since."""
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
                where = locate_entries(dims, next_ids, {key: range(n) for key, n in before.items()})
                values, held = (put(x.new_zeros(shape), where, x) for x in (removed.values, removed.held))
                sizes = None if removed.sizes is None else put(removed.sizes.new_zeros(shape), where, removed.sizes)
                removed = RemovedWeights(values, held, sizes)
            weights[name] = removed
        return replace(self, weights=weights, next_ids=dict(next_ids))


def locate_entries(
    dims: tuple[Dim, ...], next_ids: Mapping[str, int], ids: Mapping[str, Iterable[int]]
) -> list[Tensor]:
    """Return the indices of a tensor's entries in its stored tensor, one index tensor per dimension."""
    own = {key for dim in dims for key in axes_in(dim)} & ids.keys()
    units = {key: Layout.of(torch.tensor(list(ids[key]), dtype=torch.long)) for key in own}
    return [lay_out(dim, next_ids, units).source for dim in dims]


def get(full: Tensor, where: list[Tensor]) -> Tensor:
    """Return the entries of a stored tensor at the given indices of each dimension (ascending)."""
    for dim, at in enumerate(where):
        full = full if len(at) == full.shape[dim] else full.index_select(dim, at)
    return full


def put(full: Tensor, where: list[Tensor], part: Tensor, dim: int = 0) -> Tensor:
    """Return a stored tensor with the entries at the given indices of each dimension replaced by ``part``."""
    if dim == len(where):
        return part
    if len(where[dim]) == full.shape[dim]:
        return put(full, where, part, dim + 1)
    return full.index_copy(dim, where[dim], put(full.index_select(dim, where[dim]), where, part, dim + 1))
