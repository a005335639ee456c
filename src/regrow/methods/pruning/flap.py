"""FLAP: drop the inputs that fluctuate least, one ranking over the whole network, and replace them by their mean.

Like the original: WIFV scores, z-scored within each weight and averaged over a head's channels, one global threshold,
bias compensation, all layers measured in the dense network. Unlike it: the budget is met on exact parameter counts
(the original counts a head as 512/3 neurons whatever the model), grouped-query heads go as whole groups, attention
scores are not squared before they are standardised (a switch), and no sequence is skipped.
"""

from dataclasses import asdict, dataclass
from functools import partial

from regrow import scoring
from regrow.allocation import allocation
from regrow.method import Need
from regrow.methods.pruning.pruner import Pruner, Ranking

CITATION = (
    "An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024, arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings:
    """Settings of ``flap``.

    Args:
        form: ``token``: variance over positions (the paper's code); ``sequence``: of per-sequence means (its text).
        allocation: ``ranked``: one ranking of standardised scores (original, "AL-AM"); ``uniform``: the same share.
        compensate: Let the mean of dropped inputs stand in for them (original: on).
        square_blocks: Square the scores of units of several channels, as the original does with attention's.
        minimum: How many units every axis keeps at least.
    """

    form: str = "token"
    allocation: str = "ranked"
    compensate: bool = True
    square_blocks: bool = False
    minimum: int = 1


def build(settings: Settings) -> Pruner:
    """WIFV, one ranking, compensated."""
    more = {"pool": "standardised" if settings.allocation == "ranked" else "sum", "form": settings.form}
    return Pruner(
        needs=frozenset({Need.WEIGHTS, Need.ACTIVATIONS}),
        score=lambda task: Ranking(
            scoring.wifv(
                scoring.weights_of(task.model),
                task.axes,
                task.evidence.pooled(),
                units=task.units,
                square_blocks=settings.square_blocks,
                **more,
            )
        ),
        allocate=partial(allocation(settings.allocation), minimum=settings.minimum),
        compensate=(lambda model, axes, kept, evidence: scoring.means(model, axes, kept, evidence.pooled()))
        if settings.compensate
        else None,
        origin={"method": "flap", "settings": asdict(settings)},
    )
