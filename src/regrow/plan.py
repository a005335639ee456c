"""Plans: what will change in a network, as plain data."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from regrow.axes import AxisGraph, Role, Slot

FORMAT = "regrow-plan/1"


class PlanError(ValueError):
    """A plan that cannot be read, or does not fit the network it is meant for."""


@dataclass(frozen=True)
class Change:
    """What happens to one axis.

    Args:
        size: How many units the axis has before.
        keep: Which of them stay, ascending.
        slots: Where its units lie, so that the plan stands alone.
        ids: The birth numbers of the units before the change.
    """

    size: int
    keep: tuple[int, ...]
    slots: tuple[Slot, ...]
    ids: tuple[int, ...] = ()

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
        changes = {}
        for key, units in keep.items():
            if key not in axes.axes:
                raise PlanError(f"the network has no axis {key!r}; `regrow show` lists the axes")
            axis = axes[key]
            changes[key] = Change(axis.size, tuple(sorted(int(unit) for unit in units)), axis.slots, axis.ids)
        plan = cls(changes, **more)
        plan.check(axes)
        return plan

    def check(self, axes: AxisGraph) -> None:
        """Assert that the plan fits the network.

        Raises:
            PlanError: If an axis is missing, frozen, of another size or lies elsewhere, or if axes that must keep
                equally many units would not.
        """
        for key, change in self.changes.items():
            axis = axes.axes.get(key)
            if axis is None:
                raise PlanError(f"the plan changes axis {key!r}, which this network does not have")
            if len(change.keep) == change.size:
                continue
            if len(change.keep) < axis.least:
                raise PlanError(
                    f"axis {key!r} must keep at least {axis.least} units; the plan keeps {len(change.keep)}"
                )
            if not axis.free:
                raise PlanError(f"axis {key!r} is frozen: {axis.reason}")
            if axis.size != change.size or axis.slots != change.slots:
                raise PlanError(
                    f"axis {key!r} has {axis.size} units here, the plan was made for {change.size}"
                    if axis.size != change.size
                    else f"the units of axis {key!r} lie elsewhere in this network than in the plan"
                )
        counts: dict[str, tuple[str, int]] = {}
        for axis in axes:
            if axis.count and axis.free:
                left = axis.times * (len(self.changes[axis.key].keep) if axis.key in self.changes else axis.size)
                other, expected = counts.setdefault(axis.count, (axis.key, left))
                if left != expected:
                    raise PlanError(
                        f"axes {other!r} and {axis.key!r} must keep equal sizes; the plan leaves {expected} and {left}"
                    )

    def sizes(self, axes: AxisGraph) -> dict[str, int]:
        """The size of every axis after the plan."""
        return axes.sizes() | {key: len(change.keep) for key, change in self.changes.items()}

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
            dim=int(slot["dim"]),
            outer=int(slot["outer"]),
            stride=int(slot["stride"]),
            inner=int(slot["inner"]),
            offset=int(slot["offset"]),
            role=Role(slot["role"]),
        )
        for slot in value["slots"]
    )
    size, keep = int(value["size"]), tuple(int(unit) for unit in value["keep"])
    return Change(size, keep, slots, tuple(int(i) for i in value.get("ids", ())))


def _check_change(key: str, change: Change) -> None:
    if not change.keep:
        raise PlanError(f"axis {key!r}: a plan must keep at least one unit")
    if list(change.keep) != sorted(set(change.keep)) or change.keep[0] < 0 or change.keep[-1] >= change.size:
        raise PlanError(f"axis {key!r}: kept units must be ascending, each once, within 0..{change.size - 1}")
    if change.ids and len(change.ids) != change.size:
        raise PlanError(f"axis {key!r}: {len(change.ids)} birth numbers for {change.size} units")
    for slot in change.slots:
        if min(slot.dim, slot.offset) < 0 or min(slot.outer, slot.stride, slot.inner) < 1:
            raise PlanError(f"axis {key!r}: slot {slot} has a negative or empty extent")
