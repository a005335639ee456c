"""Unit scores of pruning methods, and the activation and gradient statistics that they are computed from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Importance of each unit of each axis: units with the lowest scores are cut first.

    Args:
        values: Axis key → importance per unit, ``[size]`` float64; higher is more worth keeping.
        metric: The name of the importance measure: ``"wifv"``, ``"magnitude"``.
        sources: The names of the sources on which it was measured; empty for measures that need no data.
        tokens: How many positions (tokens or pixels) were measured.
        notes: Remarks for the report.
    """

    values: Mapping[str, Tensor]
    metric: str
    sources: tuple[str, ...] = ()
    tokens: int = 0
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, key: str) -> Tensor:
        return self.values[key]


@dataclass
class Moments:
    """Running sums of a weight's inputs, from which means and variances per input feature are computed.

    A *position* is a token of a text or a pixel of a picture; a *sequence* is one text window or one picture.

    Args:
        count: How many positions were seen.
        total: Σ x.
        square: Σ x².
        sequences: How many sequences were seen.
        mean_total: Σ over sequences of the sequence's mean.
        mean_square: Σ over sequences of the squared mean of the sequence.
    """

    count: int
    total: Tensor
    square: Tensor
    sequences: int
    mean_total: Tensor
    mean_square: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.square + other.square,
            self.sequences + other.sequences,
            self.mean_total + other.mean_total,
            self.mean_square + other.mean_square,
        )

    @property
    def mean(self) -> Tensor:
        """Mean of each input feature over positions, ``[C]``."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of each input feature over positions, ``[C]`` (population form, never negative)."""
        return (self.square / self.count - self.mean**2).clamp_min(0)

    @property
    def sequence_variance(self) -> Tensor:
        """Variance of the per-sequence means of each input feature, ``[C]`` (population form, never negative)."""
        return (self.mean_square / self.sequences - (self.mean_total / self.sequences) ** 2).clamp_min(0)


@dataclass
class Statistics:
    """Sums collected in one calibration pass over a source or a shard of it; sums of several passes can be added.

    Args:
        source: The name of the source.
        tokens: How many labelled positions were seen.
        moments: Name of a consuming weight → running sums of its inputs.
        gradients: Name of a parameter → the loss gradient summed over batches; empty unless asked for.
        fisher: Axis key → Σ of the squared loss gradient of each unit's mask, ``[size]``; empty unless asked for.
    """

    source: str
    tokens: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.source if self.source == other.source else f"{self.source}+{other.source}",
            self.tokens + other.tokens,
            _merged(self.moments, other.moments),
            _merged(self.gradients, other.gradients),
            _merged(self.fisher, other.fisher),
        )


def merged(parts: Sequence[Statistics]) -> Statistics:
    """Return the sums of several shards or sources added up, as one :class:`Statistics`.

    Args:
        parts: Statistics of shards or sources, at least one.
    """
    if len(parts) == 1:
        return parts[0]
    total, *rest = (replace(part, gradients={}) for part in parts)
    for part in rest:
        total = total + part
    for name in dict.fromkeys(name for part in parts for name in part.gradients):  # one at a time: they are large
        total.gradients[name] = _sum(part.gradients[name] for part in parts if name in part.gradients)
    return total


def _sum(tensors: Iterator[Tensor]) -> Tensor:
    total = next(tensors)
    for tensor in tensors:
        total = total + tensor
    return total


def _merged(a: dict, b: dict) -> dict:
    return {key: a[key] + b[key] if key in a and key in b else a.get(key, b.get(key)) for key in (*a, *(b.keys() - a))}
