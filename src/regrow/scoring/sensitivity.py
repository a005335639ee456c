"""How much a unit's importance rank varies between text domains, beyond sampling noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.core.scores import Scores
from regrow.scoring.combine import percentile
from regrow.scoring.spaces import Row, Space, within

SHUFFLES = 20
"""How often shards are shuffled for the null distribution."""


@dataclass(frozen=True)
class Ranks:
    """The importance rank of every unit on every source, and on every shard of each source.

    Args:
        sources: The names of the M sources.
        whole: Axis key → ``[M, size]``: ranks by the scores on whole sources.
        shards: Axis key → ``[M, S, size]``: ranks by the scores on each of the S shards of a source.
    """

    sources: tuple[str, ...]
    whole: Mapping[str, Tensor]
    shards: Mapping[str, Tensor]


def ranks(scores: Mapping[str, tuple[Scores, Sequence[Scores]]], among: Sequence[Space]) -> Ranks:
    """Rank the units of each ranking space by their scores, in (0, 1), for each source and each of its shards.

    Args:
        scores: Source → its scores, and the scores of each of its shards; equally many shards each.
        among: The ranking spaces: which units are ranked against each other.

    Raises:
        ValueError: If the numbers of shards differ.
    """
    if len({len(shards) for _, shards in scores.values()}) != 1:
        raise ValueError("every source needs equally many shards")
    keys = [key for space in among for key in space.keys]
    whole = {key: torch.stack([one[key] for one, _ in scores.values()]) for key in keys}
    parts = {key: torch.stack([torch.stack([s[key] for s in shards]) for _, shards in scores.values()]) for key in keys}
    return Ranks(tuple(scores), within(whole, among, percentile), within(parts, among, percentile))


@dataclass(frozen=True)
class Sensitivity:
    """How much each unit's rank varies between sources.

    Args:
        sigma: Axis key → the standard deviation of the rank over sources, ``[size]`` float64.
    """

    sigma: Mapping[str, Tensor]


def sensitivity(ranking: Ranks) -> Sensitivity:
    """Compute how much each unit's rank varies between sources: the standard deviation (ddof = 1) of its ranks.

    Args:
        ranking: Ranks on M ≥ 2 sources.

    Raises:
        ValueError: If there are fewer than 2 sources.

    Source: GPrune-LLM (arXiv 2603.13418), ranking variance across data sets.
    """
    if len(ranking.sources) < 2:
        raise ValueError(f"sensitivity compares sources; there is only {ranking.sources}")
    return Sensitivity({key: value.std(0) for key, value in ranking.whole.items()})


def share_of(flags: Mapping[str, Tensor], kept: Mapping[str, Sequence[int]]) -> float:
    """Return the fraction of flagged units among the units that are removed; 0 if none is removed.

    Args:
        flags: Axis key → 1 per flagged unit, else 0, ``[size]``.
        kept: Axis key → the units that are kept (positions).

    >>> share_of({"a": torch.tensor([1.0, 0.0, 1.0, 0.0])}, {"a": (1,)})
    0.6666666666666666
    """
    gone = [row[sorted(set(range(len(row))) - set(kept[key]))] for key, row in flags.items()]
    return float(torch.cat(gone).double().mean()) if any(len(part) for part in gone) else 0.0


def spectrum(ranking: Ranks, among: Sequence[Space]) -> list[Row]:
    """Test per ranking space whether ranks differ between sources more than shuffled shards do; one row each.

    The null shuffles shards over sources (one shuffle for all units of a draw). ``exceeds``: fraction of units with F >
    1; ``significant``: with F above the null's 95 % point; ``share``: Σ between ÷ Σ (between + within), the fraction of
    the variance of a shard's rank that is due to the source. ``spearman``: mean rank correlation between sources;
    ``kendall_w``: ((M − 1) ρ + 1) / M; ``spearman_shards`` and ``spearman_within``: between shards of different sources
    and of the same source, which are equally noisy.

    Args:
        ranking: The ranks on at least 2 sources of at least 2 shards.
        among: The ranking spaces.
    """
    generator = torch.Generator().manual_seed(0)
    rows: list[Row] = []
    for space in among:
        whole, shards = space.gather(ranking.whole), space.gather(ranking.shards)
        m, s, n = shards.shape
        between, noise, ratio = _effects(shards)
        flat = shards.reshape(m * s, n)
        shuffled = [flat[torch.randperm(m * s, generator=generator)].reshape(m, s, n) for _ in range(SHUFFLES)]
        null = torch.stack([_effects(one)[2] for one in shuffled])
        corner = null.flatten().quantile(0.95) if null.numel() < 2**24 else null[0].quantile(0.95)
        rho = _off_diagonal(torch.corrcoef(whole))
        mixed = torch.corrcoef(flat).reshape(m, s, m, s)
        same = torch.stack([_off_diagonal(mixed[i, :, i, :]) for i in range(m)]).mean()
        other = torch.stack([mixed[i, :, j, :].mean() for i in range(m) for j in range(m) if i != j]).mean()
        rows.append(
            {
                "space": space.keys[0] if len(space.keys) == 1 else f"{len(space.keys)} × {space.label}",
                "label": space.label,
                "units": n,
                "exceeds": float((ratio > 1).double().mean()),
                "exceeds_null": float((null > 1).double().mean()),
                "significant": float((ratio > corner).double().mean()),
                "share": float(between.sum() / (between.sum() + noise.sum()).clamp_min(1e-30)),
                "sigma": float(whole.std(0).median()),
                "sigma_between": float(between.sqrt().median()),
                "sigma_within": float(noise.sqrt().median()),
                "spearman": float(rho),
                "kendall_w": float(((m - 1) * rho + 1) / m),
                "spearman_shards": float(other),
                "spearman_within": float(same),
            }
        )
    return rows


def _effects(shards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (between, within, F) per unit, of ``[M, S, n]``, S ≥ 2."""
    s = shards.shape[1]
    over = s * shards.mean(1).var(0)
    inside = shards.var(1).mean(0)
    return ((over - inside) / s).clamp_min(0), inside, over / inside.clamp_min(1e-30)


def _off_diagonal(square: Tensor) -> Tensor:
    n = len(square)
    return (square.sum() - square.diagonal().sum()) / (n * (n - 1))
