"""Budgets: how much of a network may stay, in the units people have, and which axes may pay for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

from regrow.amounts import STEPS, Measure, Target
from regrow.axes import Axis, AxisGraph, Mark


@dataclass(frozen=True)
class Timing:
    """How long one forward pass takes by the widths of axes, as measured on one device.

    Args:
        device: Which.
        positions: How many tokens (or images) a pass handles.
        total: Nanoseconds of a pass of the network as it is.
        curves: Name → what one axis takes at each width, as (width, nanoseconds), widths rising, time never falling.
        names: Axis key → the name of its curve; axes that play one role in several blocks share one.
    """

    device: str
    positions: int
    total: int
    curves: Mapping[str, tuple[tuple[int, int], ...]]
    names: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        curves = {name: [list(point) for point in curve] for name, curve in self.curves.items()}
        plain = {"device": self.device, "positions": self.positions, "total": self.total}
        return {**plain, "curves": curves, "names": dict(self.names)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Timing":
        """The inverse of :meth:`record`."""
        curves = {name: tuple((int(w), int(t)) for w, t in curve) for name, curve in record["curves"].items()}
        return cls(record["device"], int(record["positions"]), int(record["total"]), curves, dict(record["names"]))


@dataclass(frozen=True)
class Budget:
    """How much may stay, and which axes may pay for it.

    Args:
        keep: The fraction of the measure that stays, in (0, 1]. Parameters are the weights in ``AxisGraph.counted``.
        measure: What is counted; with a target, what that counts.
        only: Patterns; work only on axes all of whose tensors match one.
        exclude: Patterns; leave out axes with a tensor that matches.
        marks: Which kinds of axes to work on.
        round_to: Sizes left are multiples of this, as far as an axis has that many units.
        regular: Axes that play one role in several blocks keep equally many units, each its own best.
        target: So much may stay, instead of a fraction. Parameters are then all parameters.
        compensated: Weights without a bias beside them that get one once an input of theirs is dropped.
        timing: How long the network takes, where time is counted (:func:`regrow.evaluation.timing`).
    """

    keep: float = 1.0
    measure: Measure = Measure.PARAMETERS
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    marks: frozenset[Mark] = frozenset({Mark.NEUTRAL})
    round_to: int = 1
    regular: bool = False
    target: Target | None = None
    compensated: tuple[str, ...] = ()
    timing: Timing | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is the fraction that stays, above 0 and at most 1; got {self.keep:g}")
        if self.round_to < 1:
            raise ValueError(f"round is a number of units, at least 1; got {self.round_to}")
        if self.target is not None:
            if self.keep != 1:
                raise ValueError(f"give keep or target, not both; got keep {self.keep:g} and target {self.target}")
            object.__setattr__(self, "measure", self.target.measure)
        if self.measure == Measure.NONZERO:
            raise ValueError(
                "nonzero counts weights that a search masks, and pruning removes whole units; got measure nonzero: "
                "use params"
            )

    def units(self, axes: AxisGraph) -> tuple[Axis, ...]:
        """The axes that may pay."""
        return axes.units(self.only, self.exclude, self.marks)

    def limit(self, total: int) -> int:
        """The most that may be left, in whole steps of the measure.

        Args:
            total: What there is.
        """
        if self.target is None:
            return floor(self.keep * total + 1e-6)
        return floor(self.target.amount * STEPS.get(self.measure, 1) + 1e-6)

    def least(self, steps: int, total: int) -> float:
        """The least keep or target under which so much may be left.

        Args:
            steps: What is left at least, in whole steps of the measure.
            total: What there is.
        """
        if self.target is None:
            return min(1.0, ceil(steps / total * 1e4) / 1e4)
        return ceil(steps / 1000) / 1000 if self.measure == Measure.TIME else steps

    def record(self) -> dict[str, Any]:
        """What a plan says of its budget, as JSON data."""
        return {
            **({"keep": self.keep} if self.target is None else {"target": str(self.target)}),
            "measure": str(self.measure),
            "round_to": self.round_to,
            **({"regular": True} if self.regular else {}),
            "only": list(self.only),
            "exclude": list(self.exclude),
        }
