"""Unit scores of pruning methods, and the activation and gradient statistics that they are computed from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from regrow.core.sources import Source

# Axis key, or name of a parameter → tensor
Tensors = Mapping[str, Tensor]


class Need(StrEnum):
    """What a pruning method needs measured: weights only, activations, gradients of weights, or of unit masks."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    FISHER = "fisher"


@dataclass(frozen=True)
class Scores:
    """Importance of each unit, axis key → ``[size]`` float64: units with the lowest scores are cut first.

    ``metric``: the name of the score; ``sources``, ``tokens``: the data sources that it was measured on, if any, and
    how many labelled positions they had; ``notes``: what a user should know.
    """

    values: Tensors
    metric: str
    sources: tuple[str, ...] = ()
    tokens: int = 0
    notes: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Tensor:
        return self.values[key]


def rank_order(values: Tensor) -> Tensor:
    """Return (rank + ½) / n of each of n values, ``[n]`` float64, rank 0 being the lowest; ties go by index."""
    ranks = torch.empty(len(values), dtype=torch.float64)
    ranks[torch.argsort(values, stable=True)] = torch.arange(len(values), dtype=torch.float64)
    return (ranks + 0.5) / len(values)


@dataclass
class Moments:
    """Running sums of a weight's inputs, ``[C]`` each, from which means and variances per input feature are computed.

    A *position* is a token of a text or a pixel of a picture.

    Args:
        count: How many positions were seen.
        total: Σ x.
        square: Σ x².
    """

    count: int
    total: Tensor
    square: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.square + other.square)

    @property
    def mean(self) -> Tensor:
        """Mean of each input feature over positions, ``[C]``."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of each input feature over positions, ``[C]`` (population form, never negative)."""
        return (self.square / self.count - self.mean**2).clamp_min(0)


@dataclass
class Statistics:
    """Sums collected in one calibration pass over a source or a shard of it; sums of several passes can be added.

    Args:
        source: The name of the source.
        tokens: How many labelled positions were seen.
        moments: Name of a weight whose inputs are units of an axis → running sums of these inputs.
        gradients: Name of a parameter → the loss gradient summed over batches; empty unless asked for.
        fisher: Axis key → Σ of the squared loss gradient of each unit's mask, ``[size]``; empty unless asked for.
    """

    source: str
    tokens: int = 0
    moments: dict[str, Moments] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    fisher: dict[str, Tensor] = field(default_factory=dict)

    def accumulate(self, other: "Statistics") -> None:
        """Add other sums in place; gradients of ``other`` may become part of this one, uncopied."""
        self.tokens += other.tokens
        self.moments = _add_each(self.moments, other.moments)
        self.fisher = _add_each(self.fisher, other.fisher)
        for name, gradient in other.gradients.items():
            self.gradients[name] = self.gradients[name].add_(gradient) if name in self.gradients else gradient

    def tensors(self) -> list[Tensor]:
        """Return all tensors, not copied, in the order that :meth:`assemble` takes."""
        moments = [tensor for moments in self.moments.values() for tensor in (moments.total, moments.square)]
        return [*moments, *self.gradients.values(), *self.fisher.values()]

    def header(self) -> dict[str, Any]:
        """Return everything but the tensors and the source's name as JSON data, for :meth:`assemble`."""
        return {
            "tokens": self.tokens,
            "moments": {name: moments.count for name, moments in self.moments.items()},
            "gradients": list(self.gradients),
            "fisher": list(self.fisher),
        }

    @classmethod
    def assemble(cls, source: str, header: Mapping[str, Any], tensors: Iterable[Tensor]) -> "Statistics":
        """Rebuild the statistics of a source from what :meth:`header` and :meth:`tensors` returned."""
        rest = iter(tensors)
        moments = {name: Moments(count, next(rest), next(rest)) for name, count in header["moments"].items()}
        gradients, fisher = ({name: next(rest) for name in header[kind]} for kind in ("gradients", "fisher"))
        return cls(source, header["tokens"], moments, gradients, fisher)


def merge_statistics(parts: Sequence[Statistics]) -> Statistics:
    """Return the sums of several shards or sources added up, these unchanged; a single one is returned itself."""
    if len(parts) == 1:
        return parts[0]
    total, *rest = (replace(part, gradients={}) for part in parts)
    for part in rest:
        total.accumulate(part)
        if total.source != part.source:
            total.source += f"+{part.source}"
    for name in dict.fromkeys(name for part in parts for name in part.gradients):  # one at a time: they are large
        first, *others = (part.gradients[name] for part in parts if name in part.gradients)
        total.gradients[name] = sum(others, start=first)
    return total


def _add_each(a: dict, b: dict) -> dict:
    """Return the entries of two mappings, with those of a common key added."""
    return a | {key: a[key] + value if key in a else value for key, value in b.items()}


@dataclass(frozen=True)
class Evidence:
    """Calibration measurements and data that a pruning method scores units with.

    ``statistics``: name of a source → the sums measured on each of its shards; ``data``: name of a source → its
    batches, for methods that run the network themselves; ``notes``: what a user should know.
    """

    statistics: Mapping[str, Sequence[Statistics]] = field(default_factory=dict)
    data: Mapping[str, Source] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources that were measured."""
        return tuple(self.statistics)

    def pooled(self, *, gradients: bool = True) -> Statistics:
        """Return the sums over all sources and shards, perhaps without gradients; ``ValueError`` if there are none."""
        shards = [shard for shards in self.statistics.values() for shard in shards]
        if not shards:
            raise ValueError("this method needs calibration text or images; give it at least one --source")
        return merge_statistics(shards if gradients else [replace(shard, gradients={}) for shard in shards])
