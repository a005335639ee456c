"""Axes of a network: sets of tensor dimensions that must be cut or widened together.

Some dimensions of a network's tensors always change together: the output of one layer is the input of the next. An
:class:`Axis` is one such set of dimensions, a *unit* is one index of it (a neuron, a filter, a group of heads), and an
:class:`AxisGraph` holds the axes of a network and every tensor's shape written in them: plain data, made by tracing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
    """How a tensor's dimension takes part in an axis: it produces its units, consumes, scales or shifts them."""

    PRODUCES = "produces"
    CONSUMES = "consumes"
    SCALES = "scales"
    SHIFTS = "shifts"


class Mark(StrEnum):
    """How exactly an axis can be cut: what removing its units does to the function that the network computes.

    * ``NEUTRAL``: only sums read the axis: the cut equals masking, where dropped units count as 0.
    * ``COMPETED``: a softmax or a maximum reads it: the cut equals masking with −∞.
    * ``FOLDED``: its size is a divisor (in a norm or attention scale); the cut rescales the gain or weight next to it.
    * ``RESTATED``: a layer or group norm runs over it, and after the cut over the kept units: masking with 0 differs.
    * ``FROZEN``: it cannot be cut; ``Axis.reason`` has the reason.
    """

    NEUTRAL = "neutral"
    COMPETED = "competed"
    FOLDED = "folded"
    RESTATED = "restated"
    FROZEN = "frozen"


@dataclass(frozen=True)
class Slot:
    """Where the units of an axis lie in one dimension of one tensor, and the role of that dimension.

    Unit ``i`` owns the entries ``offset + o * stride + i * inner + r`` for ``o < outer`` and ``r < inner``. With
    ``outer = inner = 1`` and ``offset = 0`` that is simply entry ``i``.

    Args:
        name: The parameter or buffer, by its dotted name.
        dim: Its dimension, from 0.
        outer: How many times the whole axis is repeated along the dimension.
        stride: Entries from one repetition to the next.
        inner: Contiguous entries per unit in one repetition.
        offset: Entries before the first unit.
        role: What the dimension does with the axis.
    """

    name: str
    dim: int
    outer: int
    stride: int
    inner: int
    offset: int
    role: Role

    def positions(self, size: int) -> Tensor:
        """Return the indices along the dimension that each unit owns, ``[size, outer * inner]`` (int64).

        Args:
            size: How many units the axis has.

        >>> Slot("w", 0, outer=2, stride=6, inner=1, offset=0, role=Role.PRODUCES).positions(3).tolist()
        [[0, 6], [1, 7], [2, 8]]
        """
        units = self.offset + torch.arange(size)[:, None, None] * self.inner
        blocks = torch.arange(self.outer)[None, :, None] * self.stride
        return (units + blocks + torch.arange(self.inner)[None, None, :]).reshape(size, -1)


