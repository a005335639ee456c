"""OBS: cut the units without which the others, refitted by least squares, come closest to the dense layer's output.

Optimal Brain Surgeon for units: after each removal the cost of all others changes, so of two units that stand in for
each other one goes and one stays. The order and its costs follow from the sums of products of a layer's inputs in the
dense network. Units that one linear layer reads are ordered so; others by the error of removing each alone. The weights
that stay are changed by ``--reconstruct``, not here; dropped inputs are replaced by their mean unless switched off.
Unlike ZipLM and SlimGPT: inputs of the dense network, and a ridge that is a fraction of each input's sum of squares.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from regrow.core.scores import Need, Scores
from regrow.methods.pruning.layer_orders import order_layers
from regrow.methods.pruning.pruner import Pruner, PruningTask, one_score
from regrow.scoring.metrics import energy, wifv
from regrow.scoring.spaces import normalise
from regrow.settings.constraints import CheckedSettings, Count, FractionBelowOne, OneOf, Positive

CITATION = (
    "Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NIPS 1992; for units as "
    "in Kurtic et al., ZipLM, NeurIPS 2023, arXiv:2302.04089"
)


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``obs``: the ridge, allocation, unpruned blocks and compensation.

    Args:
        ridge: The ridge of the least squares, as a fraction of each input's Σ x². Removing one of two units that cancel
            costs about 2 · ridge times its energy, so that a large ridge keeps them.
        allocation: ``uniform``: the same fraction of each axis; ``ranked``: one ranking of z-scores.
        compensate: Whether the mean of dropped inputs is added to biases.
        spare_first: The fraction of the numbered blocks, at the beginning, that is not pruned.
        spare_last: The fraction of the numbered blocks, at the end, that is not pruned.
        minimum: The smallest number of units that stay in an axis.
    """

    ridge: Positive = 0.001
    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = True
    spare_first: FractionBelowOne = 0.0
    spare_last: FractionBelowOne = 0.0
    minimum: Count = 1


def build(settings: Settings) -> Pruner:
    """Return the pruner that removes units in the order of their second-order cost."""
    needs, spare = {Need.WEIGHTS, Need.ACTIVATIONS}, (settings.spare_first, settings.spare_last)
    return replace(one_score("obs", settings, needs, partial(_score, settings=settings), spare), products=True)


def _score(task: PruningTask, settings: Settings) -> Scores:
    pooled = task.evidence.pooled()
    orders = order_layers(task, pooled, ridge=settings.ridge, centre=settings.compensate)
    others = [axis for axis in task.units if axis.key not in orders]
    alone = wifv if settings.compensate else energy
    values = dict(alone(task.weights, task.axes, pooled, units=others).values) if others else {}
    values |= {key: order.scores() for key, order in orders.items()}
    values = {axis.key: values[axis.key] for axis in task.units if axis.key in values}
    scores = Scores(values, "obs", task.evidence.sources, pooled.tokens)
    return normalise(scores, "zscore" if settings.allocation == "ranked" else "none")
