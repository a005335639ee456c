"""Make scores comparable: z-scores, ranks within spaces of units, and how much these vary between text domains."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regrow.core.axes import Axis
from regrow.core.scores import Scores, Tensors

Row = dict[str, str | int | float]  # a row of a table in a report: column → value

# Axes with fewer units than this are ranked together with others of their kind: three ranks say little.
MIN_RANKED_UNITS = 16
SHUFFLES = 20  # how often shards are shuffled for the null distribution of :func:`spectrum`
# The fractions of the blocks, at the beginning and at the end, that several methods leave unpruned.
OUTER_BLOCKS = (0.125, 0.0625)


def standardise(values: Tensor) -> Tensor:
    """Return z-scores, ``[n]``: (v − mean) / standard deviation (``ddof = 1``); zeros if all are equal or n is 1.

    >>> standardise(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [-1.0, 0.0, 1.0]
    """
    if len(values) < 2 or bool((values == values[0]).all()):
        return torch.zeros_like(values)
    return (values - values.mean()) / values.std()


def percentile(values: Tensor) -> Tensor:
    """Return each value's percentile in (0, 1) along the last dimension, (rank + ½) / n; ties share their mean.

    >>> percentile(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist()
    [0.5, 0.125, 0.5, 0.875]
    """
    order = values.sort(dim=-1).values
    below = torch.searchsorted(order, values.contiguous(), side="left")
    upto = torch.searchsorted(order, values.contiguous(), side="right")
    return (below + upto).double() / (2 * values.shape[-1])


def z_scores(scores: Scores) -> Scores:
    """Return scores made comparable between axes, as z-scores within each axis; the metric gains ``/zscore``."""
    values = {key: standardise(value) for key, value in scores.values.items()}
    return replace(scores, values=values, metric=f"{scores.metric}/zscore")


@dataclass(frozen=True)
class Space:
    """A ranking space: units ranked against each other, of one axis or of several small axes of one kind."""

    label: str  # the kind of units, `Axis.label`
    keys: tuple[str, ...]  # the axes, in the order of the network
    sizes: tuple[int, ...]  # their numbers of units

    @property
    def pooled(self) -> bool:
        """Whether it pools axes that are too small to be ranked by themselves."""
        return len(self.keys) > 1 or self.sizes[0] < MIN_RANKED_UNITS

    def gather(self, values: Tensors) -> Tensor:
        """Concatenate the values of all its units (axis key → ``[..., size]``) along the last dimension."""
        return torch.cat([values[key] for key in self.keys], dim=-1)

    def scatter(self, values: Tensor) -> dict[str, Tensor]:
        """Split values of all its units, ``[..., n]``, by axis (key → ``[..., size]``): inverse of :meth:`gather`."""
        return dict(zip(self.keys, values.split(self.sizes, dim=-1), strict=True))


def make_ranking_spaces(axes: Iterable[Axis], *, parts: int = 1) -> tuple[Space, ...]:
    """Return the ranking spaces: one per large axis; small axes of one kind are pooled.

    Axes of fewer than :data:`MIN_RANKED_UNITS` units are small; those of a kind (``Axis.label``) are divided, in order,
    among ``parts`` spaces.

    >>> from regrow.core.axes import Axis
    >>> [space.keys for space in make_ranking_spaces([Axis("a", 20, ()), Axis("b", 3, ()), Axis("c", 3, ())])]
    [('a',), ('b', 'c')]
    """
    small: dict[str, list[Axis]] = {}
    groups: list[list[Axis]] = []
    for axis in axes:
        if axis.size < MIN_RANKED_UNITS:
            small.setdefault(axis.label, []).append(axis)
        else:
            groups.append([axis])
    for pooled in small.values():
        for part in range(parts):
            groups.append([axis for i, axis in enumerate(pooled) if i * parts // len(pooled) == part])
    return tuple(
        Space(group[0].label, tuple(axis.key for axis in group), tuple(axis.size for axis in group))
        for group in groups
        if group
    )


def select_inner(units: Sequence[Axis]) -> list[Axis]:
    """Return the axes of ``units`` that lie neither in the first nor in the last blocks (:data:`OUTER_BLOCKS`).

    A block is the first number in a tensor's dotted name. Those with the same words before it, such as ``layer4.0`` and
    ``layer4.1``, are one sequence, of which the first and last are meant. Axes that lie in no block are returned.

    >>> from regrow.core.axes import Axis
    >>> blocks = [Axis(f"h.{i}.w", 4, ()) for i in range(5)]
    >>> [axis.key for axis in select_inner([*blocks, Axis("head", 4, ())])]
    ['h.1.w', 'h.2.w', 'h.3.w', 'h.4.w', 'head']
    >>> [axis.key for axis in select_inner([Axis(f"layer{i}.0.w", 4, ()) for i in range(4)])]
    ['layer0.0.w', 'layer1.0.w', 'layer2.0.w', 'layer3.0.w']
    """
    first, last = OUTER_BLOCKS
    matches = [re.match(r"((?:.*?\.)??)(\d+)\.", axis.key) for axis in units]
    sequences: dict[str, set[int]] = {}
    for match in filter(None, matches):
        sequences.setdefault(match[1], set()).add(int(match[2]))
    chosen = {
        prefix: sorted(blocks)[round(first * len(blocks)) : len(blocks) - round(last * len(blocks))]
        for prefix, blocks in sequences.items()
    }
    return [axis for axis, match in zip(units, matches, strict=True) if not match or int(match[2]) in chosen[match[1]]]


def map_within(values: Tensors, among: Sequence[Space], each: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return axis key → values after ``each``, ``[..., n]`` → ``[..., n]``, was applied to the n units of a space."""
    return {key: part for space in among for key, part in space.scatter(each(space.gather(values))).items()}


@dataclass(frozen=True)
class RankPercentiles:
    """Rank percentiles in (0, 1) of every unit within its ranking space, on every source and every shard."""

    sources: tuple[str, ...]  # M names
    whole: Tensors  # axis key → ranks by the scores on whole sources, [M, size]
    shards: Tensors  # axis key → ranks by the scores on each of the S shards of a source, [M, S, size]


def rank_units(scores: Mapping[str, tuple[Scores, Sequence[Scores]]], among: Sequence[Space]) -> RankPercentiles:
    """Return the rank percentiles of the units within each ranking space, for each source and each of its shards.

    ``scores``: source → its scores, and those of each of its shards; ``ValueError`` unless equally many shards each.
    """
    if len({len(shards) for _, shards in scores.values()}) != 1:
        raise ValueError("every source needs equally many shards")
    keys = [key for space in among for key in space.keys]
    whole = {key: torch.stack([pooled[key] for pooled, _ in scores.values()]) for key in keys}
    parts = {key: torch.stack([torch.stack([s[key] for s in shards]) for _, shards in scores.values()]) for key in keys}
    return RankPercentiles(tuple(scores), map_within(whole, among, percentile), map_within(parts, among, percentile))


def sensitivity(ranking: RankPercentiles) -> dict[str, Tensor]:
    """Return how much each unit's rank varies: axis key → its standard deviation over sources, ``[size]`` float64.

    ``ValueError`` for a single source.

    Source: GPrune-LLM (arXiv 2603.13418), ranking variance across data sets.
    """
    if len(ranking.sources) < 2:
        raise ValueError(f"sensitivity compares sources; there is only {ranking.sources}")
    return {key: value.std(0) for key, value in ranking.whole.items()}


def removed_share(flags: Tensors, kept: Mapping[str, Sequence[int]]) -> float:
    """Return which fraction of the units that are not ``kept`` is flagged (``flags``: 1, else 0); 0 if all are kept.

    >>> removed_share({"a": torch.tensor([1.0, 0.0, 1.0, 0.0])}, {"a": (1,)})
    0.6666666666666666
    """
    removed = [row[sorted(set(range(len(row))) - set(kept[key]))] for key, row in flags.items()]
    return float(torch.cat(removed).double().mean()) if any(map(len, removed)) else 0.0


def spectrum(ranking: RankPercentiles, among: Sequence[Space]) -> list[Row]:
    """Test per ranking space whether ranks differ between sources more than shuffled shards do; one row each.

    ``exceeds``: fraction of units with F > 1, ``exceeds_null`` under the null, which shuffles shards over sources;
    ``significant``: with F above the 95 % point of the null; ``share``: the fraction of the variance of a shard's rank
    that is due to the source; ``sigma``, ``sigma_between``, ``sigma_within``: median standard deviations of a unit's
    rank over sources, and of its components; ``spearman``: mean rank correlation between sources, ``spearman_shards``
    and ``spearman_within`` between shards of different sources and of the same. It takes 2 or more sources of 2 shards.
    """
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for space in among:
        whole, shards = space.gather(ranking.whole), space.gather(ranking.shards)
        m, s, n = shards.shape
        between, noise, ratio = _variance_components(shards)
        flat = shards.reshape(m * s, n)
        shuffled = [flat[torch.randperm(m * s, generator=generator)].reshape(m, s, n) for _ in range(SHUFFLES)]
        null = torch.stack([_variance_components(draw)[2] for draw in shuffled])
        # torch.quantile takes at most 2**24 values.
        critical = null.flatten().quantile(0.95) if null.numel() < 2**24 else null[0].quantile(0.95)
        rho = _mean_off_diagonal(torch.corrcoef(whole))
        mixed = torch.corrcoef(flat).reshape(m, s, m, s)
        same = torch.stack([_mean_off_diagonal(mixed[i, :, i, :]) for i in range(m)]).mean()
        other = torch.stack([mixed[i, :, j, :].mean() for i in range(m) for j in range(m) if i != j]).mean()
        rows.append(
            {
                "space": space.keys[0] if len(space.keys) == 1 else f"{len(space.keys)} × {space.label}",
                "label": space.label,
                "units": n,
                "exceeds": float((ratio > 1).double().mean()),
                "exceeds_null": float((null > 1).double().mean()),
                "significant": float((ratio > critical).double().mean()),
                "share": float(between.sum() / (between.sum() + noise.sum()).clamp_min(1e-30)),
                "sigma": float(whole.std(0).median()),
                "sigma_between": float(between.sqrt().median()),
                "sigma_within": float(noise.sqrt().median()),
                "spearman": float(rho),
                "spearman_shards": float(other),
                "spearman_within": float(same),
            }
        )
    return rows


def _variance_components(shards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the variances between and within sources, and F, ``[n]`` each, of ranks ``[sources, shards ≥ 2, n]``."""
    count = shards.shape[1]
    between = count * shards.mean(1).var(0)
    within = shards.var(1).mean(0)
    return ((between - within) / count).clamp_min(0), within, between / within.clamp_min(1e-30)


def _mean_off_diagonal(square: Tensor) -> Tensor:
    """Return the mean of a square matrix's entries off the diagonal, ``[]``."""
    n = len(square)
    return (square.sum() - square.diagonal().sum()) / (n * (n - 1))