@dataclass(frozen=True)
class Axis:
    """A set of units (neurons, filters, head groups) that several tensor dimensions share and that change together.

    Args:
        key: The name of its first slot, ``"layers.0.up_proj.weight:0"``, with ``+offset`` or ``/inner`` to be unique.
        size: How many units it has.
        slots: Where the units lie in each tensor, in the order of the network's state dict.
        mark: How exactly it can be cut.
        reason: Why it is frozen, or why it has its mark; empty for a neutral axis.
        count: Group name: axes of a group must keep equal numbers of units, though not the same units; empty if free.
        times: Multiplier in that comparison: ``units kept × times`` must be equal (a rotary pair counts twice).
        least: How many units it must keep: 2 for a repetition, which networks skip if there is only one.
        multiple: Its size must stay a multiple of this, since an operation needs it; 1: any size.
        inside: The key of the axis whose units contain these units (a head's dimensions lie inside the heads).
        ids: The permanent ids of its units, which survive cuts, so that a ledger can name a unit.
        next_id: The id that the next new unit gets: how many units the axis ever had.
        narrow: Why it cannot be widened; empty if it can. A frozen axis can never be widened.
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
        """Whether units of the axis can be cut: it is not frozen."""
        return self.mark is not Mark.FROZEN

    @property
    def kind(self) -> tuple[int, tuple[tuple[str, int, int, int, int, int, Role], ...]]:
        """Return a key that is equal for axes of the same size and role in different blocks, ignoring block numbers."""
        slots = {
            (re.sub(r"(^|\.)\d+(?=\.)", r"\1#", s.name), s.dim, s.outer, s.stride, s.inner, s.offset, s.role)
            for s in self.slots
        }
        return (self.size, tuple(sorted(slots)))

    def consumers(self) -> tuple[Slot, ...]:
        """Return the slots of dimensions that consume the units as input."""
        return tuple(slot for slot in self.slots if slot.role is Role.CONSUMES)

    @property
    def label(self) -> str:
        """Name of the axis in reports, equal in every block: producers → consumers (``up_proj → down_proj``)."""
        made = _modules(slot.name for slot in self.slots if slot.role is Role.PRODUCES)
        read = _modules(slot.name for slot in self.consumers())
        widths = {slot.inner for slot in self.consumers() if slot.inner > 1}
        every = made or _modules(slot.name for slot in self.slots)
        text = f"{_listed(made)} → {_listed(read)}" if read else _listed(every)
        return f"{text} (blocks of {min(widths)})" if widths else text


def _modules(names: Iterable[str]) -> list[str]:
    """Return the last named module in each tensor name, without numbers and repetitions."""
    result = []
    for name in names:
        parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
        result.append(re.sub(r"\d+$", "", parts[-1]) or parts[-1] if parts else name)
    return list(dict.fromkeys(result))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class Example:
    """The input that a network was traced with: positional arguments and keyword arguments of its forward.

    Args:
        args: Positional inputs.
        kwargs: Inputs by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


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
        itemsize: Name → bytes per entry.
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
        exported: Whether the recording on fake data was made by ``torch.export`` and not by regrow's own tracer.
        trained: Whether training mode was traced too, since it reaches more parameters.
        declared: The keys of the axes that the user declared instead of tracing.
        example: The traced input, for verifying.
        recording: The operations and where they read axes (:class:`regrow.tracing.readings.Recording`), to prove a
            change; ``None``: the proof makes a new one.
        network: The id of the traced network: new for every trace, unchanged by cuts and growth.
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
        """How the graph was obtained: ``"export"``, one ``"eager"`` run, or ``"not"`` traced but all declared."""
        if self.declared and self.axes.keys() <= set(self.declared):
            return "not"
        return "export" if self.decisions is None else "eager"

    def sizes(self) -> dict[str, int]:
        """Return axis key → its current number of units."""
        return {axis.key: axis.size for axis in self}

    def free(self) -> tuple[Axis, ...]:
        """Return the axes whose units can be cut."""
        return tuple(axis for axis in self if axis.free)

    def units(
        self,
        only: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
        marks: frozenset[Mark] = frozenset({Mark.NEUTRAL}),
    ) -> tuple[Axis, ...]:
        """Return the axes that a pruning method may cut: free, of the given marks, not inside another chosen axis.

        Axes that must stay equal in size while their units count differently (``Axis.times``) are left out.

        Args:
            only: Patterns (``fnmatch``, or part of a dotted name); each tensor of an axis must match one; empty: all.
            exclude: Patterns; an axis is left out as soon as one of its tensors matches.
            marks: Which marks are allowed; neutral alone unless given.
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
        """Return a copy without everything that dropping some branches removes, for costing what is left."""
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
        """Return a copy with other axes (axis key → axis), as after a cut; everything else is unchanged."""
        return replace(self, axes=axes)


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted tensor name matches a pattern: an ``fnmatch`` of the whole name, or a run of its dotted parts.

    >>> matches("layers.0.mlp.up_proj.weight", "mlp"), matches("layers.0.mlp.up_proj.weight", "layers.1*")
    (True, False)

    Args:
        name: The name of a parameter or buffer.
        pattern: A shell pattern such as ``layers.1*``, or parts such as ``mlp.up_proj``.
    """
    return fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."
