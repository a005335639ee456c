"""What a search aims at: a target in words as a measure and a number."""

from regrow.allocation.cost import Cost
from regrow.axes import AxisGraph
from regrow.budget import Measure, Target
from regrow.evaluation import Latency

TRACED = 2
"""Images that a space is traced with; multiply–accumulates are told of one."""

SIZES = ("params", "macs", "bytes", "ms")
"""The measures that a search knows of single weights and operations."""


def measure_of(text: str) -> Measure | None:
    """The measure that a target names; ``None`` for a share."""
    unit = text.partition("=")[0].strip()
    return Measure(unit) if unit in SIZES else None


def target(text: str, axes: AxisGraph, table: Latency | None = None) -> tuple[Measure, float]:
    """A target as a measure and a number.

    Args:
        text: ``params=0.5M``, ``macs=3M``, ``bytes=200k``, ``ms=20``; or a share of all parameters, ``0.2``.
        axes: Those of the whole space.
        table: How long it takes, for a target in ms.

    Raises:
        ValueError: If it is none of these, or more than the whole space has.
    """
    unit, equals, _ = text.partition("=")
    like = f"the target is like params=0.5M, macs=3M, bytes=200k, ms=20 or a share such as 0.2; got {text!r}"
    if equals and (unit.strip() not in SIZES or "@" in text):
        raise ValueError(like)
    wanted = Target.parse(text) if equals else None
    measure = wanted.measure if wanted else Measure.PARAMETERS
    if measure == Measure.TIME and table is None:
        raise ValueError("how long the space takes was not measured: evaluation.latency(…) does it")
    whole_cost: float = table.total if table else Cost(axes, measure, counted=False).total
    if measure == Measure.MACS:
        whole_cost = whole_cost / TRACED
    try:
        number = wanted.amount if wanted else float(text)
    except ValueError:
        raise ValueError(like) from None
    if wanted is None:
        if number >= 1:
            raise ValueError(f"a target without a measure is a share, below 1; got {text}; or write params={text}")
        number *= whole_cost
    if not 0 < number < whole_cost:
        has = f"{whole_cost:.4g}" if table else f"{whole_cost:,.0f}"
        raise ValueError(f"the target {text} is not below what the whole space has, {has} {measure}")
    return measure, number
