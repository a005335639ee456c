"""Modules of GPrune: units of similar sensitivity, how far their ranking is trusted, and the order in each module."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.allocation.ranked import soft_step
from regrow.core.scores import Tensors, rank_order
from regrow.scoring.spaces import Row, Space, map_within, percentile

LEAST = 8  # modules with fewer units are merged with the module of the nearest mean sensitivity
# Words of a module's name by the index of _split_at_medians; pooled spaces are split by sensitivity alone.
_GRID = ("robust weak", "robust strong", "sensitive weak", "sensitive strong")
_HALVES = ("robust", "", "sensitive", "")


@dataclass(frozen=True)
class Modules:
    """A partition of units into modules, in which units compete only with each other."""

    labels: Tensors  # axis key → the module index of each unit, [size] int64; every module has at least one unit
    names: tuple[str, ...]  # of the modules, such as "layers.3 sensitive weak"
    # The index of each module's ranking space (scoring.spaces: units ranked against each other), of those given
    spaces: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def mean(self, values: Tensors) -> Tensor:
        """Return the mean of per-unit values (axis key → ``[size]``) over each module, ``[modules]`` float64."""
        flat = torch.cat([values[key].double() for key in self.labels])
        zeros = torch.zeros(len(self), dtype=torch.float64)
        return zeros.index_add(0, torch.cat(list(self.labels.values())), flat) / self.sizes()

    def sizes(self) -> Tensor:
        """Return the number of units of each module, ``[modules]`` int64."""
        return torch.bincount(torch.cat(list(self.labels.values())), minlength=len(self))

    def numbered_as(self, other: "Modules", all_spaces: Sequence[Space]) -> "Modules":
        """Return this partition with modules numbered as those of the same name in ``other``.

        A ranking space whose modules have other names there takes the modules of ``other``.
        """
        index_by_name = {name: i for i, name in enumerate(other.names)}
        indices = torch.tensor([index_by_name.get(name, -1) for name in self.names])
        labels = dict(other.labels)
        for i, space in enumerate(all_spaces):
            if self._names_in(i) == other._names_in(i):
                labels |= {key: indices[self.labels[key]] for key in space.keys}
        return Modules(labels, other.names, other.spaces)

    def _names_in(self, space: int) -> set[str]:
        """Return the names of the modules of the ranking space with the index ``space``."""
        return {name for name, index in zip(self.names, self.spaces, strict=True) if index == space}

    def table(self, all_spaces: Sequence[Space], columns: Mapping[str, Tensor]) -> list[Row]:
        """Return one row per module, as JSON data: name, space (first axis), label, number of units, and columns.

        ``columns``: name of a column → its value for each module, ``[modules]``.
        """
        spaces = [all_spaces[i] for i in self.spaces]
        return [
            {
                "name": name,
                "space": space.keys[0],
                "label": space.label,
                "units": int(size),
                **{column: float(values[i]) for column, values in columns.items()},
            }
            for i, (name, space, size) in enumerate(zip(self.names, spaces, self.sizes(), strict=True))
        ]


def partition(how: str, all_spaces: Sequence[Space], scores: Tensors, sigma: Tensors, *, seed: int = 0) -> Modules:
    """Return modules into which the units of each ranking space are divided, as ``how`` says.

    ``thresholds``: sensitivity × score, each split at its median over all spaces with the same label (pooled spaces,
    whose units are few: sensitivity alone); ``random``: modules as large as those, of random units; ``layer``: one
    module per axis. ``scores``, ``sigma``: axis key → score and sensitivity (how much ranks vary between sources) of
    each unit. ``seed``: of ``random``.

    Source: GPrune-LLM (arXiv 2603.13418) states behaviour-consistent modules; how they are formed is ours.
    """
    labels: dict[str, Tensor] = {}
    names: list[str] = []
    space_indices: list[int] = []
    for index, space in enumerate(all_spaces):
        first = space.keys[0]
        words: Sequence[str] = space.keys
        if how == "layer":
            cells = torch.arange(len(space.keys)).repeat_interleave(torch.tensor(space.sizes))
        else:
            cells = _split_at_medians(space, all_spaces, scores, sigma)
            prefix = first if len(space.keys) == 1 else f"{first} and {len(space.keys) - 1} more"
            words = [f"{prefix} {word}" for word in (_HALVES if space.pooled else _GRID)]
            if how == "random":
                generator = torch.Generator().manual_seed(seed * 65537 + index)
                cells = cells[torch.randperm(len(cells), generator=generator)]
                words = [f"{prefix} random {i}" for i in range(len(words))]
            cells = _merge_small(cells, space.gather(sigma))
        present = cells.unique().tolist()  # indices of modules are numbered without gaps, over all spaces
        numbers = torch.full((max(present) + 1,), -1)
        numbers[present] = torch.arange(len(present)) + len(names)
        labels |= space.scatter(numbers[cells])
        names += [words[cell] for cell in present]
        space_indices += [index] * len(present)
    return Modules(labels, tuple(names), tuple(space_indices))


def _split_at_medians(space: Space, all_spaces: Sequence[Space], scores: Tensors, sigma: Tensors) -> Tensor:
    """Return each unit's index in ``_GRID`` (or ``_HALVES``), split at medians over all spaces of the same label.

    ``scores``, ``sigma``: axis key → the values that are split. The result is ``[units of the space]``.
    """
    alike = [other for other in all_spaces if other.label == space.label]
    sensitive, strong = (
        (space.gather(values) > torch.cat([other.gather(values) for other in alike]).median()).long()
        for values in (sigma, scores)
    )
    return 2 * sensitive if space.pooled else 2 * sensitive + strong


def _merge_small(cells: Tensor, sigma: Tensor) -> Tensor:
    """Return ``cells`` (a class per unit), small classes merged by mean ``sigma`` until all have ``LEAST`` units."""
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
    # over the modules of spaces with the same label.
    unreliability: Tensor
    trust: Tensor  # the weight of the activation-based ranking: 1 uses it alone, 0 the data-free one alone


def compute_reliability(
    how: str, all_spaces: Sequence[Space], modules: Modules, scores: Tensors, sigma: Tensors, *, most: float = 0.25
) -> Reliability:
    """Return how far the activation-based ranking of each module is trusted, as ``how`` says.

    ``unreliable``: not trusted where U is highest, in at most a fraction ``most`` of the judged units; ``blend``: trust
    1 − U; ``even``: the mean of that everywhere (a control: does it matter which modules?); ``never``: all are trusted,
    ``always``: none; ``reversed``: the most reliable modules are not (a sign check). Modules of pooled spaces have too
    few units to be judged, and are always trusted. ``scores``, ``sigma``: as for :func:`partition`.

    Source: GPrune-LLM (arXiv 2603.13418) names both factors; the formula is ours.
    """
    labels = [all_spaces[i].label for i in modules.spaces]
    sensitivity = _scale_to_unit(modules.mean(sigma), labels)
    activity = _scale_to_unit(modules.mean(map_within(scores, all_spaces, percentile)), labels)
    u, sizes = sensitivity * (1 - activity), modules.sizes()
    judged = torch.tensor([not all_spaces[i].pooled for i in modules.spaces])
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
    """Return the relative rank of every unit in its module, (rank + ½) / n in (0, 1), lowest first; ties go by index.

    The activation-based ``scores`` order trusted modules, the data-free ``instead`` the others; a ``trust`` between 0
    and 1 (per module) blends both percentiles. All but ``trust`` are by axis key.
    """
    keys = list(modules.labels)
    labels, active, free = (torch.cat([values[key] for key in keys]) for values in (modules.labels, scores, instead))
    ranks = torch.empty(len(labels), dtype=torch.float64)
    for module, t in enumerate(trust.tolist()):
        inside = labels == module
        ranks[inside] = rank_order(t * percentile(active[inside]) + (1 - t) * percentile(free[inside]))
    return dict(zip(keys, ranks.split([len(modules.labels[key]) for key in keys]), strict=True))


def _scale_to_unit(values: Tensor, labels: Sequence[str]) -> Tensor:
    """Return each value scaled to 0..1 over the values of the same label; 0 where these are all equal."""
    result = torch.zeros_like(values)
    for label in set(labels):
        same = torch.tensor([other == label for other in labels])
        low, high = values[same].min(), values[same].max()
        result[same] = (values[same] - low) / (high - low) if high > low else 0.0
    return result


def _distrust_highest(u: Tensor, sizes: Tensor, judged: Tensor, max_units: float) -> Tensor:
    """Return trust 0 for judged modules with the highest ``u``, of at most ``max_units`` units in all, and else 1.

    ``u``: unreliability; ``sizes``: numbers of units; ``judged``: bool; all, and the result, are ``[modules]``.
    """
    trust = torch.ones(len(u), dtype=torch.float64)
    for module in torch.argsort(-u, stable=True).tolist():
        if judged[module]:
            if sizes[module] > max_units:
                break
            trust[module] = 0
            max_units -= float(sizes[module])
    return trust


@dataclass(frozen=True)
class Masks:
    """Fixed orders of the units in their modules, for every view (0: all sources; i: all but the i-th)."""

    modules: Tensors  # axis key → the module index of each unit, [views, size] int64
    ranks: Tensors  # axis key → the relative rank of each unit in its module, in (0, 1), lowest first, [views, size]
    fills: Tensors  # name of a weight that reads units → the value that replaces each dropped input, [views, C]
    width: Tensor  # the range of relative ranks around the ratio that has a gradient, [modules]

    def margins(self, ratios: Tensor, view: int = 0) -> dict[str, Tensor]:
        """Return axis key → each unit's relative rank minus its module's pruning ratio; units below 0 are cut.

        ``ratios``: the fraction of each module's units that is cut, ``[modules]``.
        """
        return {key: ranks[view] - ratios[self.modules[key][view]] for key, ranks in self.ranks.items()}

    def gates(self, ratios: Tensor, view: int) -> dict[str, Tensor]:
        """Return axis key → 1 for units that stay, 0 for cut ones, with a gradient to ``ratios`` (:meth:`margins`)."""
        gates = {}
        for key, ranks in self.ranks.items():
            label = self.modules[key][view]
            gates[key] = soft_step(ranks[view], ratios.index_select(0, label), self.width[label]).float()
        return gates

    def cut_shares(self, kept: Mapping[str, tuple[int, ...]]) -> Tensor:
        """Return the fraction of each module's units (view 0) that is not in ``kept``, ``[modules]`` float64."""
        labels = torch.cat([label[0] for label in self.modules.values()])
        is_cut = torch.ones(len(labels), dtype=torch.float64)
        start = 0
        for key, label in self.modules.items():
            is_cut[torch.tensor(kept[key], dtype=torch.int64) + start] = 0
            start += label.shape[1]
        sizes = torch.bincount(labels)
        return torch.zeros(len(sizes), dtype=torch.float64).index_add(0, labels, is_cut) / sizes
