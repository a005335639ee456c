"""Magnitude pruning: cut the units with the smallest weight norms. Needs no data."""

from dataclasses import asdict, dataclass
from functools import partial

from regrow import scoring
from regrow.allocation import allocation
from regrow.method import Need
from regrow.methods.pruning.pruner import Pruner, Ranking

CITATION = (
    "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710; "
    "structured form of An et al., arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings:
    """Settings of ``magnitude``: which weights the norm is of, allocation and compensation.

    Args:
        form: ``columns``: norm of the weights that read a unit; ``group``: norm of all weights that belong to it.
        allocation: ``uniform``: the same fraction of each axis; ``ranked``: one ranking of z-scores.
        compensate: Whether the mean of dropped inputs is added to biases (needs sources; the original does not do it).
        minimum: The smallest number of units that stay in an axis.
    """

    form: str = "columns"
    allocation: str = "uniform"
    compensate: bool = False
    minimum: int = 1


def build(settings: Settings) -> Pruner:
    """Return the magnitude pruner: column norms, the same fraction of every axis ("mag-sp" in FLAP's repository).

    Args:
        settings: Its settings.
    """
    how = "zscore" if settings.allocation == "ranked" else "none"
    return Pruner(
        needs=frozenset({Need.WEIGHTS, *([Need.ACTIVATIONS] if settings.compensate else [])}),
        score=lambda task: Ranking(
            scoring.normalise(
                scoring.magnitude(scoring.weights_of(task.model), task.axes, units=task.units, form=settings.form), how
            )
        ),
        allocate=partial(allocation(settings.allocation), minimum=settings.minimum),
        compensate=(lambda model, axes, kept, evidence: scoring.means(model, axes, kept, evidence.pooled()))
        if settings.compensate
        else None,
        origin={"method": "magnitude", "settings": asdict(settings)},
    )
