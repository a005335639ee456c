"""Axes: which dimensions of which tensors of a network belong to one another.

A network is a set of parameters and buffers. Some of their dimensions always change together: the output of one
layer is the input of the next. An :class:`Axis` is one such set of dimensions, a *unit* is one index of it (a neuron,
a filter, a group of attention heads), and an :class:`AxisGraph` holds the axes of a whole network together with every
tensor's shape written in them. Everything here is plain data; tracing makes it, surgery follows it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from regrow.branches import Branch, lies_in
from regrow.dims import Cache, Dim, Product, Sum, axes_in, size_of
from regrow.operations import Decision, Fold, RecordedStep, Work

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
    "matches",
    "size_of",
]


class Role(StrEnum):
    """What a tensor's dimension does with the axis: makes its units, reads them, scales or shifts them one by one."""

    PRODUCES = "produces"
    CONSUMES = "consumes"
    SCALES = "scales"
    SHIFTS = "shifts"


class Mark(StrEnum):
    """What happens to the network's function when units of an axis are taken out.

    * ``NEUTRAL``: only sums read the axis; dropped units count as 0.
    * ``COMPETED``: a softmax or a maximum reads it; dropped units count as −∞.
    * ``FOLDED``: its size stands in a divisor, and surgery folds the change into neighbouring numbers.
    * ``RESTATED``: a norm over the axis is taken over the kept units; no fold makes that equal to masking with 0.
    * ``FROZEN``: it cannot be cut, and the axis says why.
    """

    NEUTRAL = "neutral"
    COMPETED = "competed"
    FOLDED = "folded"
    RESTATED = "restated"
    FROZEN = "frozen"


@dataclass(frozen=True)
class Slot:
    """Where the units of an axis lie in one dimension of one tensor.

    Unit ``i`` owns the entries ``offset + o * stride + i * inner + r`` for ``o < outer`` and ``r < inner``. With
    ``outer = inner = 1`` and ``offset = 0`` that is simply entry ``i``.
    """

    name: str
    dim: int
    outer: int
    stride: int
    inner: int
    offset: int
    role: Role

    def positions(self, size: int) -> Tensor:
        """The entries of each unit, ``[size, outer * inner]`` (int64), for an axis of ``size`` units.

        >>> Slot("w", 0, outer=2, stride=6, inner=1, offset=0, role=Role.PRODUCES).positions(3).tolist()
        [[0, 6], [1, 7], [2, 8]]
        """
        units = self.offset + torch.arange(size)[:, None, None] * self.inner
        blocks = torch.arange(self.outer)[None, :, None] * self.stride
        return (units + blocks + torch.arange(self.inner)[None, None, :]).reshape(size, -1)


@dataclass(frozen=True)
class Axis:
    """One set of indices shared by dimensions of several parameters and buffers.

    Args:
        key: The name of its first slot: ``"layers.0.up_proj.weight:0"``, with ``+offset`` or ``/inner`` where several
            axes lie in the same dimension.
        size: How many units it has.
        slots: Where the units lie, in the order of the network's state.
        mark: What cutting it means.
        reason: Why it is frozen, or what made its mark; empty for a neutral axis.
        count: Axes with the same ``count`` must keep equally many units, though not the same ones; empty if free.
        times: What a unit counts for in that: ``units kept × times`` is what must be equal (a rotary pair counts for
            two entries of a head).
        least: How many units it must keep: 2 for a repetition, which networks skip when there is but one.
        multiple: Its size must stay a multiple of this, for an operation that runs on nothing else; 1 if any will do.
        inside: The key of the axis whose units contain these units (a head's dimensions lie inside the heads).
        ids: The ids of its units; they survive cuts, so a ledger can name a unit for life.
        next_id: How many units it ever had: the next unit id, so that none is used twice.
        narrow: Why it cannot be widened; empty if it can. What cannot be cut cannot be widened either.
    """

    key: str
    size: int
    slots: tuple[Slot, ...]
    mark: Mark = Mark.NEUTRAL
    reason: str = ""
    count: str = ""
    times: int = 1
    least: int = 1
    multiple: int = 1
    inside: str = ""
    ids: tuple[int, ...] = ()
    next_id: int = 0
    narrow: str = ""

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(self.size)))
        object.__setattr__(self, "next_id", max(self.next_id, max(self.ids, default=-1) + 1))

    @property
    def free(self) -> bool:
        """Whether units of it can be cut."""
        return self.mark is not Mark.FROZEN

    @property
    def kind(self) -> tuple[Any, ...]:
        """What it is but for the number of its block: equal for axes of one size and role in every block."""
        slots = ((re.sub(r"(^|\.)\d+(?=\.)", r"\1#", s.name), *astuple(s)[1:]) for s in self.slots)
        return (self.size, *sorted(set(slots)))

    def consumers(self) -> tuple[Slot, ...]:
        """The slots that read the units."""
        return tuple(slot for slot in self.slots if slot.role is Role.CONSUMES)

    @property
    def label(self) -> str:
        """What makes the units and what reads them, the same in every block: ``gate_proj, up_proj → down_proj``."""
        made = _modules(slot.name for slot in self.slots if slot.role is Role.PRODUCES)
        read = _modules(slot.name for slot in self.consumers())
        widths = {slot.inner for slot in self.consumers() if slot.inner > 1}
        every = made or _modules(slot.name for slot in self.slots)
        text = f"{_listed(made)} → {_listed(read)}" if read else _listed(every)
        return f"{text} (blocks of {min(widths)})" if widths else text


