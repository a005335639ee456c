"""Budgets: how large a network may be after pruning, in parameters, MACs, bytes or time, and which axes are cut."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, floor

import msgspec

from regrow.core.amounts import Measure, Target
from regrow.core.axes import Axis, AxisGraph, Mark


@dataclass(frozen=True)
class Timing:
    """Measured nanoseconds of a forward pass on one device, as a function of the width of each axis.

    Args:
        device: The name of the device.
        positions: How many tokens or images the pass had.
        total: Nanoseconds of the unpruned network.
        curves: Name of a curve → (width in units, nanoseconds of one axis), widths rising, time never falling.
        names: Axis key → the name of its curve, which all axes of one kind share.
    """

    device: str
    positions: int
    total: int
    curves: Mapping[str, tuple[tuple[int, int], ...]]
    names: Mapping[str, str]

    def record(self) -> dict[str, object]:
        """Return the timing as JSON data."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> "Timing":
        """Read a timing back from what :meth:`record` returned."""
        return msgspec.convert(record, cls)


@dataclass(frozen=True)
class Budget:
    """How much of a network stays when it is pruned, by which measure, and which axes may be cut for it.

    Args:
        keep: The fraction of the measure that stays, in (0, 1].
        measure: What is counted; replaced by the target's measure if there is a target.
        only: Patterns of tensor names (:func:`regrow.core.axes.matches`): only axes all of whose tensors match one are
            cut; empty: all axes.
        exclude: Patterns of tensor names: axes with a tensor that matches one are left out.
        marks: Which axes may be cut, by how exact the cut is (:class:`regrow.core.axes.Mark`).
        round_to: Units left per axis are a multiple of this, as far as an axis has that many.
        regular: Whether axes with the same role in several blocks keep equally many units, each axis its own best.
        target: An upper limit on a measure, in its units or as a share, instead of a fraction.
        compensated: Weights of layers without a bias, which get one (it counts) once an input is dropped.
        timing: The measured time of the network, where milliseconds are limited (``evaluation.timing.time_widths``).
    """

    keep: float = 1.0
    measure: Measure = Measure.WEIGHTS
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
            remedy = f"; to keep {self.keep:g} %, use {self.keep / 100:g}" if 1 < self.keep <= 100 else ""
            raise ValueError(f"keep is the fraction that stays, above 0 and at most 1; got {self.keep:g}{remedy}")
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
        """Return the axes whose units may be cut: :meth:`AxisGraph.units` by the budget's patterns and marks."""
        return axes.units(self.only, self.exclude, self.marks)

    def limit(self, total: int) -> int:
        """Return the largest size allowed (time in nanoseconds); ``total``: the unpruned size, in the same unit."""
        return self.target.limit(total) if self.target else floor(self.keep * total + 1e-6)

    def least(self, steps: int, total: int) -> float:
        """Return the smallest ``keep``, share or amount, whichever the budget has, that allows a size; for messages.

        ``steps``, ``total``: that size and the unpruned one, as in :meth:`limit`. Shares are rounded up to 0.01 %.
        """
        if self.target is None or self.target.share:
            return min(1.0, ceil(steps / total * 1e4) / 1e4)
        return ceil(steps / 1000) / 1000 if self.measure == Measure.TIME else steps

    def record(self) -> dict[str, object]:
        """Return the budget as JSON data, as plans and reports store it; without ``compensated`` and ``timing``."""
        return {
            **({"keep": self.keep} if self.target is None else {"target": str(self.target)}),
            "measure": str(self.measure),
            "round_to": self.round_to,
            **({"regular": True} if self.regular else {}),
            "only": list(self.only),
            "exclude": list(self.exclude),
            **({} if self.marks == {Mark.NEUTRAL} else {"marks": sorted(str(mark) for mark in self.marks)}),
        }
