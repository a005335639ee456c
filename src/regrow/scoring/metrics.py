"""Importance metrics: functions from weights and, where they need them, statistics to scores per unit.

Every metric is called with (weights, axes, statistics, *, units), units being ``axes.units()`` unless given. With
``statistics=None`` it gives its score from weights alone, so that a method can wrap any of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from regrow.core.axes import Axis, AxisGraph, Role
from regrow.core.scores import Moments, Need, Scores, Statistics, Tensors
from regrow.scoring.spaces import OUTER_BLOCKS, normalise, standardise
from regrow.scoring.weights import CachedColumns, Reader, columns, readers, scorable, tensors

Units = Sequence[Axis] | None
SHARE = 0.1  # the least fraction of its axis's total energy from which a unit is called massive
FEWEST = 16  # axes with fewer units are not searched for massive ones: a large fraction is nothing special there


def wanda_sp(
    weights: Tensors, axes: AxisGraph, statistics: Statistics | None, *, units: Units = None, pool: str = "sum"
) -> Scores:
    """Score units by structured Wanda: mean absolute weight of an input channel × RMS of its activations.

    Source: Sun et al., Wanda (arXiv 2306.11695); its structured form in the code of FLAP (arXiv 2312.11983).
    """
    reads = readers(axes, scorable(axes, units))
    channels = _score_channels(weights, reads, statistics, "mean", lambda m: (m.square / m.count).sqrt())
    return _finish("wanda_sp", to_units(channels, reads, pool), statistics)


def wifv(
    weights: Tensors,
    axes: AxisGraph,
    statistics: Statistics | None,
    *,
    units: Units = None,
    form: str = "token",
    pool: str = "sum",
    square_blocks: bool = False,
) -> Scores:
    """Score units by FLAP's weighted input feature variance, Var(x_j) · ‖W_j‖₂² per input channel j.

    It estimates the output energy that is lost if channel j is replaced by its mean. The paper's variance is over
    per-sequence *means* (``form="sequence"``), its code's over *positions* (``form="token"``).

    Source: An et al., Fluctuation-based Adaptive Structured Pruning (arXiv 2312.11983), paper and code.
    """

    def factor(moments: Moments) -> Tensor:
        return moments.variance if form == "token" else moments.sequence_variance

    reads = readers(axes, scorable(axes, units))
    channels = _score_channels(weights, reads, statistics, "square", factor)
    return _finish(f"wifv/{form}", to_units(channels, reads, pool, square_blocks=square_blocks), statistics)


def energy(weights: Tensors, axes: AxisGraph, statistics: Statistics, *, units: Units = None) -> Scores:
    """Score units by the energy that they add to their layer's output, E[x_j²] · ‖W_j‖₂² per input channel j."""
    reads = readers(axes, scorable(axes, units))
    channels = _score_channels(weights, reads, statistics, "square", lambda m: m.square / m.count)
    return _finish("energy", to_units(channels, reads), statistics)


def fisher(weights: Tensors, axes: AxisGraph, statistics: Statistics | None, *, units: Units = None) -> Scores:
    """Score units by the Fisher information of their masks, ½ · mean over tokens of (Σ x · ∂L/∂x)².

    That is the increase of the loss per token, to second order, if the unit's output were 0. Without data: ‖W_j‖₂².

    Source: Theis et al., Fisher pruning (arXiv 1801.05787); masks of Transformers: Kwon et al. (arXiv 2204.09656).
    """
    chosen = scorable(axes, units)
    if statistics is None:
        reads = readers(axes, chosen)
        return _finish("fisher", to_units(_score_channels(weights, reads, None, "square"), reads), None)
    if missing := next((axis.key for axis in chosen if axis.key not in statistics.fisher), ""):
        raise ValueError(
            f"source {statistics.source!r} never reached the units of {missing!r}; give more batches, or leave them "
            f"out (--exclude {missing.partition(':')[0]})"
        )
    tokens = max(statistics.tokens, 1)
    return _finish("fisher", {axis.key: statistics.fisher[axis.key] / (2 * tokens) for axis in chosen}, statistics)