def _modules(names: Iterable[str]) -> list[str]:
    """The last named module of each tensor, numbers left out."""
    result = []
    for name in names:
        parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
        result.append(re.sub(r"\d+$", "", parts[-1]) or parts[-1] if parts else name)
    return list(dict.fromkeys(result))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class Example:
    """The input a network was traced with: what it is called with, positional and by name."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AxisGraph:
    """All axes of a network, and the shape of each of its tensors written in them.

    Args:
        axes: Every axis by key, frozen ones too.
        shapes: Parameter or buffer name → its dimensions. Tied tensors appear under each of their names.
        ties: Name → the first name of the same tensor, for every further name.
        parameters: The names in ``shapes`` that are parameters (the others are buffers).
        counted: The weights a ``keep`` fraction is a fraction of: those of linear layers and convolutions; where the
            network looks its input up in an embedding, the embedding and the head that mirrors it are left out.
        itemsize: Name → bytes per entry.
        work: The multiply–accumulates of the traced example, per contraction.
        caches: What each attention reads of every token that went before.
        integers: ``module:attribute`` → the dimension whose size the attribute holds (``out_features``, ``head_dim``).
        folds: Sizes that stand in divisors.
        unreached: Parameters that the example did not use.
        notes: What tracing could not read: operations without a rule, with the module and the axes frozen for it.
        branches: Every module that runs, by path: whether it can be dropped whole, or why not. Only
            what the network offers as candidates, until :func:`regrow.with_branches` has looked.
        steps: What the network does, operation by operation.
        decisions: What the data of the example decided, where one eager run was recorded; ``None`` where fake data
            were enough.
        exported: Whether ``torch.export`` recorded what it does on fake data, since we could not.
        trained: Whether what the network does in training was followed too, since that reaches more parameters.
        declared: The keys of the axes that a user named, and no recording shows.
        example: The traced input, for verifying.
        recording: The operations and where they read axes (:class:`regrow.tracing.readings.Recording`), for the proof
            of a change; ``None`` where it takes a new one.
        network: Which traced network it is of: new for every trace, the same through every change.
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
    exported: bool = field(default=False, compare=False, repr=False)
    trained: bool = False
    declared: tuple[str, ...] = ()
    example: Example = field(default_factory=Example, compare=False, repr=False)
    recording: Any = field(default=None, compare=False, repr=False)
    network: str = field(default_factory=lambda: uuid4().hex, compare=False, repr=False)

    def __getitem__(self, key: str) -> Axis:
        return self.axes[key]

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes.values())

    def __len__(self) -> int:
        return len(self.axes)

    @property
    def recorded(self) -> str:
        """How it was recorded: as an ``"export"`` is, or from one ``"eager"`` run; ``"not"`` if it was declared."""
        if self.declared and self.axes.keys() <= set(self.declared):
            return "not"
        return "export" if self.decisions is None else "eager"

    def sizes(self) -> dict[str, int]:
        """The present size of each axis."""
        return {axis.key: axis.size for axis in self}

    def free(self) -> tuple[Axis, ...]:
        """The axes that can be cut."""
        return tuple(axis for axis in self if axis.free)

    def units(
        self,
        only: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        marks: frozenset[Mark] = frozenset({Mark.NEUTRAL}),
    ) -> tuple[Axis, ...]:
        """The axes a pruning method works on: free, of the given marks, not inside one another.

        Axes that must keep unequal multiples of one number are left to plans made by hand.

        Args:
            only: Patterns (``fnmatch``, or a plain part of a dotted name); each tensor of the axis must match one.
            exclude: Patterns; an axis is left out as soon as one of its tensors matches.
            marks: Which marks to work on. Neutral ones alone, unless asked.
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
        """The same graph without what goes with some branches (to ask what is left to cut, and what it costs)."""
        gone = [path for branch in branches for path in branch.placeholders]

        def stays(name: str) -> bool:
            return not any(lies_in(name, path) for path in gone)

        axes = {a.key: replace(a, slots=own) for a in self if (own := tuple(s for s in a.slots if stays(s.name)))}

        def known(*dims: Dim) -> bool:
            return axes.keys() >= set(axes_in(Product(dims)))

        return replace(
            self,
            axes={key: replace(axis, inside=axis.inside if axis.inside in axes else "") for key, axis in axes.items()},
            shapes={name: dims for name, dims in self.shapes.items() if stays(name)},
            parameters=frozenset(filter(stays, self.parameters)),
            counted=tuple(filter(stays, self.counted)),
            itemsize={name: size for name, size in self.itemsize.items() if stays(name)},
            ties={name: first for name, first in self.ties.items() if stays(name)},
            work=tuple(one for one in self.work if stays(one.module) and known(*one.dims)),
            caches=tuple(one for one in self.caches if stays(one.module) and known(*one.keys, *one.values)),
            integers={at: dim for at, dim in self.integers.items() if stays(at.partition(":")[0]) and known(dim)},
            folds=tuple(fold for fold in self.folds if stays(fold.weight)),
            unreached=tuple(filter(stays, self.unreached)),
        )

    def with_axes(self, axes: Mapping[str, Axis]) -> "AxisGraph":
        """The same graph with other axes (after a cut)."""
        return replace(self, axes=axes)


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted tensor name fits a pattern: an ``fnmatch`` of the whole, or a run of its dotted parts.

    >>> matches("layers.0.mlp.up_proj.weight", "mlp"), matches("layers.0.mlp.up_proj.weight", "layers.1*")
    (True, False)
    """
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."
