"""Partition units into modules of similar sensitivity across text domains (the modules of GPrune-LLM)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.scoring.sensitivity import Sensitivity
from regrow.scoring.spaces import Row, Space

LEAST = 8
"""Modules with fewer units are merged with the module of the nearest mean sensitivity."""


@dataclass(frozen=True)
class Modules:
    """A partition of units into modules, in which units compete only with each other.

    Args:
        labels: Axis key → the module index of each unit, ``[size]`` int64; every module has at least one unit.
        names: A readable name per module: ``"layers.3 sensitive weak"``.
        spaces: Per module: the index of the ranking space it lies in.
    """

    labels: Mapping[str, Tensor]
    names: tuple[str, ...]
    spaces: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def mean(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the mean of per-unit values over the units of each module, ``[modules]`` float64.

        Args:
            values: Axis key → one value per unit, ``[size]``.
        """
        labels = torch.cat(list(self.labels.values()))
        flat = torch.cat([values[key].double() for key in self.labels])
        zeros = torch.zeros(len(self), dtype=torch.float64)
        return zeros.index_add(0, labels, flat) / zeros.index_add(0, labels, torch.ones_like(flat))

    def numbered_as(self, other: "Modules", among: Sequence[Space]) -> "Modules":
        """Return this partition with module numbers of ``other``, whose modules are used where they differ.

        A space that both divide into the same modules keeps this partition's units; any other space is taken from
        ``other``.

        Args:
            other: Another partition of the same units.
            among: The ranking spaces of both.
        """
        number = {name: i for i, name in enumerate(other.names)}
        mine, theirs = (
            [{n for n, home in zip(m.names, m.spaces, strict=True) if home == i} for i in range(len(among))]
            for m in (self, other)
        )
        numbers = torch.tensor([number.get(name, -1) for name in self.names])
        labels = {
            key: numbers[self.labels[key]] if mine[i] == theirs[i] else other.labels[key]
            for i, space in enumerate(among)
            for key in space.keys
        }
        return Modules({key: labels[key] for key in other.labels}, other.names, other.spaces)

    def table(self, among: Sequence[Space], **columns: Tensor) -> list[Row]:
        """Return one JSON-able row per module: its name, space, kind, number of units, and given columns.

        Args:
            among: The ranking spaces.
            **columns: Column name → one value per module, ``[modules]``.
        """
        sizes = torch.bincount(torch.cat(list(self.labels.values())), minlength=len(self))
        homes = [among[i] for i in self.spaces]
        return [
            {
                "name": name,
                "space": home.keys[0],
                "label": home.label,
                "units": int(size),
                **{column: float(values[i]) for column, values in columns.items()},
            }
            for i, (name, home, size) in enumerate(zip(self.names, homes, sizes, strict=True))
        ]


def partition(
    how: str,
    among: Sequence[Space],
    scores: Mapping[str, Tensor],
    sensitive: Sensitivity,
    *,
    seed: int = 0,
) -> Modules:
    """Divide the units of each ranking space into modules, by sensitivity, score, or other criteria.

    Args:
        how: One of ``PARTITIONS``: ``thresholds``, sensitivity × score, each split at its median over all spaces of a
            kind (pooled spaces, whose units are few: sensitivity alone); ``random``, modules as large as those, but who
            is in which is drawn; ``layer``, one module per axis.
        among: The ranking spaces.
        scores: Axis key → the baseline's score on all sources, ``[size]``.
        sensitive: How much ranks vary between sources.
        seed: The random seed of ``random``.

    Raises:
        ValueError: If ``how`` is unknown.

    Source: GPrune-LLM (arXiv 2603.13418) states behaviour-consistent modules; how they are formed is ours.
    """
    if how not in PARTITIONS:
        raise ValueError(f"modules are formed by {', '.join(PARTITIONS)}; got {how!r}")
    labels: dict[str, Tensor] = {}
    names: list[str] = []
    homes: list[int] = []
    view = _View(tuple(among), scores, sensitive, seed)
    for index, space in enumerate(among):
        cells, words = PARTITIONS[how](view, index)
        if how != "layer":
            cells = _merged(cells, space.gather(sensitive.sigma))
        present = cells.unique().tolist()
        numbers = torch.full((max(present) + 1,), -1)
        numbers[present] = torch.arange(len(present)) + len(names)
        labels |= space.scatter(numbers[cells])
        place = space.keys[0] if len(space.keys) == 1 else f"{space.keys[0]} and {len(space.keys) - 1} more"
        names += [f"{place} {words[cell]}" if how != "layer" else words[cell] for cell in present]
        homes += [index] * len(present)
    return Modules(labels, tuple(names), tuple(homes))


@dataclass(frozen=True)
class _View:
    spaces: tuple[Space, ...]
    scores: Mapping[str, Tensor]
    sensitivity: Sensitivity
    seed: int


Cells = tuple[Tensor, Sequence[str]]
_GRID = ("robust weak", "robust strong", "sensitive weak", "sensitive strong")
_HALVES = ("robust", "", "sensitive", "")


def _thresholds(view: _View, index: int) -> Cells:
    space = view.spaces[index]
    alike = [other for other in view.spaces if other.label == space.label]
    sigma = torch.cat([other.gather(view.sensitivity.sigma) for other in alike]).median()
    score = torch.cat([other.gather(view.scores) for other in alike]).median()
    sensitive, strong = space.gather(view.sensitivity.sigma) > sigma, space.gather(view.scores) > score
    return (2 * sensitive.long(), _HALVES) if space.pooled else (2 * sensitive.long() + strong.long(), _GRID)


def _random(view: _View, index: int) -> Cells:
    cells, words = _thresholds(view, index)
    shuffle = torch.randperm(len(cells), generator=torch.Generator().manual_seed(view.seed * 65537 + index))
    return cells[shuffle], [f"random {i}" for i in range(len(words))]


def _layer(view: _View, index: int) -> Cells:
    space = view.spaces[index]
    return torch.arange(len(space.keys)).repeat_interleave(torch.tensor(space.sizes)), space.keys


PARTITIONS: Mapping[str, Callable[[_View, int], Cells]] = {
    "thresholds": _thresholds,
    "random": _random,
    "layer": _layer,
}
"""Name → function that divides the units of one ranking space."""


def _merged(cells: Tensor, sigma: Tensor) -> Tensor:
    """Merge the smallest module with the nearest in mean sensitivity until none is smaller than ``LEAST``."""
    while len(present := cells.unique()) > 1:
        counts = torch.stack([(cells == cell).sum() for cell in present])
        if counts.min() >= LEAST:
            break
        means = torch.stack([sigma[cells == cell].mean() for cell in present])
        small = int(counts.argmin())
        distance = (means - means[small]).abs()
        distance[small] = torch.inf
        cells = torch.where(cells == present[small], present[int(distance.argmin())], cells)
    return cells
