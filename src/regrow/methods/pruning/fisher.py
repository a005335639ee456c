"""Fisher pruning: cut the units whose masks have the least Fisher information, an estimate of the loss of a cut.

Like Kwon et al.: the squared gradient of a mask per unit, from one forward and one backward pass, without fine-tuning.
Unlike them: the gradient is taken per token, with labels that are drawn from the network's own predictions (there: per
example, with the labels of the data); their mask rearrangement and tuning are left out, and dropped inputs are replaced
by their mean unless switched off. The first eighth and the last sixteenth of the blocks are not pruned, as in
``llm_pruner``.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from regrow import scoring
from regrow.allocation import cost_of
from regrow.evidence import Need
from regrow.methods.pruning.pruner import Pruner, PruningTask, one_score
from regrow.scores import Scores
from regrow.scoring.spaces import OUTER_BLOCKS
from regrow.settings.constraints import OneOf, Range, check_constraints

CITATION = (
    "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, arXiv:1801.05787; for masks as "
    "in Kwon et al., A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022, arXiv:2204.09656"
)


@dataclass(frozen=True)
class Settings:
    """Settings of ``fisher``: allocation, unpruned blocks and compensation.

    Args:
        allocation: ``uniform``: the same fraction of each axis; ``ranked``: one ranking of the estimated loss per
            removed weight.
        compensate: Whether the mean of dropped inputs is added to biases.
        spare_first: The fraction of the numbered blocks, at the beginning, that is not pruned.
        spare_last: The fraction of the numbered blocks, at the end, that is not pruned.
        minimum: The smallest number of units that stay in an axis.
    """

    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = True
    spare_first: Annotated[float, Range(0, 1, below=True)] = OUTER_BLOCKS[0]
    spare_last: Annotated[float, Range(0, 1, below=True)] = OUTER_BLOCKS[1]
    minimum: Annotated[int, Range(1)] = 1

    def __post_init__(self) -> None:
        check_constraints(self)


def build(settings: Settings) -> Pruner:
    """Return the pruner that removes the units of least Fisher information.

    Args:
        settings: Its settings.
    """
    spare = settings.spare_first, settings.spare_last
    score = partial(_score, per_weight=settings.allocation == "ranked")
    return one_score("fisher", settings, {Need.WEIGHTS, Need.FISHER}, score, spare)


def _score(task: PruningTask, per_weight: bool) -> Scores:
    scores = scoring.fisher(task.weights, task.axes, task.evidence.pooled(), units=task.units)
    if not per_weight:
        return scores
    cost, values = cost_of(task.axes, task.budget), {}
    for key, own in scores.values.items():
        axis = task.axes[key]
        least = min(axis.least, axis.size - 1)
        values[key] = own * (axis.size - least) / max(1, cost.total - cost({key: least}))
    return Scores(values, f"{scores.metric}/cost", scores.sources, scores.tokens, scores.notes)
