"""Random pruning: the control that every metric has to beat."""

from dataclasses import asdict, dataclass
from functools import partial

from regrow import scoring
from regrow.allocation import allocation
from regrow.method import Need
from regrow.methods.pruning.pruner import Pruner, Ranking

CITATION = "No paper: uniform random scores, a control."


@dataclass(frozen=True)
class Settings:
    """Settings of ``random``.

    Args:
        seed: The draw; each axis has its own stream, so the order of axes does not matter.
        allocation: ``uniform``: the same share of each axis; ``ranked``: all units in one lottery.
        compensate: Let the mean of dropped inputs stand in for them (needs sources).
        minimum: How many units every axis keeps at least.
    """

    seed: int = 0
    allocation: str = "uniform"
    compensate: bool = False
    minimum: int = 1


def build(settings: Settings) -> Pruner:
    """Random scores, the same share everywhere, no compensation unless asked."""
    return Pruner(
        needs=frozenset({Need.ACTIVATIONS} if settings.compensate else set()),
        score=lambda task: Ranking(scoring.random(task.axes, units=task.units, seed=settings.seed)),
        allocate=partial(allocation(settings.allocation), minimum=settings.minimum),
        compensate=(lambda model, axes, kept, evidence: scoring.means(model, axes, kept, evidence.pooled()))
        if settings.compensate
        else None,
        origin={"method": "random", "settings": asdict(settings)},
    )
