"""The target of a search: parsed from text into a measure and a number."""

from regrow.allocation.cost import Cost
from regrow.core.amounts import Measure
from regrow.core.axes import AxisGraph
from regrow.evaluation import Latency
from regrow.methods.search.space import GRANULARITIES
from regrow.settings.search import parse_search_target


def find_granularities(measure: Measure) -> tuple[str, ...]:
    """Return the granularities by which a target can be met: zeroed weights count as removed under ``nonzero`` only.

    Args:
        measure: What the target counts.
    """
    return GRANULARITIES if measure == Measure.NONZERO else GRANULARITIES[:2]


def parse_target(text: str, axes: AxisGraph, table: Latency | None = None) -> tuple[Measure, float]:
    """Return a target as a measure and a number.

    Args:
        text: ``params=0.5M``, ``nonzero=50k``, ``macs=3M``, ``bytes=200k``, ``ms=20``; a fraction of the whole space's
            cost, ``macs=20%``; or a fraction of its parameters, ``0.2``.
        axes: The axes of the whole space.
        table: The measured latencies of the whole space, for a target in ms.

    Raises:
        ValueError: If it is none of these, or more than the whole space has.
    """
    target = parse_search_target(text)
    measure = target.measure
    if measure == Measure.TIME and table is None:
        raise ValueError("how long the space takes was not measured: evaluation.latency(…) does it")
    dense = Measure.PARAMETERS if measure == Measure.NONZERO else measure
    whole_cost: float = table.total if table else Cost(axes, dense).total
    number = target.amount or target.share * whole_cost
    if not 0 < number < whole_cost:
        has = f"{whole_cost:.4g}" if table else f"{whole_cost:,.0f}"
        raise ValueError(f"the target {text} is not below what the whole space has, {has} {measure}")
    return measure, number
