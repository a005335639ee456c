"""Plans: what will change in a network, as plain data."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from regrow.axes import Axis, AxisGraph, Mark, Role, Slot

FORMAT = "regrow-plan/1"
FILLS = ("zero_out", "split", "pair")
MOST = 2**24
"""No axis grows by more units at once."""


class PlanError(ValueError):
    """A plan that cannot be read, or does not fit the network it is meant for."""


@dataclass(frozen=True)
class Fill:
    """What newborn units hold, such that the network computes what it did.

    What is drawn can be fitted to data afterwards, with the function kept: :func:`regrow.fitted` and
    :func:`regrow.aligned` take a network that grew by ``zero_out``.

    Args:
        rule: ``zero_out``: drawn numbers, and nothing reads the units yet (on the stream that root-mean-square norms
            run over: nothing writes them yet). ``split``: copies of kept units, which share what reads them (Net2Wider,
            Chen et al., 2016). ``pair``: two and two drawn alike, and read with opposite signs.
        seed: Of what is drawn, and of who is copied.
    """

    rule: str = "zero_out"
    seed: int = 0


@dataclass(frozen=True)
class Change:
    """What happens to one axis.

    Args:
        size: How many units the axis has before.
        keep: Which of them stay, ascending.
        slots: Where its units lie, so that the plan stands alone.
        ids: The birth numbers of the units before the change.
        grow: How many units are born; they lie behind all others.
        fill: What they hold.
        restore: The birth numbers of units cut earlier that come back, ascending. Each goes to its old place: units
            lie in the order of their birth numbers.
        fresh: Whether they hold what newborn units would (``fill``), and not what they held when they were cut.
    """

    size: int
    keep: tuple[int, ...]
    slots: tuple[Slot, ...]
    ids: tuple[int, ...] = ()
    grow: int = 0
    fill: Fill = Fill()
    restore: tuple[int, ...] = ()
    fresh: bool = False

    @property
    def after(self) -> int:
        """How many units there are after it."""
        return len(self.keep) + len(self.restore) + self.grow

    @property
    def alive(self) -> tuple[int, ...]:
        """The birth numbers of the units before it."""
        return self.ids or tuple(range(self.size))

    @property
    def births(self) -> int:
        """How many units come without numbers of their own: newborn ones, and those restored afresh."""
        return self.grow + (len(self.restore) if self.fresh else 0)

    @property
    def recalled(self) -> tuple[int, ...]:
        """The birth numbers of the units that come back with what they held."""
        return () if self.fresh else self.restore

    @property
    def idle(self) -> bool:
        """Whether nothing happens."""
        return len(self.keep) == self.size == self.after

    @property
    def dropped(self) -> tuple[int, ...]:
        """The units that go."""
        kept = set(self.keep)
        return tuple(unit for unit in range(self.size) if unit not in kept)


@dataclass(frozen=True)
class Plan:
    """What will change: which units of which axes stay, and what stands in for those that go.

    Args:
        changes: Axis key → its change. Axes not named stay as they are.
        means: Name of a consuming weight → position of its contracted dimension → the constant that stands in for
            that dropped input (bias compensation). Without it a dropped input counts as the axis's neutral element.
        origin: What made the plan (method, settings, budget, seed); informative.

    Raises:
        PlanError: If a change keeps no unit, a unit twice, or one that does not exist.
    """

    changes: Mapping[str, Change] = field(default_factory=dict)
    means: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, change in self.changes.items():
            _check_change(key, change)

    @classmethod
    def keeping(cls, axes: AxisGraph, keep: Mapping[str, Iterable[int]], **more: Any) -> "Plan":
        """A plan for ``axes`` that keeps the given units of the named axes.

        Raises:
            PlanError: If an axis does not exist, is frozen (with its reason), or the units are not legal.
        """
        kept = {key: {"keep": tuple(sorted(int(unit) for unit in units))} for key, units in keep.items()}
        return cls._made(axes, kept, more)

    @classmethod
    def growing(cls, axes: AxisGraph, grow: Mapping[str, int], fill: Fill | None = None, **more: Any) -> "Plan":
        """A plan for ``axes`` that gives the named axes so many units more.

        Args:
            axes: The network's axes.
            grow: Axis key → how many units are born.
            fill: What they hold; ``zero_out`` unless given.
            **more: As for :class:`Plan`.

        Raises:
            PlanError: If an axis does not exist or cannot be widened (with the reason).
        """
        fill = fill or Fill()
        return cls._made(axes, {key: {"grow": _whole(n, "grow"), "fill": fill} for key, n in grow.items()}, more)

    @classmethod
    def restoring(
        cls, axes: AxisGraph, restore: Mapping[str, Iterable[int]], fill: Fill | None = None, **more: Any
    ) -> "Plan":
        """A plan for ``axes`` that brings back units that were cut.

        Args:
            axes: The network's axes as they are now.
            restore: Axis key → the birth numbers of the units (``Axis.ids`` names those alive).
            fill: Given, they come back with what newborn units hold; else with what they held, out of the attic.
            **more: As for :class:`Plan`.

        Raises:
            PlanError: If an axis does not exist or is frozen, or a unit is alive or was never born.
        """
        back = {key: tuple(sorted(int(one) for one in ids)) for key, ids in restore.items()}
        fresh = {"fresh": fill is not None, "fill": fill or Fill()}
        return cls._made(axes, {key: {"restore": ids, **fresh} for key, ids in back.items()}, more)

    @classmethod
    def _made(cls, axes: AxisGraph, changes: Mapping[str, Mapping[str, Any]], more: Mapping[str, Any]) -> "Plan":
        made = {}
        for key, change in changes.items():
            if key not in axes.axes:
                raise PlanError(f"the network has no axis {key!r}; `regrow show` lists the axes")
            axis = axes[key]
            whole = {"keep": tuple(range(axis.size)), "slots": axis.slots, "ids": axis.ids}
            made[key] = Change(axis.size, **{**whole, **change})
        plan = cls(made, **more)
        plan.check(axes)
        return plan

    def check(self, axes: AxisGraph) -> None:
        """Assert that the plan fits the network.

        Raises:
            PlanError: If an axis is missing, frozen, of another size or lies elsewhere, or if axes that must keep
                equally many units would not.
        """
        grows = any(change.births for change in self.changes.values())
        recalls = any(change.recalled for change in self.changes.values())
        if self.means and (grows or recalls):
            raise PlanError("one plan compensates for what it drops, or brings units; make two")
        if grows and recalls:
            raise PlanError("one plan brings units back with what they held, or gives birth to units; make two")
        for key, change in self.changes.items():
            axis = axes.axes.get(key)
            if axis is None:
                raise PlanError(f"the plan changes axis {key!r}, which this network does not have")
            if change.idle:
                continue
            staying = len(change.keep) + len(change.recalled)
            if staying < min(axis.least, axis.size):
                raise PlanError(f"axis {key!r} must keep at least {axis.least} units; the plan keeps {staying}")
            if change.after % axis.multiple and axis.free:
                raise PlanError(
                    f"axis {key!r} must keep a multiple of {axis.multiple} units; the plan leaves {change.after}"
                )
            if change.births and axis.free and (problem := _cannot_grow(axis, change, axes.parameters)):
                raise PlanError(f"axis {key!r} cannot be widened: {problem}")
            if not axis.free:
                raise PlanError(f"axis {key!r} is frozen: {axis.reason}")
            if axis.size != change.size or _places(axis.slots) != _places(change.slots):
                raise PlanError(
                    f"axis {key!r} has {axis.size} units here, the plan was made for {change.size}"
                    if axis.size != change.size
                    else f"the units of axis {key!r} lie elsewhere in this network than in the plan"
                )
            if change.restore:
                _check_restore(axis, change)
        counts: dict[str, tuple[str, int]] = {}
        for axis in axes:
            if axis.count and axis.free:
                left = axis.times * (self.changes[axis.key].after if axis.key in self.changes else axis.size)
                other, expected = counts.setdefault(axis.count, (axis.key, left))
                if left != expected:
                    raise PlanError(
                        f"axes {other!r} and {axis.key!r} must keep equal sizes; the plan leaves {expected} and {left}"
                    )

    def sizes(self, axes: AxisGraph) -> dict[str, int]:
        """The size of every axis after the plan."""
        return axes.sizes() | {key: change.after for key, change in self.changes.items()}

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(
            {
                "format": FORMAT,
                "origin": dict(self.origin),
                "changes": {key: asdict(change) for key, change in self.changes.items()},
                "means": {name: {str(i): v for i, v in means.items()} for name, means in self.means.items()},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan back; everything is checked before it is used.

        Raises:
            PlanError: If the text is not a plan, names the value that is wrong.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"not a plan: expected the format {FORMAT!r}")
        try:
            changes = {str(key): _change(value) for key, value in data["changes"].items()}
            means = {
                str(name): {int(i): float(v) for i, v in row.items()} for name, row in data.get("means", {}).items()
            }
            return cls(changes, means, dict(data.get("origin", {})))
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"a damaged plan: {error!r}") from None


def _change(value: Any) -> Change:
    slots = tuple(
        Slot(
            name=str(slot["name"]),
            role=Role(slot["role"]),
            **{part: _whole(slot[part], part) for part in ("dim", "outer", "stride", "inner", "offset")},
        )
        for slot in value["slots"]
    )
    fill = value.get("fill", {})
    return Change(
        size=_whole(value["size"], "size"),
        keep=tuple(_whole(unit, "keep") for unit in value["keep"]),
        slots=slots,
        ids=tuple(_whole(one, "ids") for one in value.get("ids", ())),
        grow=_whole(value.get("grow", 0), "grow"),
        fill=Fill(str(fill.get("rule", "zero_out")), _whole(fill.get("seed", 0), "seed")),
        restore=tuple(_whole(one, "restore") for one in value.get("restore", ())),
        fresh=_flag(value.get("fresh", False), "fresh"),
    )


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise PlanError(f"{what} is a whole number; the plan says {str(value)[:40]!r}")
    return value


def _flag(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise PlanError(f"{what} is true or false; the plan says {str(value)[:40]!r}")
    return value


def _places(slots: Iterable[Slot]) -> list[Slot]:
    """Where units lie and what is done there; plans from before shifting was told from scaling still fit."""
    told = (replace(slot, role=Role.SCALES) if slot.role is Role.SHIFTS else slot for slot in slots)
    return list(dict.fromkeys(told))


def _cannot_grow(axis: Axis, change: Change, parameters: frozenset[str]) -> str:
    """Why an axis cannot get the units it is to get; empty if it can."""
    if axis.narrow:
        return axis.narrow
    zero_out, folded = change.fill.rule == "zero_out", axis.mark is Mark.FOLDED
    if folded and not zero_out:
        return f"{axis.reason}, which only newborn units of value 0 leave as it was; take the fill 'zero_out'"
    made, read = ({(s.name, s.dim) for s in axis.slots if s.role is role} for role in (Role.PRODUCES, Role.CONSUMES))
    others = {(s.name, s.dim) for s in axis.slots if s.role is not Role.CONSUMES}
    both = ", ".join(sorted(name for name, _ in others & read))
    if both and not zero_out:
        return f"{both} reads its units and does something else with them, too; take the fill 'zero_out'"
    if both and (read <= made if folded else made <= read):
        return f"{both} both makes and reads its units: 0 on both sides, newborn ones could never learn"
    if zero_out and not {name for name, _ in (made if folded else read)} & parameters:
        return "no parameter is there that could learn to use newborn units"
    return ""


def _check_restore(axis: Axis, change: Change) -> None:
    if change.alive != axis.ids:
        raise PlanError(
            f"axis {axis.key!r}: the plan restores units among others than those alive here; make it for these axes"
        )
    if change.restore[-1] >= axis.born:
        raise PlanError(
            f"axis {axis.key!r}: no unit {change.restore[-1]} was ever born; its units are numbered from 0 to "
            f"{axis.born - 1}"
        )


def _check_change(key: str, change: Change) -> None:
    if not change.keep:
        raise PlanError(f"axis {key!r}: a plan must keep at least one unit")
    if list(change.keep) != sorted(set(change.keep)) or change.keep[0] < 0 or change.keep[-1] >= change.size:
        raise PlanError(f"axis {key!r}: kept units must be ascending, each once, within 0..{change.size - 1}")
    if not 0 <= change.grow <= MOST:
        raise PlanError(f"axis {key!r}: it can grow by 0 to {MOST} units, not by {change.grow}")
    if not 0 <= change.fill.seed < 2**63:
        raise PlanError(f"axis {key!r}: a seed is a number from 0, below 2**63; got {change.fill.seed}")
    if change.fill.rule not in FILLS:
        raise PlanError(f"axis {key!r}: newborn units are filled by {', '.join(FILLS)}; got {change.fill.rule!r}")
    if change.fill.rule == "pair" and change.births % 2:
        raise PlanError(f"axis {key!r}: pairs are born two by two; {change.births} is odd")
    if change.ids and len(change.ids) != change.size:
        raise PlanError(f"axis {key!r}: {len(change.ids)} birth numbers for {change.size} units")
    if list(change.restore) != sorted(set(change.restore)) or min(change.restore, default=0) < 0:
        raise PlanError(f"axis {key!r}: units to restore are named by birth numbers, ascending, each once, from 0")
    if living := sorted(set(change.restore) & set(change.alive)):
        raise PlanError(f"axis {key!r}: unit {living[0]} is alive; only units that were cut can be restored")
    for slot in change.slots:
        if min(slot.dim, slot.offset) < 0 or min(slot.outer, slot.stride, slot.inner) < 1:
            raise PlanError(f"axis {key!r}: slot {slot} has a negative or empty extent")
