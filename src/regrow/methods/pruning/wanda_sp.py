"""Wanda-sp: weights times the size of their inputs, summed over whole units.

The original (in FLAP's repository) takes the same share from every layer and compensates nothing; it measures each
layer behind the already pruned ones. Here all layers are measured in the dense network, in one pass, and dropped
inputs are replaced by their mean unless switched off.
"""

from dataclasses import asdict, dataclass
from functools import partial

from regrow import scoring
from regrow.allocation import allocation
from regrow.method import Need
from regrow.methods.pruning.pruner import Pruner, Ranking

CITATION = (
    "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, arXiv:2306.11695; "
    "structured form of An et al., arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings:
    """Settings of ``wanda_sp``.

    Args:
        allocation: ``uniform``: the same share of each axis (original); ``ranked``: one ranking of z-scores.
        compensate: Let the mean of dropped inputs stand in for them (original: off).
        minimum: How many units every axis keeps at least.
    """

    allocation: str = "uniform"
    compensate: bool = True
    minimum: int = 1


def build(settings: Settings) -> Pruner:
    """Structured Wanda: mean abs(W) · rms(x), the same share everywhere, compensated."""
    pool = "standardised" if settings.allocation == "ranked" else "sum"
    return Pruner(
        needs=frozenset({Need.WEIGHTS, Need.ACTIVATIONS}),
        score=lambda task: Ranking(
            scoring.wanda_sp(
                scoring.weights_of(task.model), task.axes, task.evidence.pooled(), units=task.units, pool=pool
            )
        ),
        allocate=partial(allocation(settings.allocation), minimum=settings.minimum),
        compensate=(lambda model, axes, kept, evidence: scoring.means(model, axes, kept, evidence.pooled()))
        if settings.compensate
        else None,
        origin={"method": "wanda_sp", "settings": asdict(settings)},
    )
