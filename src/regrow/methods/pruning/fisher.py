"""Fisher pruning: cut the units whose masks have the least Fisher information, an estimate of the loss of a cut.

Like Kwon et al.: the squared gradient of a mask per unit, from one forward and one backward pass, without fine-tuning.
Unlike them: the gradient is taken per token, with labels that are drawn from the network's own predictions (there: per
example, with the labels of the data); their mask rearrangement and tuning are left out, and dropped inputs are replaced
by their mean unless switched off. The first eighth and the last sixteenth of the blocks are not pruned, as in
``llm_pruner``, unless ``allocation=measured`` finds a lower loss with them pruned.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

from regrow.allocation.cost import cost_of
from regrow.allocation.ranked import rank
from regrow.core.scores import Need, Scores
from regrow.methods.pruning.compared_allocations import RANKED, choose_allocation, uniform_candidates
from regrow.methods.pruning.pruner import Pruner, PruningTask, Ranking, one_score
from regrow.scoring.metrics import fisher
from regrow.scoring.spaces import OUTER_BLOCKS
from regrow.settings.constraints import CheckedSettings, Count, FractionBelowOne, OneOf

CITATION = (
    "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018, arXiv:1801.05787; for masks as "
    "in Kwon et al., A Fast Post-Training Pruning Framework for Transformers, NeurIPS 2022, arXiv:2204.09656"
)


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``fisher``: allocation, unpruned blocks and compensation.

    Args:
        allocation: ``uniform``: the same fraction of each axis; ``ranked``: one ranking of the estimated loss per
            removed weight; ``measured``: of the same fraction of each axis outside the first and last blocks, the same
            in all blocks, and one ranking of all blocks, the one with the lowest loss of the cut network on 2,000
            labels of each source, before any refit.
        compensate: Whether the mean of dropped inputs is added to biases.
        spare_first: The fraction of the numbered blocks, at the beginning, that is not pruned; with ``measured``, in
            the first of the three allocations.
        spare_last: The fraction of the numbered blocks, at the end, that is not pruned; with ``measured`` likewise.
        minimum: The smallest number of units that stay in an axis.
    """

    allocation: Annotated[str, OneOf("uniform", "ranked", "measured")] = "uniform"
    compensate: bool = True
    spare_first: FractionBelowOne = OUTER_BLOCKS[0]
    spare_last: FractionBelowOne = OUTER_BLOCKS[1]
    minimum: Count = 1


def build(settings: Settings) -> Pruner:
    """Return the pruner that removes the units of least Fisher information."""
    spare, needs = (settings.spare_first, settings.spare_last), {Need.WEIGHTS, Need.FISHER}
    score = partial(_score, per_weight=settings.allocation == "ranked")
    if settings.allocation != "measured":
        return one_score("fisher", settings, needs, score, spare)
    uniform_of_all = replace(settings, allocation="uniform")  # whose budget is checked before anything is measured
    pruner = one_score("fisher", uniform_of_all, needs, score)
    origin = {"method": "fisher", "settings": asdict(settings)}
    return replace(pruner, score=partial(_compare, settings=settings), origin=origin, runs_network=True)


def _score(task: PruningTask, per_weight: bool) -> Scores:
    scores = fisher(task.weights, task.axes, task.evidence.pooled(), units=task.units)
    return _per_weight(task, scores) if per_weight else scores


def _per_weight(task: PruningTask, scores: Scores) -> Scores:
    """Return the estimated loss per weight that a unit of the axis removes."""
    cost, values = cost_of(task.axes, task.budget), {}
    for key, losses in scores.values.items():
        axis = task.axes[key]
        least = min(axis.least, axis.size - 1)
        values[key] = losses * (axis.size - least) / max(1, cost.total - cost({key: least}))
    return replace(scores, values=values, metric=f"{scores.metric}/cost")


def _compare(task: PruningTask, settings: Settings) -> Ranking:
    """Return the scores of the allocation with the lowest loss, and the units that stay in it."""
    scores = _score(task, per_weight=False)
    ranked = _per_weight(task, scores)
    candidates = uniform_candidates(task, scores, (settings.spare_first, settings.spare_last), settings.minimum)
    candidates[RANKED] = ranked, partial(rank, task.axes, ranked, task.budget, minimum=settings.minimum)
    return choose_allocation(task, candidates, compensate=settings.compensate)
