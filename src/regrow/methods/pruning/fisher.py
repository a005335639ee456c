"""Fisher pruning: cut the units whose masks have the least Fisher information, an estimate of the loss of a cut.

Like Kwon et al.: the squared gradient of a mask per unit, from one forward and one backward pass, without fine-tuning.
Unlike them: the gradient is taken per token, with labels that are drawn from the network's own predictions (there: per
example, with the labels of the data); their mask rearrangement and tuning are left out, and dropped inputs are replaced
by their mean unless switched off. The first eighth and the last sixteenth of the blocks are not pruned, as in
``llm_pruner``, unless ``allocation=measured`` (ours) finds a lower loss of the masked network with them pruned.
"""

from dataclasses import dataclass, replace
from typing import Annotated

from regrow.allocation.cost import cost_of
from regrow.core.scores import Need, Scores
from regrow.methods.pruning.measured import compare_allocations
from regrow.methods.pruning.pruner import Pruner, PruningTask, simple_pruner
from regrow.scoring.metrics import fisher
from regrow.settings.constraints import CheckedSettings, OneOf

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
            in all blocks (of both, hidden neurons of MLPs alone if there are any), and one ranking of all units, the
            one with the lowest loss of the masked network on 512 labels of each source.
        compensate: Whether the mean of dropped inputs is added to biases.
        prune_outer: Whether the first eighth and the last sixteenth of the blocks are pruned, too; ``measured`` decides
            it by itself.
    """

    allocation: Annotated[str, OneOf("uniform", "ranked", "measured")] = "uniform"
    compensate: bool = True
    prune_outer: bool = False


def build(settings: Settings) -> Pruner:
    """Return the pruner that removes the units of least Fisher information."""
    needs = {Need.WEIGHTS, Need.FISHER}
    if settings.allocation == "measured":
        pruner = simple_pruner("fisher", replace(settings, allocation="uniform"), needs, _score_units)
        return compare_allocations(pruner, _score_units, _score_per_cost)
    score = _score_per_cost if settings.allocation == "ranked" else _score_units
    return simple_pruner("fisher", settings, needs, score, settings.prune_outer)


def _score_units(task: PruningTask) -> Scores:
    """Return the estimated loss of cutting each unit."""
    return fisher(task.weights, task.axes, task.evidence.pooled(), units=task.units)


def _score_per_cost(task: PruningTask) -> Scores:
    """Return the estimated loss of cutting each unit, divided by what cutting a unit of its axis saves on average.

    The cost is counted in the measure of the budget.
    """
    scores, cost, values = _score_units(task), cost_of(task.axes, task.budget), {}
    for key, losses in scores.values.items():
        axis = task.axes[key]
        least = min(axis.least, axis.size - 1)
        values[key] = losses * (axis.size - least) / max(1, cost.total - cost({key: least}))
    return replace(scores, values=values, metric=f"{scores.metric}/cost")
