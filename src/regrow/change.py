"""Changes: what happens to one axis, as plain data."""

from dataclasses import dataclass
from typing import Any

from regrow.axes import Role, Slot

FILLS = ("zero_out", "split", "pair")
MOST = 2**24
"""No axis grows by more units at once."""
MOST_UNITS = 2**26
"""No axis has more."""


class PlanError(ValueError):
    """A plan that cannot be read, or does not fit the network it is meant for."""


@dataclass(frozen=True)
class Fill:
    """What new units hold, such that the network computes what it did.

    What is drawn can be fitted to data afterwards, with the function kept: :func:`regrow.fit_new_units` and
    :func:`regrow.align_new_units` take a network that grew by ``zero_out``.

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
        ids: The ids of the units before the change.
        grow: How many units are added; they lie behind all others.
        fill: What they hold.
        restore: The ids of units cut earlier that come back, ascending. Each goes to its old place: units
            lie in the order of their unit ids.
        fresh: Whether they hold what new units would (``fill``), and not what they held when they were cut.
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
        """The ids of the units before it."""
        return self.ids or tuple(range(self.size))

    @property
    def new_units(self) -> int:
        """How many units come without numbers of their own: new ones, and those restored afresh."""
        return self.grow + (len(self.restore) if self.fresh else 0)

    @property
    def recalled(self) -> tuple[int, ...]:
        """The ids of the units that come back with what they held."""
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

    def check(self, key: str) -> None:
        """Assert that it makes sense by itself.

        Raises:
            PlanError: If it keeps no unit, a unit twice, or one that does not exist, or a number is not legal.
        """
        _check(key, self)

    @classmethod
    def from_data(cls, value: Any) -> "Change":
        """Read it back from what ``dataclasses.asdict`` makes of it.

        Raises:
            PlanError: If a value is not of its kind.
        """
        slots = tuple(
            Slot(
                name=str(slot["name"]),
                role=Role(slot["role"]),
                **{part: whole(slot[part], part) for part in ("dim", "outer", "stride", "inner", "offset")},
            )
            for slot in value["slots"]
        )
        fill = value.get("fill", {})
        return cls(
            size=whole(value["size"], "size"),
            keep=tuple(whole(unit, "keep") for unit in value["keep"]),
            slots=slots,
            ids=tuple(whole(one, "ids") for one in value.get("ids", ())),
            grow=whole(value.get("grow", 0), "grow"),
            fill=Fill(str(fill.get("rule", "zero_out")), whole(fill.get("seed", 0), "seed")),
            restore=tuple(whole(one, "restore") for one in value.get("restore", ())),
            fresh=_flag(value.get("fresh", False), "fresh"),
        )


def whole(value: object, what: str) -> int:
    """A whole number; ``what`` says of what."""
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
    if list(change.keep) != sorted(set(change.keep)) or change.keep[0] < 0 or change.keep[-1] >= change.size:
        raise PlanError(f"axis {key!r}: kept units must be ascending, each once, within 0..{change.size - 1}")
    if not 0 <= change.grow <= MOST:
        raise PlanError(f"axis {key!r}: it can grow by 0 to {MOST} units, not by {change.grow}")
    if not 0 <= change.fill.seed < 2**63:
        raise PlanError(f"axis {key!r}: a seed is a number from 0, below 2**63; got {change.fill.seed}")
    if change.fill.rule not in FILLS:
        raise PlanError(f"axis {key!r}: new units are filled by {', '.join(FILLS)}; got {change.fill.rule!r}")
    if change.fill.rule == "pair" and change.new_units % 2:
        raise PlanError(f"axis {key!r}: pairs are added two by two; {change.new_units} is odd")
    if change.ids and len(change.ids) != change.size:
        raise PlanError(f"axis {key!r}: {len(change.ids)} unit ids for {change.size} units")
    if list(change.restore) != sorted(set(change.restore)) or min(change.restore, default=0) < 0:
        raise PlanError(f"axis {key!r}: units to restore are named by unit ids, ascending, each once, from 0")
    if living := sorted(set(change.restore) & set(change.alive)):
        raise PlanError(f"axis {key!r}: unit {living[0]} is alive; only units that were cut can be restored")
    for slot in change.slots:
        if min(slot.dim, slot.offset) < 0 or min(slot.outer, slot.stride, slot.inner) < 1:
            raise PlanError(f"axis {key!r}: slot {slot} has a negative or empty extent")
