"""Axes of a network: sets of tensor dimensions that must be cut or widened together.

Some dimensions of a network's tensors always change together: the output of one layer is the input of the next. An
:class:`Axis` is one such set of dimensions, a *unit* is one index of it (a neuron, a filter, a group of heads), and an
:class:`AxisGraph` holds the axes of a network and every tensor's shape written in them: plain data, made by tracing.
"""

import re
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import takewhile
from typing import Any
from uuid import uuid4

from torch import Tensor

from regrow.core.axes.axis import (
    Axis,
    Cache,
    Dim,
    Example,
    Mark,
    Product,
    Role,
    Slot,
    Sum,
    axes_in,
    divide_dims,
    size_of,
)
from regrow.core.axes.operations import Branch, Decision, Fold, RecordedStep, Tracer, Work
from regrow.core.tables import Table, format_html, format_text

__all__ = [
    "Axis",
    "AxisGraph",
    "Cache",
    "Decision",
    "Dim",
    "Example",
    "Fold",
    "Mark",
    "Product",
    "RecordedStep",
    "Role",
    "Slot",
    "Sum",
    "Work",
    "axes_in",
    "common_block",
    "matches",
    "size_of",
]


@dataclass(frozen=True)
class Row:
    """One axis in the table of axes; fields with the name of one of :class:`Axis` mean the same.

    ``block``: the path of the numbered block in which the axis lies, or empty; ``tensors``: how many tensors it has
    dimensions of; ``unit_params``, ``unit_macs``: what cutting one unit saves (of one example), 0 if it is frozen.
    """

    key: str
    label: str
    block: str
    size: int
    mark: str
    reason: str
    inside: str
    unit_params: int
    unit_macs: int
    tensors: int


