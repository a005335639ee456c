"""OBS: cut the units without which the others, refitted by least squares, come closest to the dense layer's output.

Optimal Brain Surgeon for units: after each removal the cost of all others changes, so of two units that stand in for
each other one goes and one stays. The order and its costs follow from the sums of products of a layer's inputs in the
dense network. Units that one linear layer reads are ordered so; others by the error of removing each alone. The weights
that stay are changed by ``--reconstruct``, not here; dropped inputs are replaced by their mean unless switched off.
Unlike ZipLM and SlimGPT: inputs of the dense network, and a ridge that is a fraction of each input's sum of squares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from regrow import scoring
from regrow.data.joined import join_batches
from regrow.evidence import Need
from regrow.methods.pruning.pruner import Pruner, PruningTask, one_score
from regrow.scores import Scores
from regrow.scoring.activations import energy
from regrow.scoring.grams import Gram, linear_readers, sum_products
from regrow.scoring.second_order import eliminate
from regrow.scoring.weights import Reader
from regrow.settings.constraints import OneOf, Range, check_constraints

CITATION = (
    "Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NIPS 1992; for units as "
    "in Kurtic et al., ZipLM, NeurIPS 2023, arXiv:2302.04089"
)
BATCH = 8
"""The most windows that run at a time."""


@dataclass(frozen=True)
class Settings:
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

    ridge: Annotated[float, Range(0, above=True)] = 0.001
    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = True
    spare_first: Annotated[float, Range(0, 1, below=True)] = 0.0
    spare_last: Annotated[float, Range(0, 1, below=True)] = 0.0
    minimum: Annotated[int, Range(1)] = 1

    def __post_init__(self) -> None:
        check_constraints(self)


def build(settings: Settings) -> Pruner:
    """Return the pruner that removes units in the order of their second-order cost.

    Args:
        settings: Its settings.
    """
    spare = settings.spare_first, settings.spare_last
    needs = {Need.WEIGHTS, Need.ACTIVATIONS}
    pruner = one_score("obs", settings, needs, partial(_score, settings=settings), spare)
    return replace(pruner, products=True)


def _score(task: PruningTask, settings: Settings) -> Scores:
    pooled, compensate = task.evidence.pooled(), settings.compensate
    shapes = {name: one.shape for name, one in task.model.named_parameters()}
    layers = _linear_readers(task, shapes)
    rest = [axis for axis in task.units if all(reader.axis != axis.key for reader in layers.values())]
    alone = scoring.wifv if compensate else energy
    values = dict(alone(task.weights, task.axes, pooled, units=rest).values) if rest else {}
    batches = [batch for source in task.evidence.data.values() for batch in join_batches(source, BATCH)]
    widths = {name: shapes[name][reader.slot.dim] for name, reader in layers.items()}
    ordered = 0

    def order(name: str, gram: Gram) -> None:
        nonlocal ordered
        task.progress(ordered, len(widths), "ordering the units of layers")
        reader, weight = layers[name], task.weights[name].detach()
        channels = reader.positions(widths[name], widths[name])
        rows = weight if reader.slot.dim else weight.T
        products = gram.mean_products(centre=compensate)
        values[reader.axis] = eliminate(products, rows, channels, settings.ridge).scores()
        ordered += 1

    sum_products(task.model, widths, batches, order, task.visits)
    values = {axis.key: values[axis.key] for axis in task.units if axis.key in values}
    scores = Scores(values, "obs", task.evidence.sources, pooled.tokens)
    return scoring.normalise(scores, "zscore" if settings.allocation == "ranked" else "none")


def _linear_readers(task: PruningTask, shapes: Mapping[str, Sequence[int]]) -> dict[str, Reader]:
    """Return name of a weight → the axis that it alone reads, for linear layers with inputs that vary."""
    moments = task.evidence.pooled().moments
    return {
        name: reader
        for name, reader in linear_readers(task.axes, task.units, shapes).items()
        if len(moments[name].total) == shapes[name][reader.slot.dim] and float(moments[name].variance.sum()) > 0
    }
