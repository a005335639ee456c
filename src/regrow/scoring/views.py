"""Scores, ranks and sensitivity from all sources together, and with each source left out in turn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from regrow.core.scores import Scores, Statistics, merged
from regrow.scoring.sensitivity import Ranks, Sensitivity, ranks, sensitivity
from regrow.scoring.spaces import Space

Score = Callable[[Statistics], Scores]


@dataclass(frozen=True)
class View:
    """Scores, ranks and sensitivity of units, computed from a given set of sources.

    Args:
        pooled: The statistics of the sources, summed.
        scores: The scores by the pooled statistics.
        ranks: The ranks on each source and shard.
        spread: How much the ranks differ between the sources.
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
    without_each: bool = True,
) -> Iterator[View]:
    """Yield the view of all sources, then (with ``without_each``) one view with each source left out.

    A decision made without a source can be evaluated on that source as an unseen text domain.

    Args:
        statistics: Source → the statistics of its shards; at least 2 sources, 3 to leave one out.
        score: Function from statistics to scores.
        among: The ranking spaces: which units are ranked against each other.
        without_each: Also yield a view without each source.
    """
    rows = {name: (score(merged(shards)), [score(one) for one in shards]) for name, shards in statistics.items()}
    for left_out in (None, *(rows if without_each else ())):
        names = [name for name in rows if name != left_out]
        pooled = merged([shard for name in names for shard in statistics[name]])
        ranking = ranks({name: rows[name] for name in names}, among)
        yield View(pooled, score(pooled), ranking, sensitivity(ranking))
