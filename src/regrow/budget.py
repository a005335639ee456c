"""Budgets: how much of a network may stay, in the units people have, and which axes may pay for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, floor
from typing import Any

from regrow.axes import Axis, AxisGraph, Mark


class Measure(StrEnum):
    """What a budget counts.

    ``params``, ``macs`` and ``bytes`` are those of dense kernels and of the stored file: an entry that is 0 counts like
    any other. ``nonzero`` counts the parameters that masks leave.
    """

    PARAMETERS = "params"
    NONZERO = "nonzero"
    MACS = "macs"
    BYTES = "bytes"
    CACHE = "kv_cache"
    TIME = "ms"


STEPS = {Measure.TIME: 10**6}
"""In how many whole steps one unit of a measure is counted, where that is not 1: time is counted in nanoseconds."""
IN_CONTEXT = frozenset({Measure.CACHE, Measure.TIME})
"""The measures that ask for how many tokens."""

_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def amount(text: str, measure: Measure) -> float:
    """How much a user means.

    >>> amount("0.5M", Measure.PARAMETERS), amount("50MiB", Measure.CACHE), amount("120", Measure.TIME)
    (500000.0, 52428800.0, 120.0)

    Args:
        text: A number; K, M, G or T make it thousands and so on, Ki, Mi, … (of bytes alone) powers of 1024.
        measure: What it is an amount of.

    Raises:
        ValueError: If it is no such amount, or 0.
    """
    fit, number = _AMOUNT.fullmatch(text.strip()), 0.0
    if fit:
        number = float(fit[1]) * (1024 if fit[3] else 1000) ** _POWERS[fit[2].lower()]
    octets = measure in (Measure.BYTES, Measure.CACHE)
    if (
        not fit
        or not 0 < number < 2**63
        or (fit[3] and not fit[2])
        or ((fit[3] or fit[4]) and not octets)
        or (fit[2] and measure == Measure.TIME)
    ):
        like = "200M, 64MiB or 50000" if octets else "120 or 7.5" if measure == Measure.TIME else "0.5M or 500000"
        raise ValueError(f"an amount of {measure} is above 0 and reads like {like}; got {text!r:.40}")
    return number


def short(number: float) -> str:
    """A number in three digits, as :func:`amount` reads it.

    >>> short(33_640), short(999_700), short(950.4), short(7.25), short(2e13)
    ('33.6k', '1M', '950', '7.25', '20T')
    """
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


@dataclass(frozen=True)
class Target:
    """So much and no more.

    Args:
        measure: What is counted: all parameters, those that are not masked, multiply–accumulates of one example, bytes
            of the file in the dtype as loaded, bytes of the cache of keys and values of one sequence, or milliseconds
            of a forward pass on this device.
        amount: How much of it may be left.
        context: For so many tokens; 0: those of the traced example.
    """

    measure: Measure
    amount: float
    context: int = 0

    def __post_init__(self) -> None:
        if not self.amount > 0 or self.context < 0:
            raise ValueError(f"a target is an amount above 0, for at least 1 token; got {self}")
        if self.context and self.measure not in IN_CONTEXT:
            raise ValueError(f"only kv_cache and ms are for a number of tokens (@); got {self}")
        if self.measure == Measure.CACHE and not self.context:
            raise ValueError(f"a cache grows with the text: say for how many tokens, like {self}@4096")

    @classmethod
    def parse(cls, text: str) -> "Target":
        """A target as users write it: ``UNIT=AMOUNT``, or ``UNIT=AMOUNT@TOKENS``.

        >>> Target.parse("kv_cache=50M@4096")
        Target(measure=<Measure.CACHE: 'kv_cache'>, amount=50000000.0, context=4096)

        Raises:
            ValueError: If it is none; says what one looks like.
        """
        unit, equals, rest = text.strip().partition("=")
        much, at, context = rest.partition("@")
        if not equals or unit not in tuple(Measure):
            raise ValueError(
                f"a target is like params=100M, macs=2G, bytes=200M, kv_cache=50M@4096 or ms=120; got {text!r:.60}"
            )
        if at and not (context.isdecimal() and int(context)):
            raise ValueError(f"what follows @ is a number of tokens, like @4096; got {text!r:.60}")
        return cls(Measure(unit), amount(much, Measure(unit)), int(context or 0))

    def __str__(self) -> str:
        number = f"{self.amount:.0f}" if self.amount == int(self.amount) else f"{self.amount!r}"
        return f"{self.measure}={number}" + (f"@{self.context}" if self.context else "")


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
