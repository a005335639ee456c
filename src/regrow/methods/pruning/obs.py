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

import torch
from torch import Tensor, nn

from regrow.core.scores import Need, Scores, Statistics
from regrow.data.batch_streams import join_sources
from regrow.methods.pruning.pruner import Pruner, PruningTask, simple_pruner
from regrow.scoring.grams import MAX_BATCH_WINDOWS, Gram, linear_readers, sum_products
from regrow.scoring.metrics import energy, moments_of, wifv
from regrow.scoring.spaces import z_scores
from regrow.settings.constraints import CheckedSettings, OneOf, Positive

CITATION = (
    "Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NIPS 1992; for units as "
    "in Kurtic et al., ZipLM, NeurIPS 2023, arXiv:2302.04089"
)

PART = 128  # of the units that are left, 1 / PART is eliminated in a step, where a unit is a single channel
TIE = 1e-12  # the fraction by which a unit scores higher than the one removed before it, if both add the same error
# What is added to the diagonal, as a fraction of its mean, so that inputs that are always 0 can be solved for.
NEVER = 1e-9
WIDE = 4  # how many times as many candidates as eliminated units are updated exactly in a step


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``obs``: the ridge, allocation, unpruned blocks and compensation.

    Args:
        ridge: The ridge of the least squares, as a fraction of each input's Σ x². Removing one of two units that cancel
            costs about 2 · ridge times its energy, so that a large ridge keeps them.
        allocation: ``uniform``: the same fraction of each axis; ``ranked``: one ranking of z-scores.
        compensate: Whether the mean of dropped inputs is added to biases.
        prune_outer: Whether the first eighth and the last sixteenth of the blocks are pruned, too.
    """

    ridge: Positive = 0.001
    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = True
    prune_outer: bool = True


def build(settings: Settings) -> Pruner:
    """Return the pruner that removes units in the order of their second-order cost."""
    needs, score = {Need.WEIGHTS, Need.ACTIVATIONS}, partial(_score_units, settings=settings)
    return replace(simple_pruner("obs", settings, needs, score, settings.prune_outer), products=True)


def _score_units(task: PruningTask, settings: Settings) -> Scores:
    """Return scores in the order of :func:`order_layers`; on other axes, the error if one unit alone is removed."""
    pooled = task.evidence.pooled()
    orders = order_layers(task, pooled, ridge=settings.ridge, centre=settings.compensate)
    others = [axis for axis in task.units if axis.key not in orders]
    score_alone = wifv if settings.compensate else energy
    values = dict(score_alone(task.weights, task.axes, pooled, units=others).values) if others else {}
    values |= {key: order.scores() for key, order in orders.items()}
    values = {axis.key: values[axis.key] for axis in task.units if axis.key in values}
    scores = Scores(values, "obs", task.evidence.sources, pooled.tokens)
    return z_scores(scores) if settings.allocation == "ranked" else scores


@dataclass(frozen=True)
class Elimination:
    """The order in which the units of a layer are removed, and the error that each removal adds."""

    order: Tensor  # the units, first removed first, [size] int64
    losses: Tensor  # what each removal adds to the squared change of the layer's output, [size] float64

    def scores(self) -> Tensor:
        """Return each unit's score, ``[size]``: the error that its removal adds, at least what earlier ones added.

        A unit that is removed later has a higher score, if only by rounding, so that scores keep the order.

        >>> scores = Elimination(torch.tensor([2, 1, 0]), torch.tensor([0.5, 3.0, 2.0])).scores()
        >>> [round(float(score), 6) for score in scores], bool(scores[1] < scores[0])
        ([3.0, 3.0, 0.5], True)
        """
        ascending = self.losses.double().cummax(0).values
        ascending = ascending * (1 + TIE * torch.arange(len(ascending), dtype=torch.float64))
        return torch.zeros_like(ascending).index_put((self.order,), ascending)


def eliminate(gram: Tensor, weight: Tensor, channels: Tensor, ridge: float) -> Elimination:
    """Return the order in which the units of a linear layer are removed, each time the one whose removal costs least.

    With H = Σ x xᵀ + ridge · diag(Σ x xᵀ), removing the channels u costs tr(W_u ((H⁻¹)_uu)⁻¹ W_uᵀ), after the
    other columns of W have been changed by −W_u ((H⁻¹)_uu)⁻¹ (H⁻¹)_u: units that others can stand in for cost little.
    Single channels are removed in small groups, within which the order is exact among the candidates.

    ``gram`` is Σ x xᵀ ``[k, k]``, with means subtracted where a bias makes up for these; ``weight`` is ``[out, k]``;
    ``channels`` are the inputs of each unit ``[size, c]``; ``ridge``, above 0, is a fraction of each input's Σ x². They
    are not changed. Raise ValueError if inputs are not finite, all zero, or too closely dependent for the ridge.

    Source: Hassibi and Stork, Optimal Brain Surgeon (NIPS 1992); groups of weights as in ZipLM (arXiv 2302.04089).

    >>> x = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 4.0]])  # two inputs are equal
    >>> eliminate(x.T @ x, torch.tensor([[1.0, 2.0, 1.0]]), torch.tensor([[0], [1], [2]]), 1e-6).order.tolist()
    [0, 2, 1]
    """
    hessian = gram.to("cpu", torch.float64, copy=True)
    columns = weight.T.to("cpu", torch.float64, copy=True, memory_format=torch.contiguous_format)
    mean = hessian.diagonal().mean()
    if not bool(torch.isfinite(hessian).all()) or not mean > 0:
        raise ValueError("the inputs hold NaN or infinity, or none of them varies; check the data")
    hessian.diagonal().mul_(1 + ridge).add_(NEVER * mean)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise ValueError(f"the inputs depend on one another too closely for ridge {ridge:g}; give {10 * ridge:g}")
    inverse = torch.cholesky_inverse(factor)
    del hessian, factor
    if channels.shape[1] > 1:
        return _eliminate_groups(inverse, columns, channels)
    return _eliminate_channels(inverse, columns, channels[:, 0])


def _eliminate_groups(inverse: Tensor, columns: Tensor, channels: Tensor) -> Elimination:
    """Return the order of units that have several channels, removed exactly one at a time.

    ``inverse``: H⁻¹ ``[k, k]``; ``columns``: Wᵀ ``[k, out]``; both are changed. ``channels``: the
    inputs of each unit ``[size, c]``.
    """
    remaining, order, losses = list(range(len(channels))), [], []
    while remaining:
        costs = []
        for unit in remaining:
            inputs = channels[unit]
            part = columns[inputs]
            costs.append((part * torch.linalg.solve(inverse[inputs][:, inputs], part)).sum())
        best = min(range(len(remaining)), key=lambda i: float(costs[i]))
        unit = remaining.pop(best)
        order.append(unit)
        losses.append(costs[best])
        if remaining:
            _remove(inverse, columns, channels[unit])
    return Elimination(torch.tensor(order), torch.stack(losses))


def _remove(inverse: Tensor, columns: Tensor, channels: Tensor) -> None:
    """Remove channels (indices) from H⁻¹ and Wᵀ, in place, and adapt the others; their own rows become invalid."""
    rows = inverse[channels]
    scaled = torch.linalg.solve(rows[:, channels], torch.cat([columns[channels], rows], 1))
    out = columns.shape[1]
    columns.addmm_(rows.T, scaled[:, :out], alpha=-1)
    inverse.addmm_(rows.T, scaled[:, out:], alpha=-1)


def _eliminate_channels(inverse: Tensor, columns: Tensor, channels: Tensor) -> Elimination:
    """As :func:`_eliminate_groups` for one channel per unit, ``channels`` ``[size]``, removed in small groups."""
    units = torch.arange(len(channels))  # those whose rows the tensors hold
    if not torch.equal(channels, torch.arange(len(inverse))):
        inverse, columns = inverse[channels][:, channels], columns[channels]
    removed = torch.zeros(len(units), dtype=torch.bool)
    order: list[Tensor] = []
    losses: list[Tensor] = []
    remaining = len(units)
    while True:
        count = max(1, remaining // PART)
        costs = (columns.square().sum(1) / inverse.diagonal()).masked_fill(removed, torch.inf)
        candidates = costs.topk(min(remaining, WIDE * count), largest=False).indices.sort().values
        chosen, added = _order_candidates(inverse[candidates][:, candidates], columns[candidates], count)
        rows = candidates[chosen]
        order.append(units[rows])
        losses.append(added)
        remaining -= count
        if not remaining:
            return Elimination(torch.cat(order), torch.cat(losses))
        _remove(inverse, columns, rows)
        removed[rows] = True
        if 8 * remaining < 7 * len(units):  # an eighth of the rows is removed: copy the others
            stay = (~removed).nonzero()[:, 0]
            units, inverse, columns = units[stay], inverse[stay][:, stay], columns[stay]
            removed = torch.zeros(remaining, dtype=torch.bool)


def _order_candidates(inverse: Tensor, columns: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (indices of the ``count`` units whose removal, one after the other, costs least; these costs).

    Arguments as of :func:`_eliminate_groups`, but the rows of candidates alone; they are not changed.
    """
    inverse, columns, removed = inverse.clone(), columns.clone(), torch.zeros(len(inverse), dtype=torch.bool)
    order, costs = [], []
    for _ in range(count):
        all_costs = (columns.square().sum(1) / inverse.diagonal()).masked_fill(removed, torch.inf)
        best = int(all_costs.argmin())
        order.append(best)
        costs.append(all_costs[best])
        removed[best] = True
        row = inverse[best].clone()
        scale = row / row[best]
        columns -= torch.outer(scale, columns[best].clone())
        inverse -= torch.outer(scale, row)
        inverse.diagonal().masked_fill_(removed, 1.0)  # no division by 0
    return torch.tensor(order), torch.stack(costs)


