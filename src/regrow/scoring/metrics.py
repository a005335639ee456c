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
from regrow.scoring.spaces import standardise, z_scores
from regrow.scoring.weights import Reader, axis_parameters, column_norms, readers, scorable_axes

Units = Sequence[Axis] | None  # the axes whose units are scored; `None`: `axes.units()`


def wanda_sp(
    weights: Tensors, axes: AxisGraph, statistics: Statistics | None, *, units: Units = None, pool: str = "sum"
) -> Scores:
    """Score units by structured Wanda: mean absolute weight of an input channel × RMS of its activations.

    ``weights``: name → parameter; ``units``: the axes; ``pool``: see :func:`pool_to_units`. Without statistics the RMS
    is taken as 1; ``ValueError`` if they lack a weight.

    Source: Sun et al., Wanda (arXiv 2306.11695); its structured form in the code of FLAP (arXiv 2312.11983).
    """
    reads = readers(axes, scorable_axes(axes, units))
    channels = _score_channels(weights, reads, statistics, "mean", lambda m: (m.square / m.count).sqrt())
    return _make_scores("wanda_sp", pool_to_units(channels, reads, pool), statistics)


def wifv(
    weights: Tensors, axes: AxisGraph, statistics: Statistics | None, *, units: Units = None, pool: str = "sum"
) -> Scores:
    """Score units by FLAP's weighted input feature variance, Var(x_j) · ‖W_j‖₂² per input channel j.

    It estimates the output energy that is lost if channel j is replaced by its mean. The variance is over positions, as
    in the paper's code; its text has per-sequence means. Without statistics it is taken as 1. ``weights``: name →
    parameter; ``units``: the axes; ``pool``: see :func:`pool_to_units`.

    Source: An et al., Fluctuation-based Adaptive Structured Pruning (arXiv 2312.11983), code.
    """
    reads = readers(axes, scorable_axes(axes, units))
    channels = _score_channels(weights, reads, statistics, "square", lambda moments: moments.variance)
    return _make_scores("wifv/token", pool_to_units(channels, reads, pool), statistics)


def energy(weights: Tensors, axes: AxisGraph, statistics: Statistics, *, units: Units = None) -> Scores:
    """Score units by the output energy of the layers that read them: Σ over input channels j of E[x_j²] · ‖W_j‖₂².

    ``weights``: name → parameter; ``units``: the axes, ``axes.units()`` if ``None``.
    """
    reads = readers(axes, scorable_axes(axes, units))
    channels = _score_channels(weights, reads, statistics, "square", lambda m: m.square / m.count)
    return _make_scores("energy", pool_to_units(channels, reads), statistics)


def fisher(weights: Tensors, axes: AxisGraph, statistics: Statistics | None, *, units: Units = None) -> Scores:
    """Score units by the Fisher information of their masks, ½ · mean over tokens of (Σ x · ∂L/∂x)².

    That is the increase of the loss per token, to second order, if the unit's output were 0. Without statistics:
    ‖W_j‖₂². ``weights``: name → parameter; ``units``: the axes; ``ValueError`` if statistics lack an axis.

    Source: Theis et al., Fisher pruning (arXiv 1801.05787); masks of Transformers: Kwon et al. (arXiv 2204.09656).
    """
    chosen = scorable_axes(axes, units)
    if statistics is None:
        reads = readers(axes, chosen)
        return _make_scores("fisher", pool_to_units(_score_channels(weights, reads, None, "square"), reads), None)
    if missing := next((axis.key for axis in chosen if axis.key not in statistics.fisher), ""):
        raise ValueError(
            f"source {statistics.source!r} never reached the units of {missing!r}; give more batches, or leave them "
            f"out (--exclude {missing.partition(':')[0]})"
        )
    tokens = max(statistics.tokens, 1)
    return _make_scores("fisher", {axis.key: statistics.fisher[axis.key] / (2 * tokens) for axis in chosen}, statistics)


def taylor(weights: Tensors, axes: AxisGraph, statistics: Statistics | None, *, units: Units = None) -> Scores:
    """Score units by first-order Taylor importance: the estimated change of the loss if the unit were removed.

    Σ abs(w · g) over the unit's parameters, with g the gradient of the mean loss. Without statistics: Σ w².
    ``weights``: name → parameter; ``units``: the axes; ``ValueError`` if statistics lack a gradient.

    Source: Ma et al., LLM-Pruner (arXiv 2305.11627), code ("element1").
    """
    values: dict[str, Tensor] = {}
    for axis in scorable_axes(axes, units):
        total = torch.zeros(axis.size, dtype=torch.float64)
        for name, slot, where in axis_parameters(axes, axis, weights):
            weight = weights[name].detach().double()
            if statistics is None:
                product = weight.square()
            elif name in statistics.gradients:
                product = weight * statistics.gradients[name].to(weight) / max(statistics.tokens, 1)
            else:
                raise ValueError(f"source {statistics.source!r} gave no gradient for the parameter {name!r}")
            rest = [dim for dim in range(weight.dim()) if dim != slot.dim]
            channels = product.abs().sum(rest) if rest else product.abs()
            total += channels.cpu()[where].sum(1)
        values[axis.key] = total
    return _make_scores("taylor/element1", values, statistics)


def magnitude(
    weights: Tensors, axes: AxisGraph, statistics: Statistics | None = None, *, units: Units = None
) -> Scores:
    """Score units by Σ over their input channels j of ‖W_j‖₂, for all weights that read them (FLAP's "mag-sp").

    ``weights``: name → parameter; ``units``: the axes; ``statistics`` are not used.
    """
    values: dict[str, Tensor] = {}
    for reader in readers(axes, scorable_axes(axes, units)):
        norms = column_norms(weights[reader.weight], reader.slot.dim, form="norm")
        values[reader.axis] = values.get(reader.axis, 0) + norms[reader.positions(len(norms))].sum(1)
    return _check_finite(Scores(values, "magnitude/columns"))


