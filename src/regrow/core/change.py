"""Change to one axis as plain data: which units stay, which come back, how many are added, and with which values."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from regrow.core.axes import Axis, Mark, Role, Slot
from regrow.core.fills import FILLS, Fill

MOST = 2**24
"""The largest number of units that one change may add to an axis."""
MOST_UNITS = 2**26
"""The largest number of units of an axis."""


class PlanError(ValueError):
    """Raised for a plan that cannot be read, or does not fit the network to which it is applied."""


@dataclass(frozen=True)
class Change:
    """What a plan does to one axis: units kept, units restored, units added.

    Args:
        size: How many units the axis has before the change.
        keep: The positions of the units that stay, ascending.
        slots: Where the axis lies in each tensor, so that the plan can be checked against another network.
        ids: The ids of the units before the change; empty: 0 to ``size - 1``.
        grow: How many units are added, behind all others.
        fill: How new units are initialised.
        restore: The ids of units cut earlier that come back, ascending. Each returns to its old place: units lie in the
            order of their ids.
        fresh: Whether restored units are initialised like new ones (``fill``) instead of with the weights they had when
            cut.
    """

    size: int
    keep: tuple[int, ...]
    slots: tuple[Slot, ...]
    ids: tuple[int, ...] = ()
    grow: int = 0
    fill: Fill = field(default_factory=Fill)
    restore: tuple[int, ...] = ()
    fresh: bool = False

    @property
    def after(self) -> int:
        """The number of units after the change."""
        return len(self.keep) + len(self.restore) + self.grow

    @property
    def alive(self) -> tuple[int, ...]:
        """The ids of the units before the change."""
        return self.ids or tuple(range(self.size))

    @property
    def new_units(self) -> int:
        """The number of units that are initialised by ``fill``: added units, and restored ones if ``fresh``."""
        return self.grow + (len(self.restore) if self.fresh else 0)

    @property
    def recalled(self) -> tuple[int, ...]:
        """The ids of the units that come back with the weights they had when cut."""
        return () if self.fresh else self.restore

    @property
    def idle(self) -> bool:
        """Whether the change leaves the axis as it is."""
        return len(self.keep) == self.size == self.after

    @property
    def dropped(self) -> tuple[int, ...]:
        """The positions of the units that are cut, ascending."""
        kept = set(self.keep)
        return tuple(unit for unit in range(self.size) if unit not in kept)

    def check(self, key: str) -> None:
        """Raise ``PlanError`` unless the change is valid by itself, without knowing the network.

        Args:
            key: The key of the axis, for the message.

        Raises:
            PlanError: If it keeps no unit, a unit twice, or one that does not exist, or a number is not legal.
        """
        _check(key, self)

    @classmethod
    def from_data(cls, value: object) -> "Change":
        """Read a change back from what ``dataclasses.asdict`` made of it, checking the type of every value.

        Args:
            value: The JSON data.

        Raises:
            PlanError: If a value has the wrong type.
        """
        data: Any = value
        slots = tuple(
            Slot(
                name=str(slot["name"]),
                role=Role(slot["role"]),
                **{part: whole(slot[part], part) for part in ("dim", "outer", "stride", "inner", "offset")},
            )
            for slot in data["slots"]
        )
        fill = data["fill"]
        return cls(
            size=whole(data["size"], "size"),
            keep=tuple(whole(unit, "keep") for unit in data["keep"]),
            slots=slots,
            ids=tuple(whole(one, "ids") for one in data["ids"]),
            grow=whole(data["grow"], "grow"),
            fill=Fill(str(fill["rule"]), whole(fill["seed"], "seed")),
            restore=tuple(whole(one, "restore") for one in data["restore"]),
            fresh=_flag(data["fresh"], "fresh"),
        )


def whole(value: object, what: str) -> int:
    """Return a value from a plan file if it is a whole number of 64 bits.

    Args:
        value: The value as it was read.
        what: The name of the field, for the message.

    Raises:
        PlanError: If it is of another type, or too large.
    """
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise PlanError(f"{what} is a whole number; the plan says {str(value)[:40]!r}")
    return value


def _flag(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise PlanError(f"{what} is true or false; the plan says {str(value)[:40]!r}")
    return value


def _check(key: str, change: Change) -> None:
    if not 0 < change.size <= MOST_UNITS:
        raise PlanError(f"axis {key!r}: an axis has 1 to {MOST_UNITS:,} units, the plan says {change.size:,}")
    if not change.keep:
        raise PlanError(f"axis {key!r}: a plan must keep at least one unit")
    if any(map(operator.ge, change.keep, change.keep[1:])) or change.keep[0] < 0 or change.keep[-1] >= change.size:
        raise PlanError(f"axis {key!r}: kept units must be ascending, each once, within 0..{change.size - 1}")
    if not 0 <= change.grow <= MOST:
        raise PlanError(f"axis {key!r}: it can grow by 0 to {MOST} units, not by {change.grow}")
    if not 0 <= change.fill.seed < 2**63:
        raise PlanError(f"axis {key!r}: a seed is a number from 0, below 2**63; got {change.fill.seed}")
    if change.fill.rule not in FILLS:
        raise PlanError(f"axis {key!r}: new units are filled by {', '.join(FILLS)}; got {change.fill.rule!r}")
    if FILLS[change.fill.rule].in_pairs and change.new_units % 2:
        raise PlanError(f"axis {key!r}: pairs are added two by two; {change.new_units} is odd")
    if change.ids and len(change.ids) != change.size:
        raise PlanError(f"axis {key!r}: {len(change.ids)} unit ids for {change.size} units")
    if list(change.restore) != sorted(set(change.restore)) or min(change.restore, default=0) < 0:
        raise PlanError(f"axis {key!r}: units to restore are named by unit ids, ascending, each once, from 0")
    if change.restore and (living := sorted(set(change.restore) & set(change.alive))):
        raise PlanError(f"axis {key!r}: unit {living[0]} is alive; only units that were cut can be restored")
    for slot in change.slots:
        if min(slot.dim, slot.offset) < 0 or min(slot.outer, slot.stride, slot.inner) < 1:
            raise PlanError(f"axis {key!r}: slot {slot} has a negative or empty extent")


def unit_positions(key: str, units: Iterable[Any]) -> tuple[int, ...]:
    """Return positions of units in ascending order.

    Args:
        key: The key of the axis, for the message.
        units: The positions, in any order.

    Raises:
        PlanError: For a mask, a fraction or a text.
    """
    result, units = [], tuple(units)
    if set(map(type, units)) <= {int}:
        return tuple(sorted(units))
    for one in units:
        try:
            if isinstance(one, bool) or "bool" in str(getattr(one, "dtype", "")):
                raise TypeError
            result.append(operator.index(one))
        except TypeError:
            remedy = "give positions, of a mask those of mask.nonzero().flatten()"
            raise PlanError(f"axis {key!r}: a unit is a whole number, got {str(one)[:40]!r}; {remedy}") from None
    return tuple(sorted(result))


def growth_problem(axis: Axis, change: Change, parameters: frozenset[str]) -> str:
    """Return why an axis cannot get the units that a change adds; empty if it can.

    Args:
        axis: The axis.
        change: The change.
        parameters: The names of the network's parameters.
    """
    if axis.narrow:
        return axis.narrow
    unread, folded = FILLS[change.fill.rule].unread, axis.mark is Mark.FOLDED
    if folded and not unread:
        return f"{axis.reason}, which only new units of value 0 leave as it was; take the fill 'zero_out'"
    made, read = ({(s.name, s.dim) for s in axis.slots if s.role is role} for role in (Role.PRODUCES, Role.CONSUMES))
    others = {(s.name, s.dim) for s in axis.slots if s.role is not Role.CONSUMES}
    both = ", ".join(sorted(name for name, _ in others & read))
    if both and not unread:
        return f"{both} reads its units and does something else with them, too; take the fill 'zero_out'"
    if both and (read <= made if folded else made <= read):
        return f"{both} both makes and reads its units: 0 on both sides, new ones could never learn"
    if unread and not {name for name, _ in (made if folded else read)} & parameters:
        return "no parameter is there that could learn to use new units"
    return ""