def taylor(
    weights: Tensors, axes: AxisGraph, statistics: Statistics | None, *, units: Units = None, form: str = "element1"
) -> Scores:
    """Score units by first-order Taylor importance: the estimated change of the loss if the unit were removed.

    ``element1``: Σ abs(w · g) over the unit's parameters; ``vector``: Σ over its channels of abs(Σ w · g), with g the
    gradient of the mean loss. Without statistics: Σ w². Source: Ma et al., LLM-Pruner (arXiv 2305.11627), code.
    """
    values: dict[str, Tensor] = {}
    for axis in scorable(axes, units):
        total = torch.zeros(axis.size, dtype=torch.float64)
        for name, slot, where in tensors(axes, axis, weights):
            weight = weights[name].detach().double()
            if statistics is None:
                product = weight.square()
            elif name in statistics.gradients:
                product = weight * statistics.gradients[name].to(weight) / max(statistics.tokens, 1)
            else:
                raise ValueError(f"source {statistics.source!r} gave no gradient for the parameter {name!r}")
            rest = [dim for dim in range(weight.dim()) if dim != slot.dim]
            product = product.abs() if form == "element1" else product
            channels = (product.sum(rest) if rest else product).abs().cpu()
            total += channels[where].sum(1)
        values[axis.key] = total
    return _finish(f"taylor/{form}", values, statistics)


def magnitude(
    weights: Tensors,
    axes: AxisGraph,
    statistics: Statistics | None = None,
    *,
    units: Units = None,
    form: str = "columns",
) -> Scores:
    """Score units by the norm of their weights; needs no data.

    ``columns``: Σ over the unit's input channels j of ‖W_j‖₂, over all weights that read it (FLAP's code, "mag-sp").
    ``group``: the root of Σ w² over every parameter entry the unit owns (Fang et al., DepGraph, arXiv 2301.12900).
    """
    values: dict[str, Tensor] = {}
    chosen = scorable(axes, units)
    if form == "columns":
        for reader in readers(axes, chosen):
            norms = columns(weights[reader.weight], reader.slot.dim, form="norm")
            values[reader.axis] = values.get(reader.axis, 0) + norms[reader.positions(len(norms))].sum(1)
    else:
        for axis in chosen:
            parts = tensors(axes, axis, weights)
            squares = [columns(weights[name], slot.dim)[where].sum(1) for name, slot, where in parts]
            values[axis.key] = torch.stack(squares).sum(0).sqrt()
    return _check(Scores(values, f"magnitude/{form}"))


def peak_to_peak(weights: Tensors, axes: AxisGraph, *, units: Units = None) -> Scores:
    """Score units by Σ over the matrices that produce them of (max W + abs(min W)) over the unit's rows."""
    values = {}
    for axis in scorable(axes, units):
        total = torch.zeros(axis.size, dtype=torch.float64)
        for name, slot, where in tensors(axes, axis, weights):
            weight = weights[name].detach()
            if slot.role is Role.PRODUCES and weight.dim() > 1:
                rest = [dim for dim in range(weight.dim()) if dim != slot.dim]
                total += (weight.amax(rest) + weight.amin(rest).abs()).double().cpu()[where].mean(1)
        values[axis.key] = total
    return _check(Scores(values, "path/peak-to-peak"))


