"""LLM-Pruner: cut the units whose removal changes the loss least, by a first-order Taylor estimate.

Like the original: the same fraction of every block but the first eighth and the last sixteenth, left unpruned (4 and
2 of 32; a regular plan spares none). Unlike it: the gradient is that of all sources together (there: 10 × 64 tokens),
dropped inputs are replaced by their mean unless switched off, and fine-tuning (there: LoRA) is a step of its own.
"""

from dataclasses import dataclass
from typing import Annotated

from regrow.core.scores import Need, Scores
from regrow.methods.pruning.pruner import Pruner, PruningTask, one_score
from regrow.scoring.metrics import taylor
from regrow.scoring.spaces import OUTER_BLOCKS, normalise
from regrow.settings.constraints import CheckedSettings, Count, FractionBelowOne, OneOf

CITATION = "Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models, NeurIPS 2023, arXiv:2305.11627"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``llm_pruner``: the form of the Taylor score, allocation, unpruned blocks and compensation.

    Args:
        form: ``element1``: Σ abs(w·g) over a unit's weights; ``vector``: abs(Σ w·g) per channel.
        allocation: ``uniform``: the same fraction of each axis (original); ``ranked``: one ranking of z-scores.
        compensate: Whether the mean of dropped inputs is added to the biases of the layers that read them (original:
            off).
        spare_first: The fraction of the numbered blocks, at the beginning, that is not pruned (original: 4 of 32).
        spare_last: The fraction of the numbered blocks, at the end, that is not pruned (original: 2 of 32).
        minimum: The smallest number of units that stay in an axis.
    """

    form: Annotated[str, OneOf("element1", "vector")] = "element1"
    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = True
    spare_first: FractionBelowOne = OUTER_BLOCKS[0]
    spare_last: FractionBelowOne = OUTER_BLOCKS[1]
    minimum: Count = 1


def build(settings: Settings) -> Pruner:
    """Return the LLM-Pruner: Taylor scores, the same fraction of all but the outer blocks, bias compensation."""
    how = "zscore" if settings.allocation == "ranked" else "none"

    def score(task: PruningTask) -> Scores:
        weights, statistics = task.weights, task.evidence.pooled()
        scores = taylor(weights, task.axes, statistics, units=task.units, form=settings.form)
        return normalise(scores, how)

    spare = settings.spare_first, settings.spare_last
    return one_score("llm_pruner", settings, {Need.WEIGHTS, Need.GRADIENTS}, score, spare)
