"""Combine scores: channels into units, and scores of several axes or several sources into comparable ones."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regrow.core.scores import Scores
from regrow.scoring.weights import Reader


def standardise(values: Tensor) -> Tensor:
    """Return z-scores, (v − mean) / standard deviation (``ddof = 1``); zeros where all values are equal.

    Args:
        values: ``[n]``.

    >>> standardise(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [-1.0, 0.0, 1.0]
    """
    if len(values) < 2 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    return (values - values.mean()) / values.std()


def percentile(values: Tensor) -> Tensor:
    """Return each value's percentile rank along the last dimension, (rank + ½) / n; ties share their mean.

    Args:
        values: ``[..., n]``.

    >>> percentile(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist()
    [0.5, 0.125, 0.5, 0.875]
    """
    order = values.sort(dim=-1).values
    below = torch.searchsorted(order, values.contiguous(), side="left")
    upto = torch.searchsorted(order, values.contiguous(), side="right")
    return (below + upto).double() / (2 * values.shape[-1])


def to_units(
    channels: Mapping[str, Tensor],
    widths: Mapping[str, int],
    reads: Sequence[Reader],
    pool: str = "sum",
    *,
    square_blocks: bool = False,
) -> dict[str, Tensor]:
    """Pool scores per input channel into one score per unit, over all weights that read the unit.

    ``sum``: Σ over the unit's channels and over the weights that read it. ``standardised`` (FLAP's AL-AM): each
    weight's channels are first z-scored among themselves, then averaged over the unit's channels and its weights, so
    that units of different layers and kinds can be ranked together.

    Args:
        channels: Weight → score per input channel, ``[C]`` float64.
        widths: Weight → its size in the contracted dimension.
        reads: The weights that read each axis, from :func:`regrow.scoring.readers`.
        pool: ``"sum"`` or ``"standardised"``, as above.
        square_blocks: Square the channel scores of units with several channels before they are standardised.

    Returns:
        Axis key → ``[size]`` float64.
    """
    if pool not in ("sum", "standardised"):
        raise ValueError(f"channels are pooled by 'sum' or 'standardised'; got {pool!r}")
    parts: dict[str, list[Tensor]] = {}
    for reader in reads:
        scores = channels[reader.weight]
        where = reader.positions(len(scores), widths[reader.weight])
        if pool == "sum":
            parts.setdefault(reader.axis, []).append(scores[where].sum(1))
        else:
            scores = standardise(scores.square() if square_blocks and where.shape[1] > 1 else scores)
            parts.setdefault(reader.axis, []).append(scores[where].mean(1))
    stacked = {key: torch.stack(values) for key, values in parts.items()}
    return {key: values.sum(0) if pool == "sum" else values.mean(0) for key, values in stacked.items()}


def normalise(scores: Scores, how: str) -> Scores:
    """Return scores made comparable between axes: z-scores, or unchanged.

    Args:
        scores: The scores of any metric.
        how: ``zscore``: (s − mean) / sd within the axis; ``none``: as they are.
    """
    kinds = {"zscore": standardise, "none": lambda values: values}
    if how not in kinds:
        raise ValueError(f"scores are normalised by {', '.join(kinds)}; got {how!r}")
    return Scores(
        {key: kinds[how](values) for key, values in scores.values.items()},
        scores.metric if how == "none" else f"{scores.metric}/{how}",
        scores.sources,
        scores.tokens,
        scores.notes,
    )
