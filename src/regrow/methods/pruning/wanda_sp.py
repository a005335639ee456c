"""Wanda-sp: structured Wanda; cut the units with the smallest weights times the size of their inputs.

The original (in FLAP's repository) cuts the same fraction of every layer and compensates nothing; it measures each
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
    """Settings of ``wanda_sp``: allocation and compensation.

    Args:
        allocation: ``uniform``: the same fraction of each axis (original); ``ranked``: one ranking of z-scores.
        compensate: Whether the mean of dropped inputs is added to the biases of the layers that read them (original:
            off).
        minimum: The smallest number of units that stay in an axis.
    """

    allocation: str = "uniform"
    compensate: bool = True
    minimum: int = 1


def build(settings: Settings) -> Pruner:
    """Return the Wanda-sp pruner: mean abs(W) · rms(x) per unit, the same fraction of every axis, bias compensation.

    Args:
        settings: Its settings.
    """
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