@dataclass(frozen=True)
class AxisGraph:
    """The result of tracing: all axes of a network, and every tensor's shape as products and sums of axes.

    Args:
        axes: Every axis by key, frozen ones too.
        shapes: Parameter or buffer name → its dimensions. Tied tensors appear under each of their names.
        ties: Name → the first name of the same tensor, for every further name.
        parameters: The names in ``shapes`` that are parameters (the others are buffers).
        counted: The weights of which ``keep`` is a fraction: those of linear layers and convolutions; where the
            network looks its input up in an embedding, without the embedding and the output head.
        itemsize: Parameter or buffer name → bytes per entry.
        work: The multiply–accumulates of the traced example, per contraction.
        caches: The keys and values that each attention caches per token.
        integers: ``module:attribute`` → the dimension whose size the attribute holds (``out_features``, ``head_dim``).
        folds: Axis sizes that occur as divisors (in norms, attention scales), and the parameters that absorb a change.
        unreached: Parameters that the example did not use.
        notes: What tracing could not analyse: operations without a rule, with the module and the axes frozen for it.
        branches: Module path → whether the module can be dropped whole, or why not. Only the operations of
            :class:`regrow.Candidates`, until :func:`regrow.with_branches` has examined every module that runs.
        steps: The operations of the network, in the order in which they ran.
        decisions: The data-dependent values of the example, where one eager run was recorded; ``None`` where
            fake data were enough.
        tracer: How the network was recorded on fake data.
        unproven: Why the recording was not compared with the network's own forward pass; empty: it was, and is equal.
        trained: Whether training mode was traced too, since it reaches more parameters.
        example: The traced input, for verifying.
        recording: The operations and where they read axes (:class:`regrow.tracing.readings.Recording`), to prove a
            change; ``None``: the proof makes a new one.
        network: The network's id, for undo stores: new for a trace, and for a plan that rewrites weights that stay.
    """

    axes: Mapping[str, Axis]
    shapes: Mapping[str, tuple[Dim, ...]]
    parameters: frozenset[str]
    counted: tuple[str, ...] = ()
    itemsize: Mapping[str, int] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    work: tuple[Work, ...] = ()
    caches: tuple[Cache, ...] = ()
    integers: Mapping[str, Dim] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()
    unreached: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    branches: Mapping[str, Branch] = field(default_factory=dict)
    steps: tuple[RecordedStep, ...] = field(default=(), compare=False, repr=False)
    decisions: tuple[Decision, ...] | None = field(default=None, compare=False, repr=False)
    tracer: Tracer = field(default=Tracer.RECORD, compare=False, repr=False)
    unproven: str = field(default="", compare=False, repr=False)
    trained: bool = False
    example: Example = field(default_factory=Example, compare=False, repr=False)
    recording: Any = field(default=None, compare=False, repr=False)
    network: str = field(default_factory=lambda: uuid4().hex, compare=False, repr=False)

    def __getitem__(self, key: str) -> Axis:
        return self.axes[key]

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes.values())

    def __len__(self) -> int:
        return len(self.axes)

    def __str__(self) -> str:
        """Return the tables of ``regrow show`` as text: what can be cut, and what is frozen; at most 30 lines."""
        return format_text(self.tables(), self._note)

    def _repr_html_(self) -> str:
        """Return the tables of ``regrow show`` as HTML, for notebooks."""
        return format_html(self.tables(), self._note)

    @property
    def _note(self) -> str:
        """The line below the tables: the summary, and why the recording is unproven."""
        return self.summary() + (f"; unproven on the network itself: {self.unproven}" if self.unproven else "")

    @property
    def recorded(self) -> str:
        """How the network was recorded: on fake data (``"export"``), or in one ``"eager"`` run."""
        return "export" if self.decisions is None else "eager"

    @cached_property
    def consumed(self) -> Mapping[str, frozenset[int]]:
        """Name of a weight that takes units as input → the indices of its dimensions that do (``Role.CONSUMES``)."""
        result: dict[str, set[int]] = {}
        for axis in self:
            for slot in axis.slots:
                if slot.role is Role.CONSUMES:
                    result.setdefault(slot.name, set()).add(slot.dim)
        return {name: frozenset(dims) for name, dims in result.items()}

    def sizes(self) -> dict[str, int]:
        """Return axis key → its current number of units."""
        return {axis.key: axis.size for axis in self}

    def batch_size(self) -> int:
        """Return the batch size of the traced input; 1 if first tensor and last result differ in their leading size."""
        values = (*self.example.args, *self.example.kwargs.values())
        first = next((value for value in values if isinstance(value, Tensor | list | tuple)), None)
        if isinstance(first, list | tuple):
            return max(1, len(first))
        if first is None or first.dim() < 2 or not first.shape[0]:
            return 1
        results = [shape for step in self.steps[-1:] for shape in step.shapes if shape]
        last = size_of(results[0][0], self.sizes()) if results else first.shape[0]
        return first.shape[0] if last == first.shape[0] else 1

    def work_per_example(self) -> tuple[Work, ...]:
        """Return ``work`` of a single example of the batch; contractions that do not depend on the batch stay whole."""
        size = self.batch_size()
        return self.work if size == 1 else tuple(replace(work, dims=divide_dims(work.dims, size)) for work in self.work)

    def inventory(self) -> list[Row]:
        """Return one row of the table per axis, frozen ones too, in the order of the network."""
        sizes = self.sizes()
        names = [name for name in self.shapes if name in self.parameters and name not in self.ties]
        parameters = unit_costs(sizes, [self.shapes[name] for name in names])
        macs = unit_costs(sizes, [work.dims for work in self.work_per_example()])
        rows = []
        for axis in self:
            names = list(dict.fromkeys(slot.name for slot in axis.slots))
            rows.append(
                Row(
                    key=axis.key,
                    label=axis.label,
                    block=common_block(names),
                    size=axis.size,
                    mark=str(axis.mark),
                    reason=axis.reason,
                    inside=axis.inside,
                    unit_params=parameters[axis.key] if axis.free else 0,
                    unit_macs=macs[axis.key] if axis.free else 0,
                    tensors=len(names),
                )
            )
        return rows

    def tables(self, *, everything: bool = False) -> tuple[Table, Table]:
        """Return the tables of ``regrow show``: free axes by kind, frozen ones by reason (``everything``: by key)."""
        return make_tables(self.inventory(), everything=everything)

    def count_entries(self, names: Iterable[str], sizes: Mapping[str, int]) -> int:
        """Return how many entries the named tensors have together at the given axis sizes (key → size, all axes)."""
        return sum(size_of(Product(self.shapes[name]), sizes) for name in names)

    def summary(self) -> str:
        """Return in one line how many axes can be cut, and how many weights and parameters there are."""
        sizes = self.sizes()
        weights = self.count_entries(self.counted, sizes)
        parameters = self.count_entries(self.parameters - self.ties.keys(), sizes)
        keep = f"--keep counts {weights:,} weights, of {parameters:,} parameters"
        return f"{len(self.free())} of {len(self)} axes can be cut; {keep}"

    def free(self) -> tuple[Axis, ...]:
        """Return the axes whose units can be cut."""
        return tuple(axis for axis in self if axis.free)

    def units(
        self,
        only: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        marks: frozenset[Mark] = frozenset({Mark.NEUTRAL}),
    ) -> tuple[Axis, ...]:
        """Return the axes whose units may be cut: free, of the given marks, not inside another chosen axis.

        ``only``: if there are patterns (:func:`matches`), every tensor of an axis must match one; ``exclude``: none
        may. Axes that must stay equal in size while their units count differently (``Axis.times``) are left out.
        """
        uneven = {axis.count for axis in self if axis.count and axis.times != 1}
        chosen = tuple(
            axis
            for axis in self.free()
            if axis.mark in marks
            and axis.count not in uneven
            and (not only or all(any(matches(slot.name, p) for p in only) for slot in axis.slots))
            and not any(matches(slot.name, p) for p in exclude for slot in axis.slots)
        )
        keys = {axis.key for axis in chosen}
        return tuple(axis for axis in chosen if axis.inside not in keys)

    def without(self, branches: Iterable[Branch]) -> "AxisGraph":
        """Return a copy without the tensors, axes and work that dropping ``branches`` removes."""
        removed = list(branches)
        return self.restricted(lambda name: not any(branch.holds(name) for branch in removed))

    def restricted(self, stays: Callable[[str], bool]) -> "AxisGraph":
        """Return a copy with only the modules and tensors whose names ``stays`` accepts, and the axes they hold.

        Steps, branches, notes and recording stay those of the whole network.
        """

        def filtered(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if stays(name)}

        slots = {axis.key: tuple(slot for slot in axis.slots if stays(slot.name)) for axis in self}
        axes = {key: replace(self[key], slots=kept) for key, kept in slots.items() if kept}

        def valid(*dims: Dim) -> bool:
            return axes.keys() >= set(axes_in(Product(dims)))

        return replace(
            self,
            axes={key: replace(axis, inside=axis.inside if axis.inside in axes else "") for key, axis in axes.items()},
            shapes=filtered(self.shapes),
            parameters=frozenset(filter(stays, self.parameters)),
            counted=tuple(filter(stays, self.counted)),
            itemsize=filtered(self.itemsize),
            ties=filtered(self.ties),
            work=tuple(work for work in self.work if stays(work.module) and valid(*work.dims)),
            caches=tuple(cache for cache in self.caches if stays(cache.module) and valid(*cache.keys, *cache.values)),
            integers={name: dim for name, dim in self.integers.items() if stays(name.partition(":")[0]) and valid(dim)},
            folds=tuple(fold for fold in self.folds if stays(fold.weight)),
            unreached=tuple(filter(stays, self.unreached)),
        )


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted tensor name matches a pattern: an ``fnmatch`` of the whole name, or a run of its dotted parts.

    >>> matches("layers.0.mlp.up_proj.weight", "mlp"), matches("layers.0.mlp.up_proj.weight", "layers.1*")
    (True, False)
    """
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def unit_costs(sizes: dict[str, int], products: Iterable[tuple[Dim, ...]]) -> Counter[str]:
    """Return axis key → by how much a sum of products of dimensions falls if that axis, of ``sizes``, loses a unit."""
    savings = Counter[str]()
    for dims in map(Product, products):
        for key in set(axes_in(dims)):
            savings[key] += size_of(dims, sizes) - size_of(dims, ChainMap({key: sizes[key] - 1}, sizes))
    return savings


def make_tables(rows: Sequence[Row], *, everything: bool) -> tuple[Table, Table]:
    """Return a table of free axes, a row per kind, and one of frozen axes, a row per reason (``everything``: each)."""
    alike: dict[tuple[str, str, bool], list[Row]] = {}
    reasons: dict[str, list[Row]] = {}
    for row in rows:
        if row.mark == Mark.FROZEN:
            reasons.setdefault(row.key if everything else re.sub(r"\d+", "#", row.reason), []).append(row)
        else:
            alike.setdefault((row.label, row.mark, bool(row.inside)), []).append(row)
    columns = ("made by → read by", "where", "axes", "units", "mark", "parameters a unit", "MACs a unit")
    free = Table("What can be cut", columns, list(map(_summarize_rows, alike.values())), (2, 3, 5, 6))
    if everything:
        each = [(row.key, row.size, row.reason) for (row,) in reasons.values()]
        return free, Table("Frozen", ("axis", "units", "why"), each, (1,))
    groups = sorted(reasons.values(), key=len, reverse=True)
    lines = [(len(group), group[0].reason, group[0].key) for group in groups]
    return free, Table("Frozen", ("axes", "why (of the first)", "the first"), lines, (0,))


def _summarize_rows(rows: Sequence[Row]) -> tuple[object, ...]:
    """Return the seven cells of the row for free axes of one kind, with spans where they differ (``8–16``)."""
    first, blocks = rows[0], [row.block for row in rows if row.block]
    where = blocks[0] if blocks else first.key
    where += f" … {blocks[-1]}" if len(blocks) > 1 else ""
    spans = []
    for numbers in zip(*((row.size, row.unit_params, row.unit_macs) for row in rows), strict=True):
        low, high = min(numbers), max(numbers)
        spans.append(f"{low:,}" if low == high else f"{low:,}–{high:,}")
    mark = first.mark + (", inside another" if first.inside else "")
    return first.label, where, len(rows), spans[0], mark, *spans[1:]


def common_block(names: list[str]) -> str:
    """Return the path of the outermost numbered block in which all names lie (``model.layers.7``); empty if none."""
    levels = zip(*(name.split(".") for name in names), strict=False)
    shared = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    numbered = [i for i, part in enumerate(shared) if part.isdigit()]
    return ".".join(shared[: numbered[0] + 1]) if numbered else ""