def order_layers(task: PruningTask, pooled: Statistics, *, ridge: float, centre: bool) -> dict[str, Elimination]:
    """Return axis key → the order of :func:`eliminate`, for every axis that one linear layer reads.

    ``pooled``: the sums over all sources; ``centre``: whether a bias makes up for the means of dropped inputs. Other
    axes, and inputs that do not vary, have no entry. It runs the network on the data of ``task.evidence``.
    Raise ValueError if there are none, or as :func:`eliminate` does.
    """
    parameters = dict(task.model.named_parameters(remove_duplicate=False))
    recurrent = [module for module in task.model.modules() if isinstance(module, nn.RNNBase | nn.RNNCellBase)]
    inside = {id(weight) for module in recurrent for weight in module.parameters(recurse=False)}  # cannot be watched
    layers = {
        name: reader
        for name, reader in linear_readers(task.axes, task.units).items()
        if id(parameters[name]) not in inside
        and len(moments_of(pooled, name).total) == reader.width
        and float(pooled.moments[name].variance.sum()) > 0
    }
    result: dict[str, Elimination] = {}

    def order(name: str, gram: Gram) -> None:
        task.context.progress(len(result), len(layers), "ordering the units of layers")
        reader, weight = layers[name], task.weights[name].detach()
        rows = weight if reader.slot.dim else weight.T
        products, channels = gram.mean_products(centre=centre), reader.positions(reader.width)
        try:
            result[reader.axis] = eliminate(products, rows, channels, ridge)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    batches = join_sources(task.evidence.data.values(), MAX_BATCH_WINDOWS)
    if layers and not len(batches):
        raise ValueError("this method reads the data itself, got none; give Evidence with data=")
    widths = {name: reader.width for name, reader in layers.items()}
    sum_products(task.model, widths, batches, order, task.context.block_runner)
    return result