def random(axes: AxisGraph, *, units: Units = None, seed: int = 0) -> Scores:
    """Score units by uniform random numbers, seeded by each axis's key, so the order of axes does not matter."""
    values = {}
    for axis in scorable(axes, units):
        number = int.from_bytes(sha256(f"{seed}:{axis.key}".encode()).digest()[:7])
        values[axis.key] = torch.rand(axis.size, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    return Scores(values, "random")


@dataclass(frozen=True)
class Base:
    """A pruning baseline that another method can wrap: its metric, allocation and protected blocks."""

    metric: Callable[..., Scores]
    need: Need  # what the metric has to be measured from, besides weights
    allocation: str  # its name in :data:`regrow.allocation.ranked.ALLOCATIONS`
    standardised: bool = False  # whether the metric pools channels to comparable scores; others are z-scored per axis
    spare: tuple[float, float] = (0.0, 0.0)  # the fractions of blocks, first and last, that are not pruned

    def score(self, weights: Tensors, axes: AxisGraph, statistics: Statistics | None, units: Sequence[Axis]) -> Scores:
        """Return scores that are comparable between axes; without statistics, scores by the weights alone."""
        if self.standardised:
            return self.metric(weights, axes, statistics, units=units, pool="standardised")
        return normalise(self.metric(weights, axes, statistics, units=units), "zscore")


# Name of a pruning method → the baseline that it is.
BASES: Mapping[str, Base] = {
    "flap": Base(wifv, Need.ACTIVATIONS, "ranked", standardised=True),
    "wanda_sp": Base(wanda_sp, Need.ACTIVATIONS, "uniform", standardised=True),
    "llm_pruner": Base(taylor, Need.GRADIENTS, "uniform", spare=OUTER_BLOCKS),
    "magnitude": Base(magnitude, Need.WEIGHTS, "uniform"),
    "fisher": Base(fisher, Need.FISHER, "uniform", spare=OUTER_BLOCKS),
}


@dataclass(frozen=True)
class Massive:
    """A unit with massive activations: its axis, its id, its fraction of the axis's energy, and over the median's."""

    axis: str
    unit: int
    share: float
    ratio: float


def massive(axes: AxisGraph, energy: Scores) -> list[Massive]:
    """Return the units with over a tenth of their axis's ``energy``, largest first (Sun et al., arXiv 2402.17762)."""
    result = []
    for key, values in energy.values.items():
        axis, total, middle = axes[key], float(values.sum()), float(values.median())
        if axis.size < FEWEST or total <= 0:
            continue
        for unit in (values > SHARE * total).nonzero().flatten().tolist():
            ratio = float(values[unit]) / middle if middle > 0 else float("inf")
            result.append(Massive(key, axis.ids[unit], float(values[unit]) / total, ratio))
    return sorted(result, key=lambda unit: -unit.share)


def moments_of(statistics: Statistics, weight: str) -> Moments:
    """Return the running sums of the inputs of ``weight``; raise ValueError if no batch reached that weight."""
    if weight not in statistics.moments:
        raise ValueError(
            f"source {statistics.source!r} never reached the weight {weight!r}; give more batches, or leave it out "
            f"(--exclude {weight})"
        )
    return statistics.moments[weight]


def to_units(
    channels: Tensors, reads: Sequence[Reader], pool: str = "sum", *, square_blocks: bool = False
) -> dict[str, Tensor]:
    """Pool scores per input channel (weight → ``[C]`` float64) into one score per unit, axis key → ``[size]``.

    ``sum``: Σ over the unit's channels and the weights that read it. ``standardised`` (FLAP's AL-AM): each weight's
    channels are z-scored among themselves, then averaged, so that units of different layers can be ranked together;
    ``square_blocks`` squares those of units with several channels before.
    """
    parts: dict[str, list[Tensor]] = {}
    for reader in reads:
        scores = channels[reader.weight]
        where = reader.positions(len(scores))
        if pool == "standardised":
            scores = standardise(scores.square() if square_blocks and where.shape[1] > 1 else scores)
        each = scores[where]
        parts.setdefault(reader.axis, []).append(each.sum(1) if pool == "sum" else each.mean(1))
    stacked = {key: torch.stack(values) for key, values in parts.items()}
    return {key: values.sum(0) if pool == "sum" else values.mean(0) for key, values in stacked.items()}


def _score_channels(
    weights: Tensors,
    reads: Sequence[Reader],
    statistics: Statistics | None,
    form: str,
    factor: Callable[[Moments], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return a norm of each input channel of the weights, times a factor from its moments, weight → ``[C]`` float64."""
    cached = weights if isinstance(weights, CachedColumns) else CachedColumns(weights)
    channels: dict[str, Tensor] = {}
    for reader in reads:
        weight, dim = reader.weight, reader.slot.dim
        if statistics is None or factor is None:
            channels[weight] = cached.columns(weight, dim, form=form)
        elif weight not in channels:
            activations = factor(moments_of(statistics, weight)).cpu()
            channels[weight] = activations * cached.columns(weight, dim, len(activations) // reader.width, form=form)
    return channels


def _finish(name: str, values: Tensors, statistics: Statistics | None) -> Scores:
    if statistics is None:
        return _check(Scores(values, f"{name}/weight-only"))
    return _check(Scores(values, name, tuple(dict.fromkeys(statistics.source.split("+"))), statistics.tokens))


def _check(scores: Scores) -> Scores:
    """Return the scores unchanged, or raise ValueError, with the axis, if one of them is NaN or infinite."""
    for key, values in scores.values.items():
        if bad := int((~torch.isfinite(values)).sum()):
            raise ValueError(
                f"{scores.metric} of {key!r}: {bad} of {len(values)} scores are not finite; its weights or inputs "
                "hold NaN or infinity"
            )
    return scores
