"""Fisher pruning: cut the units whose masks have the least Fisher information, an estimate of the loss of a cut.

Like Kwon et al.: the squared gradient of a mask per unit, from one forward and one backward pass, without fine-tuning.
Unlike them: the gradient is taken per token, with labels that are drawn from the network's own predictions (there: per
example, with the labels of the data); their mask rearrangement and tuning are left out, and dropped inputs are replaced
by their mean unless switched off. The first eighth and the last sixteenth of the blocks are not pruned, as in
``llm_pruner``.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

from regrow import scoring
from regrow.allocation import cost_of, rank
from regrow.evidence import Need
from regrow.methods.pruning.compared import RANKED, allocate_alike, choose_allocation, describe_losses
from regrow.methods.pruning.pruner import Pruner, PruningTask, Ranking, one_score
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
            removed weight; ``measured``: ``uniform``, or all blocks so, or all blocks ``ranked``, whichever gives the
            cut network the lowest loss on two batches of each source.
        compensate: Whether the mean of dropped inputs is added to biases.
        spare_first: The fraction of the numbered blocks, at the beginning, that is not pruned (``measured``: may stay
            so).
        spare_last: The fraction of the numbered blocks, at the end, that is not pruned (``measured``: may stay so).
        minimum: The smallest number of units that stay in an axis.
    """

    allocation: Annotated[str, OneOf("uniform", "ranked", "measured")] = "uniform"
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
    spare, needs = (settings.spare_first, settings.spare_last), {Need.WEIGHTS, Need.FISHER}
    if settings.allocation == "measured":
        pruner = one_score("fisher", replace(settings, allocation="uniform"), needs, _score)
        origin = {"method": "fisher", "settings": asdict(settings)}
        return replace(pruner, score=partial(_compared, settings=settings), origin=origin, runs_network=True)
    score = partial(_score, per_weight=settings.allocation == "ranked")
    return one_score("fisher", settings, needs, score, spare)


def _compared(task: PruningTask, settings: Settings) -> Ranking:
    plain, per_weight = (_score(task, by) for by in (False, True))
    starts = allocate_alike(task, plain.values, (settings.spare_first, settings.spare_last), settings.minimum)
    starts |= {RANKED: partial(rank, task.axes, per_weight, task.budget, minimum=settings.minimum)}
    kept, losses = choose_allocation(task, starts, compensate=settings.compensate)
    scores = per_weight if losses and min(losses, key=losses.__getitem__) == RANKED else plain
    own = replace(
        scores, values={key: scores.values[key] for key in kept}, notes=(*scores.notes, *describe_losses(losses))
    )
    return Ranking(own, lambda _: {"starts": losses} if losses else {}, kept)


def _score(task: PruningTask, per_weight: bool = False) -> Scores:
    scores = scoring.fisher(task.weights, task.axes, task.evidence.pooled(), units=task.units)
    if not per_weight:
        return scores
    cost, values = cost_of(task.axes, task.budget), {}
    for key, own in scores.values.items():
        axis = task.axes[key]
        least = min(axis.least, axis.size - 1)
        values[key] = own * (axis.size - least) / max(1, cost.total - cost({key: least}))
    return Scores(values, f"{scores.metric}/cost", scores.sources, scores.tokens, scores.notes)
