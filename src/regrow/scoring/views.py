"""Views: what all sources show, and what they show without each of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from regrow.scores import Scores, Statistics, merged
from regrow.scoring.sensitivity import Ranks, Sensitivity, ranks, sensitivity
from regrow.scoring.spaces import Space

Score = Callable[[Statistics], Scores]


@dataclass(frozen=True)
class View:
    """What some sources show together.

    Args:
        pooled: Their sums.
        scores: The scores on all of them.
        ranks: The ranks on each.
        spread: How far these differ.
    """

    pooled: Statistics
    scores: Scores
    ranks: Ranks
    spread: Sensitivity


def views(
    statistics: Mapping[str, Sequence[Statistics]],
    score: Score,
    among: Sequence[Space],
    *,
    scale: str = "raw",
    denoise: bool = False,
    without_each: bool = True,
) -> Iterator[View]:
    """The view of all sources, then (with ``without_each``) without the first, the second, and so on.

    What is decided without a source can be judged on it as on a kind of text that was never seen.

    Args:
        statistics: Source → the sums of its shards; at least 2 sources, 3 to leave one out.
        score: Statistics → scores.
        among: Which units are ranked against each other.
        scale: Of the ranks, as in :func:`regrow.scoring.sensitivity.ranks`.
        denoise: As in :func:`regrow.scoring.sensitivity.sensitivity`.
        without_each: Leave each source out in turn, too.
    """
    rows = {name: (score(merged(shards)), [score(one) for one in shards]) for name, shards in statistics.items()}
    for left_out in (None, *(rows if without_each else ())):
        names = [name for name in rows if name != left_out]
        pooled = merged([shard for name in names for shard in statistics[name]])
        found = ranks({name: rows[name] for name in names}, among, scale)
        yield View(pooled, score(pooled), found, sensitivity(found, denoise=denoise))


def halves(
    statistics: Mapping[str, Sequence[Statistics]], score: Score
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None:
    """The scores on two halves of the shards of every source; ``None`` if they have one shard."""
    parts = [[shard for shards in statistics.values() for shard in shards[i::2]] for i in (0, 1)]
    return (score(merged(parts[0])).values, score(merged(parts[1])).values) if parts[1] else None
