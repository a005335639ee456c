"""Importance scores from activations: Wanda-sp, and the weighted input feature variance (WIFV) of FLAP.

Each multiplies a term from the activations by a term from the weights, for every input channel of every weight that
reads the axis. With ``statistics=None`` the activation term is 1: the score then follows from the weights alone.
A unit's score is the sum over its channels and over all weights that read it (or the mean of their z-scores).
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from regrow.core.axes import Axis, AxisGraph
from regrow.core.scores import Moments, Scores, Statistics
from regrow.scoring.combine import to_units
from regrow.scoring.weights import CachedColumns, check_scores, readers, scorable


def wanda_sp(
    weights: Mapping[str, Tensor],
    axes: AxisGraph,
    statistics: Statistics | None,
    *,
    units: Sequence[Axis] | None = None,
    pool: str = "sum",
) -> Scores:
    """Score units by structured Wanda: mean absolute weight of an input channel × RMS of its activations.

    The original multiplies by the root of the mean over sequences of Σ_t x²; ours by the root mean square over
    positions: the same up to one constant for equally long sequences, and comparable between sources.

    Args:
        weights: Parameter name → tensor, as :func:`regrow.scoring.weights_of` returns them.
        axes: The network's axes.
        statistics: Input moments of one or more sources; ``None`` scores by the weights alone, mean_i abs(W_ij).
        units: The axes to score; ``axes.units()`` if none are named.
        pool: How channel scores become unit scores: ``"sum"`` (as the original does for heads), or ``"standardised"``:
            channels z-scored per weight, then averaged.

    Source: Sun et al., Wanda (arXiv 2306.11695); its structured form in the code of FLAP (arXiv 2312.11983).
    """
    return _scores(
        ("wanda_sp", "mean", lambda m: (m.square / m.count).sqrt()), weights, axes, statistics, units, pool, False
    )


def wifv(
    weights: Mapping[str, Tensor],
    axes: AxisGraph,
    statistics: Statistics | None,
    *,
    units: Sequence[Axis] | None = None,
    form: str = "token",
    pool: str = "sum",
    square_blocks: bool = False,
) -> Scores:
    """Score units by FLAP's weighted input feature variance, Var(x_j) · ‖W_j‖₂² per input channel j.

    It estimates the output energy that is lost if channel j is replaced by its mean. The paper's variance is over
    per-sequence *means* (``form="sequence"``), its code's over *positions* (``form="token"``, up to the constant
    sequence length). Two quirks of that code are not reproduced: it drops its first sequence, and updates its running
    mean before using it.

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        statistics: Input moments of one or more sources; ``None`` scores by the weights alone, ‖W_j‖₂².
        units: The axes to score; ``axes.units()`` if none are named.
        form: What the variance is taken over: ``"token"`` (all positions) or ``"sequence"`` (the means of sequences).
        pool: ``"sum"``, or ``"standardised"``: channels z-scored per weight, then averaged (FLAP's AL-AM).
        square_blocks: Square the channel scores of units with several channels before they are z-scored. FLAP's code
            does this for attention heads, not for MLPs; this applies it to every unit with several channels.

    Source: An et al., Fluctuation-based Adaptive Structured Pruning (arXiv 2312.11983), paper and code.
    """
    if form not in ("token", "sequence"):
        raise ValueError(f"wifv has the forms 'token' and 'sequence'; got {form!r}")
    factor = (lambda m: m.variance) if form == "token" else (lambda m: m.sequence_variance)
    return _scores((f"wifv/{form}", "square", factor), weights, axes, statistics, units, pool, square_blocks)


def energy(
    weights: Mapping[str, Tensor], axes: AxisGraph, statistics: Statistics, *, units: Sequence[Axis] | None = None
) -> Scores:
    """Score units by the energy that they add to their layer's output, E[x_j²] · ‖W_j‖₂² per input channel j.

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        statistics: Input moments of one or more sources; required.
        units: The axes to score; ``axes.units()`` if none are named.

    Source: ours; it shows which units carry massive activations (Sun et al. 2024, arXiv 2402.17762).
    """
    return _scores(("energy", "square", lambda m: m.square / m.count), weights, axes, statistics, units, "sum", False)


def _scores(
    metric: tuple[str, str, Callable[[Moments], Tensor]],
    weights: Mapping[str, Tensor],
    axes: AxisGraph,
    statistics: Statistics | None,
    units: Sequence[Axis] | None,
    pool: str,
    square_blocks: bool,
) -> Scores:
    name, form, factor = metric
    cached = weights if isinstance(weights, CachedColumns) else CachedColumns(weights)
    chosen = scorable(axes, units)
    reads = readers(axes, chosen)
    channels: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    for reader in reads:
        weight, dim = reader.weight, reader.slot.dim
        if statistics is None:
            channels[weight] = cached.columns(weight, dim, form=form)
        elif weight not in channels:
            activations = factor(moments_of(statistics, weight)).cpu()
            channels[weight] = activations * cached.columns(weight, dim, len(activations), form=form)
        widths[weight] = cached.width(weight, dim)
    values = to_units(channels, widths, reads, pool, square_blocks=square_blocks)
    if statistics is None:
        return check_scores(Scores(values, f"{name}/weight-only"))
    sources = tuple(dict.fromkeys(statistics.source.split("+")))
    return check_scores(Scores(values, name, sources, statistics.tokens))


def moments_of(statistics: Statistics, weight: str) -> Moments:
    """Return the running sums of the inputs of ``weight``; raise ValueError if no batch reached that weight.

    Args:
        statistics: What was collected on a source.
        weight: The parameter name of the weight.

    Raises:
        ValueError: If the source never reached it.
    """
    if weight not in statistics.moments:
        raise ValueError(
            f"source {statistics.source!r} never reached the weight {weight!r}; give more batches, or leave it out "
            f"(--exclude {weight})"
        )
    return statistics.moments[weight]
