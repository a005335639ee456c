"""Plans: every change that is to be made to a network, as plain data that can be checked, stored and applied."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import msgspec

from regrow.core.axes import Axis, AxisGraph
from regrow.core.axes.operations import Branch, lies_in
from regrow.core.change import MOST_NEW_UNITS, Change, Fill, Insertion, PlanError, find_growth_problem, sort_units
from regrow.core.tables import Table, format_html, format_text

__all__ = ["MOST_NEW_UNITS", "Change", "Fill", "Plan", "PlanError"]

FORMAT = "regrow-plan/1"
# Name of a weight → position in its contracted dimension → the constant that replaces that dropped input
Means = Mapping[str, Mapping[int, float]]
Origin = Mapping[str, object]
NONE: Mapping[str, Any] = {}


@dataclass(frozen=True, repr=False)
class Plan:
    """A set of changes to a network: units cut, added or restored per axis, and whole modules dropped or restored.

    Args:
        changes: Axis key → its change. Axes not named are unchanged.
        means: Name of a consuming weight → position in its contracted dimension → the constant that replaces that
            dropped input (bias compensation). Without it a dropped input counts as the axis's neutral element (0 or
            −∞).
        origin: What made the plan (method, settings, budget, seed); informative.
        drop: Path of a module that is dropped → its branch.
        back: Paths of modules dropped earlier that are restored, with the weights they had.
        insert: Path of a stack of blocks → the copies inserted into it. Other changes of the plan only add units; a
            copy gets those of the block that it copies.

    Raises:
        PlanError: If a change keeps no unit, a unit twice, or one that does not exist, or a branch lies in another.
    """

    changes: Mapping[str, Change] = field(default_factory=dict)
    means: Means = field(default_factory=dict)
    origin: Origin = field(default_factory=dict)
    drop: Mapping[str, Branch] = field(default_factory=dict)
    back: tuple[str, ...] = ()
    insert: Mapping[str, Insertion] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, change in self.changes.items():
            change.check(key)
        for path, insertion in self.insert.items():
            insertion.check(path)
            if outer := next((other for other in self.insert if other != path and lies_in(path, other)), ""):
                raise PlanError(f"stack {path!r} lies in stack {outer!r}, which the plan changes too; make two plans")
        for path, branch in self.drop.items():
            if branch.module != path or path not in branch.placeholders:
                raise PlanError(f"the plan drops {path} without a placeholder for it")
            outers = (name for name, b in self.drop.items() if name != path and any(map(b.holds, branch.placeholders)))
            if outer := next(outers, ""):
                raise PlanError(f"{path} goes with {outer}, which the plan drops too; leave it out")
        if len(set(self.back)) != len(self.back):
            raise PlanError("the plan brings a module back twice")
        _check_exclusive({"drops branches": self.drop, "brings them back": self.back})
        if self.insert:
            changes = self.changes.values()
            _check_exclusive(
                {
                    "inserts blocks": self.insert,
                    "cuts or restores units": any(change.dropped or change.restore for change in changes),
                    "drops branches or restores them": self.drop or self.back,
                    "compensates for what is dropped": self.means,
                }
            )

    def _tables(self) -> list[Table]:
        """Return the changes as tables: of axes, and of whole modules."""
        rows = [(key, c.size, c.after, len(c.dropped), c.after - len(c.keep)) for key, c in self.changes.items()]
        modules = [*((path, "dropped") for path in self.drop), *((path, "restored") for path in self.back)]
        modules += [(path, f"{len(insertion.copies)} blocks added") for path, insertion in self.insert.items()]
        axes = Table("", ("axis", "units", "after", "removed", "added"), rows, (1, 2, 3, 4))
        return [axes, Table("", ("module", "change"), modules)]

    @property
    def _note(self) -> str:
        """The sum of the changes, in a line."""
        changes = self.changes.values()
        before, after = sum(change.size for change in changes), sum(change.after for change in changes)
        made_by = f", by {self.origin['method']}" if "method" in self.origin else ""
        chosen = f"; {self.origin['chosen']}" if "chosen" in self.origin else ""
        return f"{len(self.changes)} axes: {before:,} units become {after:,}{made_by}{chosen}"

    def __str__(self) -> str:
        """Return the changes as a table, of at most 30 lines; :meth:`to_json` has every unit."""
        return format_text(self._tables(), self._note)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the changes as an HTML table, for notebooks."""
        return format_html(self._tables(), self._note)

    @classmethod
    def keeping(
        cls, axes: AxisGraph, keep: Mapping[str, Iterable[int]], *, means: Means = NONE, origin: Origin = NONE
    ) -> "Plan":
        """Return a plan that cuts the named axes to the given units and leaves all other axes unchanged.

        Args:
            axes: The network's axes.
            keep: Axis key → the positions of the units to keep, in any order.
            means: As in :class:`Plan`.
            origin: As in :class:`Plan`.

        Raises:
            PlanError: If an axis does not exist, is frozen (with its reason), or the units are no positions in it.
        """
        return cls.dropping(axes, (), keep, means=means, origin=origin)

    @classmethod
    def growing(
        cls, axes: AxisGraph, grow: Mapping[str, int], fill: Fill | None = None, *, origin: Origin = NONE
    ) -> "Plan":
        """Return a plan that adds units to the named axes.

        Args:
            axes: The network's axes.
            grow: Axis key → how many units are added.
            fill: How the new units are initialised; ``zero_out`` unless given.
            origin: As in :class:`Plan`.

        Raises:
            PlanError: If an axis does not exist or cannot be widened (with the reason).
        """
        fill = fill or Fill()
        changes = {key: replace(_keep_all(axes, key), grow=units, fill=fill) for key, units in grow.items()}
        return cls(changes, origin=origin)._checked(axes)

    @classmethod
    def restoring(cls, axes: AxisGraph, restore: Mapping[str, Iterable[int]], *, origin: Origin = NONE) -> "Plan":
        """Return a plan that restores units with the weights they had when cut (whole modules: ``Plan(back=[path])``).

        Args:
            axes: The network's current axes.
            restore: Axis key → the ids of the units to restore (``Axis.ids`` has those that were not cut).
            origin: As in :class:`Plan`.

        Raises:
            PlanError: If an axis does not exist or is frozen, or a unit is alive or never existed.
        """
        changes = {key: replace(_keep_all(axes, key), restore=sort_units(key, ids)) for key, ids in restore.items()}
        return cls(changes, origin=origin)._checked(axes)

    @classmethod
    def dropping(
        cls,
        axes: AxisGraph,
        modules: Iterable[str],
        keep: Mapping[str, Iterable[int]] = NONE,
        *,
        means: Means = NONE,
        origin: Origin = NONE,
    ) -> "Plan":
        """Return a plan that drops whole modules, and optionally cuts units elsewhere.

        Args:
            axes: The network's axes.
            modules: Their paths; ``axes.branches`` says of each whether it can be dropped, and what is removed with it.
            keep: Axis key → the units to keep, as in :meth:`keeping`.
            means: As in :class:`Plan`.
            origin: As in :class:`Plan`.

        Raises:
            PlanError: If there is no such module or it cannot be dropped (with the reason), or as :meth:`keeping`.
        """
        drop = {path: _find_branch(axes, path) for path in modules}
        changes = {key: replace(_keep_all(axes, key), keep=sort_units(key, units)) for key, units in keep.items()}
        return cls(changes, means, origin, drop)._checked(axes)

    def _checked(self, axes: AxisGraph) -> "Plan":
        """Return the plan unchanged; raise ``PlanError`` unless it fits the axes."""
        self.check(axes)
        return self

    @property
    def changes_modules(self) -> bool:
        """Whether modules are dropped, restored or inserted."""
        return bool(self.drop or self.back or self.insert)

    def check(self, axes: AxisGraph) -> None:
        """Raise ``PlanError`` unless the plan fits the network: its axes, their sizes and groups, its branches."""
        _check_exclusive(
            {
                "compensates for what it drops": self.means,
                "restores units": any(change.restore for change in self.changes.values()),
                "adds units": any(change.grow for change in self.changes.values()),
            }
        )
        if self.drop:
            for path, branch in self.drop.items():
                if _find_branch(axes, path) != branch:
                    raise PlanError(f"what goes with {path} here is not what the plan says; make it for these axes")
            rest = axes.without(self.drop.values())
            changed = (key for key, change in self.changes.items() if not change.idle and key not in rest.axes)
            if lost := next(changed, ""):
                raise PlanError(
                    f"axis {lost!r} goes with a branch that the plan drops, and it changes it; leave one out"
                )
            if lost := next((weight for weight in self.means if weight not in rest.shapes), ""):
                raise PlanError(
                    f"{lost} goes with a branch that the plan drops, and it compensates for it; leave one out"
                )
        for key, change in self.changes.items():
            if key not in axes.axes:
                raise PlanError(f"the plan changes axis {key!r}, which this network does not have")
            if not change.idle and (problem := _find_misfit(axes[key], change, axes.parameters)):
                raise PlanError(f"axis {key!r} {problem}")
        counts: dict[str, tuple[str, int]] = {}
        for axis in axes:
            if axis.count and axis.free:
                size = axis.times * (self.changes[axis.key].after if axis.key in self.changes else axis.size)
                other, expected = counts.setdefault(axis.count, (axis.key, size))
                if size != expected:
                    raise PlanError(
                        f"axes {other!r} and {axis.key!r} must keep equal sizes; the plan leaves {expected} and {size}"
                    )

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes in ``origin``: what a user should know about how the plan was made."""
        notes = self.origin.get("notes", ())
        return tuple(map(str, notes)) if isinstance(notes, list | tuple) else ()

    def sizes(self, axes: AxisGraph) -> dict[str, int]:
        """Return axis key → its number of units after the plan, for every axis of ``axes``, those before the plan."""
        return axes.sizes() | {key: change.after for key, change in self.changes.items()}

    def to_json(self) -> str:
        """Return the plan as JSON text, which :func:`regrow.store.ledger.read_plan` reads once it is parsed."""
        # Of an object that was read, msgspec writes no field that was missing there, so each is named.
        names = [part.name for part in fields(Change)]
        parts = {
            "changes": {key: {name: getattr(change, name) for name in names} for key, change in self.changes.items()},
            "means": self.means,
            "drop": {path: branch.placeholders for path, branch in self.drop.items()},
            "back": self.back,
            **({"insert": self.insert} if self.insert else {}),
        }
        return json.dumps({"format": FORMAT, "origin": self.origin, **msgspec.to_builtins(parts, str_keys=True)})


def _keep_all(axes: AxisGraph, key: str) -> Change:
    """Return the change that leaves an axis as it is; raise ``PlanError`` if the network has no such axis."""
    if key not in axes.axes:
        raise PlanError(f"the network has no axis {key!r}; `regrow show` lists the axes")
    axis = axes[key]
    return Change(axis.size, tuple(range(axis.size)), axis.slots, axis.ids)


def _check_exclusive(parts: Mapping[str, object]) -> None:
    """Raise ``PlanError`` if a plan does more than one of ``parts`` (what, in words → whether): each needs its own."""
    actions = [what for what, does in parts.items() if does]
    if len(actions) > 1:
        raise PlanError(f"one plan {actions[0]}, or {actions[1]}; make two")


def _find_branch(axes: AxisGraph, path: str) -> Branch:
    """Return the branch that dropping a module removes; raise ``PlanError`` with the reason if it cannot be dropped."""
    branch = axes.branches.get(path)
    inner = [name for name, other in axes.branches.items() if other.free and lies_in(name, path)]
    remedy = f"; in it, {inner[0]} can" if inner else ""
    if axes.decisions is not None:
        raise PlanError(f"{path} cannot be dropped: data decide what this network does, and only one way was seen")
    if branch is None and all(other.gives == "nothing" for other in axes.branches.values()):
        raise PlanError(f"whether {path} can be dropped was not looked for: axes = regrow.with_branches(model, axes)")
    if branch is None:
        raise PlanError(f"no module {path!r} runs in this network{remedy}; `regrow.with_branches` lists them")
    if not branch.free:
        raise PlanError(f"{path} cannot be dropped: {branch.reason}{remedy}")
    return branch


def _find_misfit(axis: Axis, change: Change, parameter_names: frozenset[str]) -> str:
    """Return why a change does not fit an axis, as a predicate for its name (``is frozen: …``); empty if it does."""
    remaining = len(change.keep) + len(change.restore)
    if remaining < min(axis.least, axis.size):
        return f"must keep at least {axis.least} units; the plan keeps {remaining}"
    if not axis.free:
        return f"is frozen: {axis.reason}"
    if change.after % axis.multiple:
        return f"must keep a multiple of {axis.multiple} units; the plan leaves {change.after}"
    if change.grow and (problem := find_growth_problem(axis, change, parameter_names)):
        return f"cannot be widened: {problem}"
    if axis.size != change.size:
        return f"has {axis.size} units here, the plan was made for {change.size}"
    # Sets: a bias that a cut adds comes last in the axes after it, and beside its weight when traced anew.
    if {*axis.slots} != {*change.slots}:
        return "has units that lie elsewhere in this network than in the plan"
    if change.restore and change.alive != axis.ids:
        return "has other units alive here than those among which the plan restores; make it for these axes"
    if change.restore and (last := change.restore[-1]) >= axis.next_id:
        return f"is another: no unit {last} ever existed; its units are numbered from 0 to {axis.next_id - 1}"
    return ""
