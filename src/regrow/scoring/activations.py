"""Scores from what the weights were fed: Wanda-sp and FLAP's fluctuation (WIFV).

Each is a product of a factor of the activations and a factor of the weights, per input channel of each weight that
reads the axis. With ``statistics=None`` the activations' factor is 1: the weight-only factor of the same metric.
A unit's score is the sum over its channels and over all weights that read it (or their standardised mean).
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from regrow.axes import Axis, AxisGraph
from regrow.scores import Moments, Scores, Statistics
from regrow.scoring.combine import to_units
from regrow.scoring.weights import check_scores, columns, readers, scorable


def wanda_sp(
    weights: Mapping[str, Tensor],
    axes: AxisGraph,
    statistics: Statistics | None,
    *,
    units: Sequence[Axis] | None = None,
    pool: str = "sum",
) -> Scores:
    """Structured Wanda: mean_i abs(W_ij) · rms(x_j).

    The original multiplies by the root of the mean over sequences of Σ_t x²; ours by the root mean square over
    positions: the same up to one constant for equally long sequences, and comparable between sources.

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        statistics: Input moments; ``None`` gives the weight-only factor mean_i abs(W_ij).
        units: The axes to score; ``axes.units()`` if none are named.
        pool: How channels become units: ``"sum"`` (as the original does for heads) or ``"standardised"``.

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
    """FLAP's weighted input feature variance: Var(x_j) · ‖W_j‖₂².

    What would be lost if channel j were replaced by its mean. The paper's variance is over per-sequence *means*
    (``form="sequence"``), its code's over *positions* (``form="token"``, up to the constant sequence length).
    Left out of the original: its first sequence is dropped and its running mean is updated before it is used.

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        statistics: Input moments; ``None`` gives the weight-only factor ‖W_j‖₂².
        units: The axes to score; ``axes.units()`` if none are named.
        form: ``"token"`` or ``"sequence"``.
        pool: ``"sum"``, or ``"standardised"``: channels z-scored per weight, then averaged (FLAP's AL-AM).
        square_blocks: FLAP's code squares the attention scores, not the MLP's, before it standardises them; this does
            so for every unit with several channels.

    Source: An et al., Fluctuation-based Adaptive Structured Pruning (arXiv 2312.11983), paper and code.
    """
    if form not in ("token", "sequence"):
        raise ValueError(f"wifv has the forms 'token' and 'sequence'; got {form!r}")
    factor = (lambda m: m.variance) if form == "token" else (lambda m: m.sequence_variance)
    return _scores((f"wifv/{form}", "square", factor), weights, axes, statistics, units, pool, square_blocks)


def energy(
    weights: Mapping[str, Tensor], axes: AxisGraph, statistics: Statistics, *, units: Sequence[Axis] | None = None
) -> Scores:
    """What a channel adds to its layer's output: E[x_j²] · ‖W_j‖₂².

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        statistics: Input moments.
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
    chosen = scorable(axes, units)
    reads = readers(axes, chosen)
    channels: dict[str, Tensor] = {}
    widths: dict[str, int] = {}
    for reader in reads:
        weight = weights[reader.weight]
        widths[reader.weight] = weight.shape[reader.slot.dim]
        if statistics is None:
            channels[reader.weight] = columns(weight, reader.slot.dim, form=form)
        elif reader.weight not in channels:
            activations = factor(moments_of(statistics, reader.weight)).cpu()
            groups = len(activations) // widths[reader.weight]
            channels[reader.weight] = activations * columns(weight, reader.slot.dim, groups, form=form)
    values = to_units(channels, widths, reads, pool, square_blocks=square_blocks)
    if statistics is None:
        return check_scores(Scores(values, f"{name}/weight-only"))
    sources = tuple(dict.fromkeys(statistics.source.split("+")))
    return check_scores(Scores(values, name, sources, statistics.tokens))


def moments_of(statistics: Statistics, weight: str) -> Moments:
    """The input moments of a weight.

    Raises:
        ValueError: If the source never reached it.
    """
    if weight not in statistics.moments:
        raise ValueError(
            f"source {statistics.source!r} never reached the weight {weight!r}; give more batches, or leave it out "
            f"(--exclude {weight})"
        )
    return statistics.moments[weight]
