"""FLAP: cut the units whose inputs fluctuate least, in one ranking of the whole network; means go into biases.

Like the original: WIFV scores, z-scored within each weight and averaged over a head's channels, one global threshold,
bias compensation, all layers measured in the dense network. Unlike it: the budget is met on exact parameter counts
(the original counts a head as 512/3 neurons whatever the model), grouped-query heads go as whole groups, attention
scores are not squared before they are standardised (a switch), and no sequence is skipped.
"""

from dataclasses import dataclass
from typing import Annotated

from regrow.core.scores import Need, Scores
from regrow.methods.pruning.pruner import Pruner, PruningTask, one_score
from regrow.scoring.metrics import wifv
from regrow.settings.constraints import CheckedSettings, Count, OneOf

CITATION = (
    "An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024, arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``flap``: the form of the fluctuation score, allocation and compensation.

    Args:
        form: ``token``: variance over positions (the paper's code); ``sequence``: variance of per-sequence means (its
            text).
        allocation: ``ranked``: one ranking of standardised scores (original, "AL-AM"); ``uniform``: the same fraction
            of each axis.
        compensate: Whether the mean of dropped inputs is added to the biases of the layers that read them (original:
            on).
        square_blocks: Whether scores of units of several channels are squared, as the original does for attention.
        minimum: The smallest number of units that stay in an axis.
    """

    form: Annotated[str, OneOf("token", "sequence")] = "token"
    allocation: Annotated[str, OneOf("uniform", "ranked")] = "ranked"
    compensate: bool = True
    square_blocks: bool = False
    minimum: Count = 1


def build(settings: Settings) -> Pruner:
    """Return the FLAP pruner: weighted input variance (WIFV), one global ranking, bias compensation."""
    pool = "standardised" if settings.allocation == "ranked" else "sum"

    def score(task: PruningTask) -> Scores:
        return wifv(
            task.weights,
            task.axes,
            task.evidence.pooled(),
            units=task.units,
            pool=pool,
            form=settings.form,
            square_blocks=settings.square_blocks,
        )

    return one_score("flap", settings, {Need.WEIGHTS, Need.ACTIVATIONS}, score)
