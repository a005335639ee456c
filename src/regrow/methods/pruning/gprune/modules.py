"""Modules of GPrune: units of similar sensitivity, how far their ranking is trusted, and the order in each module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.allocation.ranked import soft_step
from regrow.core.scores import Tensors, rank_order
from regrow.scoring.spaces import Row, Space, map_within, percentile

LEAST = 8  # modules with fewer units are merged with the module of the nearest mean sensitivity
_GRID = ("robust weak", "robust strong", "sensitive weak", "sensitive strong")
_HALVES = ("robust", "", "sensitive", "")


@dataclass(frozen=True)
class Modules:
    """A partition of units into modules, in which units compete only with each other."""

    labels: Tensors  # axis key → the module index of each unit, [size] int64; every module has at least one unit
    names: tuple[str, ...]  # "layers.3 sensitive weak"
    spaces: tuple[int, ...]  # the index of each module's ranking space

    def __len__(self) -> int:
        return len(self.names)

    def mean(self, values: Tensors) -> Tensor:
        """Return the mean of per-unit values (axis key → ``[size]``) over each module, ``[modules]`` float64."""
        flat = torch.cat([values[key].double() for key in self.labels])
        zeros = torch.zeros(len(self), dtype=torch.float64)
        return zeros.index_add(0, torch.cat(list(self.labels.values())), flat) / self.sizes()

    def sizes(self) -> Tensor:
        """Return the number of units of each module, ``[modules]``."""
        return torch.bincount(torch.cat(list(self.labels.values())), minlength=len(self))

    def numbered_as(self, other: "Modules", among: Sequence[Space]) -> "Modules":
        """Return this partition with the module numbers of ``other``; spaces that it divides otherwise are as there."""
        number = {name: i for i, name in enumerate(other.names)}
        numbers = torch.tensor([number.get(name, -1) for name in self.names])
        labels = dict(other.labels)
        for i, space in enumerate(among):
            if self._names_in(i) == other._names_in(i):
                labels |= {key: numbers[self.labels[key]] for key in space.keys}
        return Modules(labels, other.names, other.spaces)

    def _names_in(self, space: int) -> set[str]:
        return {name for name, home in zip(self.names, self.spaces, strict=True) if home == space}

    def table(self, among: Sequence[Space], columns: Mapping[str, Tensor]) -> list[Row]:
        """Return one JSON-able row per module: its name, space, kind, number of units, and columns of values."""
        homes = [among[i] for i in self.spaces]
        return [
            {
                "name": name,
                "space": home.keys[0],
                "label": home.label,
                "units": int(size),
                **{column: float(values[i]) for column, values in columns.items()},
            }
            for i, (name, home, size) in enumerate(zip(self.names, homes, self.sizes(), strict=True))
        ]


def partition(how: str, among: Sequence[Space], scores: Tensors, sigma: Tensors, *, seed: int = 0) -> Modules:
    """Divide the units of each ranking space into modules.

    ``thresholds``: sensitivity × score, each split at its median over all spaces of a kind (pooled spaces, whose units
    are few: sensitivity alone); ``random``: modules as large as those, but who is in which is drawn; ``layer``: one
    module per axis. ``sigma``: axis key → how much ranks vary between sources.

    Source: GPrune-LLM (arXiv 2603.13418) states behaviour-consistent modules; how they are formed is ours.
    """
    labels: dict[str, Tensor] = {}
    names: list[str] = []
    homes: list[int] = []
    for index, space in enumerate(among):
        first = space.keys[0]
        words: Sequence[str] = space.keys
        if how == "layer":
            cells = torch.arange(len(space.keys)).repeat_interleave(torch.tensor(space.sizes))
        else:
            cells = _split_at_medians(space, among, scores, sigma)
            prefix = first if len(space.keys) == 1 else f"{first} and {len(space.keys) - 1} more"
            words = [f"{prefix} {word}" for word in (_HALVES if space.pooled else _GRID)]
            if how == "random":
                generator = torch.Generator().manual_seed(seed * 65537 + index)
                cells = cells[torch.randperm(len(cells), generator=generator)]
                words = [f"{prefix} random {i}" for i in range(len(words))]
            cells = _merge_small(cells, space.gather(sigma))
        present = cells.unique().tolist()
        numbers = torch.full((max(present) + 1,), -1)
        numbers[present] = torch.arange(len(present)) + len(names)
        labels |= space.scatter(numbers[cells])
        names += [words[cell] for cell in present]
        homes += [index] * len(present)
    return Modules(labels, tuple(names), tuple(homes))


def _split_at_medians(space: Space, among: Sequence[Space], scores: Tensors, sigma: Tensors) -> Tensor:
    """Return the index in ``_GRID`` (or ``_HALVES``) of each unit of a space, by the medians over its kind."""
    alike = [other for other in among if other.label == space.label]
    sensitive, strong = (
        (space.gather(values) > torch.cat([other.gather(values) for other in alike]).median()).long()
        for values in (sigma, scores)
    )
    return 2 * sensitive if space.pooled else 2 * sensitive + strong


def _merge_small(cells: Tensor, sigma: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class Reliability:
    """How far the activation-based metric is trusted in each module; all ``[modules]`` float64."""

    # U = S · (1 − A), with S the module's mean sensitivity and A the mean percentile of its scores, each scaled to 0..1
    # over the modules of one kind.
    unreliability: Tensor
    trust: Tensor  # the weight of the activation-based ranking: 1 uses it alone, 0 the data-free one alone


def reliability(
    how: str, among: Sequence[Space], modules: Modules, scores: Tensors, sigma: Tensors, *, most: float = 0.25
) -> Reliability:
    """Compute how far the activation-based ranking of each module is trusted.

    ``unreliable``: not trusted where U is highest, in at most a fraction ``most`` of the judged units; ``blend``: trust
    1 − U; ``even``: the mean of that everywhere (does the place matter, or the mixture?); ``never`` and ``always``
    switch; ``reversed``: the most reliable modules instead (a sign check). Modules of pooled spaces have too few units
    to be judged, and are always trusted.

    Source: GPrune-LLM (arXiv 2603.13418) names both factors; the formula is ours.
    """
    labels = [among[i].label for i in modules.spaces]
    sensitivity = _scaled(modules.mean(sigma), labels)
    activity = _scaled(modules.mean(map_within(scores, among, percentile)), labels)
    u, sizes = sensitivity * (1 - activity), modules.sizes()
    judged = torch.tensor([not among[i].pooled for i in modules.spaces])
    trust = torch.ones(len(modules), dtype=torch.float64)
    match how:
        case "unreliable":
            trust = _distrust_highest(u, sizes, judged & (u > 0), most * float(sizes[judged].sum()))
        case "reversed":
            trust = _distrust_highest(-u, sizes, judged, most * float(sizes[judged].sum()))
        case "blend":
            trust = 1 - u
        case "even":
            counts = sizes[judged].double()
            trust[:] = 1 - float((counts * u[judged]).sum() / counts.sum())
        case "always":
            trust[:] = 0
    return Reliability(u, torch.where(judged, trust, torch.ones_like(trust)))


def rank_in_modules(modules: Modules, trust: Tensor, scores: Tensors, instead: Tensors) -> dict[str, Tensor]:
    """Rank every unit within its module, (rank + ½) / n in (0, 1), lowest first; ties go by index.

    The activation-based ``scores`` order trusted modules, the data-free ``instead`` the others; a ``trust`` between 0
    and 1 blends both percentiles.
    """
    keys = list(modules.labels)
    labels, first, second = (torch.cat([values[key] for key in keys]) for values in (modules.labels, scores, instead))
    places = torch.empty(len(labels), dtype=torch.float64)
    for module, t in enumerate(trust.tolist()):
        mine = labels == module
        places[mine] = rank_order(t * percentile(first[mine]) + (1 - t) * percentile(second[mine]))
    return dict(zip(keys, places.split([len(modules.labels[key]) for key in keys]), strict=True))


def _scaled(values: Tensor, labels: Sequence[str]) -> Tensor:
    """Return each value scaled to 0..1 over the values of the same label."""
    result = torch.zeros_like(values)
    for label in set(labels):
        mine = torch.tensor([other == label for other in labels])
        low, high = values[mine].min(), values[mine].max()
        result[mine] = (values[mine] - low) / (high - low) if high > low else 0.0
    return result


def _distrust_highest(u: Tensor, sizes: Tensor, judged: Tensor, left: float) -> Tensor:
    """Set the trust of the modules with the highest ``u`` to 0, for at most ``left`` units in all."""
    trust = torch.ones(len(u), dtype=torch.float64)
    for module in torch.argsort(-u, stable=True).tolist():
        if judged[module]:
            if sizes[module] > left:
                break
            trust[module] = 0
            left -= float(sizes[module])
    return trust


@dataclass(frozen=True)
class Masks:
    """Fixed orders of the units in their modules, in one view per ranking (by all sources; by all but one)."""

    modules: Tensors  # axis key → the module number of each unit, [views, size] int64
    places: Tensors  # axis key → the relative rank of each unit in its module, in (0, 1), lowest first, [views, size]
    fills: Tensors  # name of a weight that reads units → the value that replaces each dropped input, [views, C]
    width: Tensor  # the range of relative ranks around the ratio that has a gradient, [modules]

    def margins(self, share: Tensor, view: int = 0) -> dict[str, Tensor]:
        """Return each unit's relative rank minus its module's pruning ratio, by axis key; units below 0 are cut."""
        return {key: ranks[view] - share[self.modules[key][view]] for key, ranks in self.places.items()}

    def gates(self, share: Tensor, view: int) -> dict[str, Tensor]:
        """Return 1 for units that stay and 0 for units that are cut, by axis key, with a gradient to the ratios."""
        gates = {}
        for key, ranks in self.places.items():
            label = self.modules[key][view]
            gates[key] = soft_step(ranks[view], share.index_select(0, label), self.width[label]).float()
        return gates

    def cut_shares(self, kept: Mapping[str, tuple[int, ...]]) -> Tensor:
        """Return the fraction of each module's units (first view) that a choice of units cuts."""
        labels = torch.cat([label[0] for label in self.modules.values()])
        gone = torch.ones(len(labels), dtype=torch.float64)
        start = 0
        for key, label in self.modules.items():
            gone[torch.tensor(kept[key], dtype=torch.int64) + start] = 0
            start += label.shape[1]
        count = torch.bincount(labels)
        return torch.zeros(len(count), dtype=torch.float64).index_add(0, labels, gone) / count