def peak_to_peak(weights: Tensors, axes: AxisGraph, *, units: Units = None) -> Scores:
    """Score units by Σ, over the matrices that produce them, of (max W + abs(min W)) of the unit's rows.

    ``weights``: name → parameter; ``units``: the axes, ``axes.units()`` if ``None``.
    """
    values = {}
    for axis in scorable_axes(axes, units):
        total = torch.zeros(axis.size, dtype=torch.float64)
        for name, slot, where in axis_parameters(axes, axis, weights):
            weight = weights[name].detach()
            if slot.role is Role.PRODUCES and weight.dim() > 1:
                rest = [dim for dim in range(weight.dim()) if dim != slot.dim]
                total += (weight.amax(rest) + weight.amin(rest).abs()).double().cpu()[where].mean(1)
        values[axis.key] = total
    return _check_finite(Scores(values, "path/peak-to-peak"))


def random(axes: AxisGraph, *, units: Units = None, seed: int = 0) -> Scores:
    """Score units of the axes ``units`` by uniform random numbers in [0, 1), seeded per axis by ``seed`` and key."""
    values = {}
    for axis in scorable_axes(axes, units):
        number = int.from_bytes(sha256(f"{seed}:{axis.key}".encode()).digest()[:7])
        values[axis.key] = torch.rand(axis.size, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    return Scores(values, "random")


@dataclass(frozen=True)
class Base:
    """A pruning baseline that another method can wrap: its metric, allocation and protected blocks."""

    metric: Callable[..., Scores]  # (weights, axes, statistics, *, units) → scores
    need: Need  # what the metric has to be measured from, besides weights
    allocation: str  # its name in :data:`regrow.allocation.ranked.ALLOCATIONS`
    standardised: bool = False  # whether the metric pools channels to comparable scores; others are z-scored per axis
    prune_outer: bool = True  # whether the first and last blocks are pruned, too

    def score(self, weights: Tensors, axes: AxisGraph, statistics: Statistics | None, units: Sequence[Axis]) -> Scores:
        """Return scores of ``units`` that are comparable between axes; ``statistics=None``: by weights alone."""
        if self.standardised:
            return self.metric(weights, axes, statistics, units=units, pool="standardised")
        return z_scores(self.metric(weights, axes, statistics, units=units))


# Name of a pruning method → the baseline that it is.
BASES: Mapping[str, Base] = {
    "flap": Base(wifv, Need.ACTIVATIONS, "ranked", standardised=True),
    "wanda_sp": Base(wanda_sp, Need.ACTIVATIONS, "uniform", standardised=True),
    "llm_pruner": Base(taylor, Need.GRADIENTS, "uniform", prune_outer=False),
    "magnitude": Base(magnitude, Need.WEIGHTS, "uniform"),
    "fisher": Base(fisher, Need.FISHER, "uniform", prune_outer=False),
}


def moments_of(statistics: Statistics, weight: str) -> Moments:
    """Return the running sums of the inputs of ``weight``; raise ``ValueError`` if no batch reached that weight."""
    if weight not in statistics.moments:
        raise ValueError(
            f"source {statistics.source!r} never reached the weight {weight!r}, or not by a linear layer; give more "
            f"batches, leave it out (--exclude {weight}), or take a method that reads no inputs (magnitude)"
        )
    return statistics.moments[weight]


def pool_to_units(channels: Tensors, reads: Sequence[Reader], pool: str = "sum") -> dict[str, Tensor]:
    """Pool scores per input channel (weight → ``[C]`` float64) into one score per unit, axis key → ``[size]``.

    ``pool`` is one of two. ``sum``: Σ over the unit's channels and the weights that read it. ``standardised`` (FLAP's
    AL-AM): each weight's channels are z-scored among themselves, then averaged, so that units of different layers can
    be ranked together.
    """
    parts: dict[str, list[Tensor]] = {}
    for reader in reads:
        scores = channels[reader.weight]
        where = reader.positions(len(scores))
        if pool == "standardised":
            scores = standardise(scores)
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
    """Return weight name → score per input channel, ``[C]`` float64: ``column_norms`` of a ``form`` times ``factor``.

    ``factor``: from the running sums of the inputs to a factor per channel; 1 without it or without statistics.
    """
    channels: dict[str, Tensor] = {}
    for reader in reads:
        if reader.weight in channels:
            continue
        weight, dim = weights[reader.weight], reader.slot.dim
        if statistics is None or factor is None:
            channels[reader.weight] = column_norms(weight, dim, form=form)
        else:
            activations = factor(moments_of(statistics, reader.weight)).cpu()
            norms = column_norms(weight, dim, len(activations) // reader.width, form=form)
            channels[reader.weight] = activations * norms
    return channels


def _make_scores(name: str, values: Tensors, statistics: Statistics | None) -> Scores:
    """Return values (axis key → ``[size]``) as scores of the metric ``name``; ``ValueError`` if one is not finite."""
    if statistics is None:
        return _check_finite(Scores(values, f"{name}/weight-only"))
    return _check_finite(Scores(values, name, tuple(dict.fromkeys(statistics.source.split("+"))), statistics.tokens))


def _check_finite(scores: Scores) -> Scores:
    """Return the scores unchanged, or raise ValueError, with the axis, if one of them is NaN or infinite."""
    for key, values in scores.values.items():
        if infinite := int((~torch.isfinite(values)).sum()):
            raise ValueError(
                f"{scores.metric} of {key!r}: {infinite} of {len(values)} scores are not finite; its weights or inputs "
                "hold NaN or infinity"
            )
    return scores
