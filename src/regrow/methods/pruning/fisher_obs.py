"""Fisher OBS: cut the units that raise the loss least if the others, refitted by least squares, stand in for them.

Fisher information says how much the loss depends on a unit, but not whether other units can stand in for it; the error
that Optimal Brain Surgeon leaves in a layer's output says that, but not how much the loss depends on this output. Here
units are removed one after the other as in ``obs``, and the error of each counts as much as it raises the loss: it is
multiplied by the unit's Fisher information and divided by E[x²] ‖W‖², the error if its output were 0. Units that one
linear layer reads are ordered so; others by their Fisher information. The weights that stay are changed by
``--reconstruct``, not here.

Whether the first and last blocks are pruned, too, is decided by the loss on calibration data before any refit.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated

import torch

from regrow.allocation.ranked import uniform
from regrow.core.scores import Need, Scores
from regrow.methods.pruning.compared_allocations import choose_allocation, uniform_candidates
from regrow.methods.pruning.layer_orders import order_layers
from regrow.methods.pruning.pruner import Pruner, PruningTask, Ranking, pooled_means
from regrow.scoring.metrics import energy, fisher
from regrow.scoring.spaces import OUTER_BLOCKS
from regrow.settings.constraints import Count, FractionBelowOne, OneOf, Positive, check_constraints

CITATION = (
    "Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NIPS 1992; Theis et al., "
    "Faster gaze prediction with dense networks and Fisher pruning, 2018, arXiv:1801.05787; the combination is ours"
)


@dataclass(frozen=True)
class Settings:
    """Settings of ``fisher_obs``: the ridge, unpruned blocks and compensation.

    Args:
        ridge: The ridge of the least squares, as a fraction of each input's Σ x². Removing one of two units that cancel
            costs about 2 · ridge times its energy, so that a large ridge keeps them.
        spare: ``measured``: the first and last blocks stay unpruned unless the cut network has a lower loss on
            2,000 labels of each source if they are pruned, too; ``always``; ``never``.
        compensate: Whether the mean of dropped inputs is added to biases.
        spare_first: The fraction of the numbered blocks, at the beginning, that may stay unpruned.
        spare_last: The fraction of the numbered blocks, at the end, that may stay unpruned.
        minimum: The smallest number of units that stay in an axis.
    """

    ridge: Positive = 0.001
    spare: Annotated[str, OneOf("measured", "always", "never")] = "measured"
    compensate: bool = True
    spare_first: FractionBelowOne = OUTER_BLOCKS[0]
    spare_last: FractionBelowOne = OUTER_BLOCKS[1]
    minimum: Count = 1

    def __post_init__(self) -> None:
        check_constraints(self)
        for name, default in (("spare_first", OUTER_BLOCKS[0]), ("spare_last", OUTER_BLOCKS[1])):
            if self.spare == "never" and getattr(self, name) != default:
                raise ValueError(
                    f"spare=never prunes all blocks, got {name}={getattr(self, name):g}; leave {name} out, or give "
                    "spare=measured"
                )


def build(settings: Settings) -> Pruner:
    """Return the pruner that removes units in the order of the loss that their removal adds."""
    spare = settings.spare_first, settings.spare_last
    return Pruner(
        needs=frozenset({Need.WEIGHTS, Need.ACTIVATIONS, Need.FISHER}),
        score=partial(_score, settings=settings),
        allocate=partial(uniform, minimum=settings.minimum),
        compensate=pooled_means if settings.compensate else None,
        origin={"method": "fisher_obs", "settings": asdict(settings)},
        spare=spare if settings.spare == "always" else (0.0, 0.0),
        runs_network=settings.spare == "measured",
        products=True,
    )


def _score(task: PruningTask, settings: Settings) -> Ranking:
    pooled = task.evidence.pooled()
    alone = fisher(task.weights, task.axes, pooled, units=task.units)
    errors = energy(task.weights, task.axes, pooled, units=task.units).values
    rates = {key: torch.where(errors[key] > 0, loss / errors[key], 0.0) for key, loss in alone.values.items()}
    orders = order_layers(task, pooled, ridge=settings.ridge, centre=settings.compensate, rates=rates)
    values = {key: orders[key].scores() if key in orders else loss for key, loss in alone.values.items()}
    scores = Scores(values, "fisher_obs", alone.sources, alone.tokens)
    if settings.spare != "measured":
        return Ranking(scores)
    candidates = uniform_candidates(task, scores, (settings.spare_first, settings.spare_last), settings.minimum)
    return choose_allocation(task, candidates, compensate=settings.compensate)
