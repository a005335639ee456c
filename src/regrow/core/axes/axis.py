"""One axis of a network, and tensor dimensions written in axes: fixed sizes, axis keys, products, concatenations."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.errors import InputError
from regrow.core.sources import LABEL_KEYS, Batch, find_decoder_inputs


@dataclass(frozen=True)
class Product:
    """A flattened dimension: the product of dimensions, outermost first, such as ``heads × head_dim``.

    Args:
        parts: The factors.
    """

    parts: tuple["Dim", ...]


@dataclass(frozen=True)
class Sum:
    """A concatenated dimension: the parts one behind the other, such as ``query ‖ key ‖ value``.

    Args:
        parts: The parts, in order.
    """

    parts: tuple["Dim", ...]


# A dimension: a fixed size, the key of an axis, or a product or sum of dimensions
Dim = int | str | Product | Sum


@dataclass(frozen=True)
class Cache:
    """Dimensions of the keys and values that one attention caches per token, before key-value heads are repeated.

    ``module``: the path of the attention; ``itemsize``: bytes per entry.
    """

    module: str
    keys: tuple[Dim, ...]
    values: tuple[Dim, ...]
    itemsize: int


def size_of(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Return the number of entries of a dimension, given the size of each axis.

    >>> size_of(Product(("kv", Sum((2, "d")))), {"kv": 3, "d": 5})
    21
    """
    match dim:
        case int():
            return dim
        case str():
            return sizes[dim]
        case Product(parts):
            return prod(size_of(part, sizes) for part in parts)
        case Sum(parts):
            return sum(size_of(part, sizes) for part in parts)


def axes_in(dim: Dim) -> Iterator[str]:
    """Yield the keys of the axes in a dimension, with repetitions, outermost and leftmost first."""
    match dim:
        case str():
            yield dim
        case Product(parts) | Sum(parts):
            for part in parts:
                yield from axes_in(part)


def find_occurrences(dim: Dim, key: str, sizes: Mapping[str, int]) -> Iterator[tuple[list[tuple[int, int]], int, int]]:
    """Yield, per place of axis ``key`` in a dimension, the entries of its units as (loops, inner, offset).

    A loop (times, stride) repeats the axis that many times, ``stride`` entries apart; the one of the most times comes
    first. ``inner``: contiguous entries per unit; ``offset``: entries before the first unit; ``sizes``: of all axes.

    >>> list(find_occurrences(Product((3, Sum(("a", 2)))), "a", {"a": 4}))
    [([(3, 6)], 1, 0)]
    """
    match dim:
        case str() if dim == key:
            yield [], 1, 0
        case Sum(parts):
            before = 0
            for part in parts:
                for loops, inner, offset in find_occurrences(part, key, sizes):
                    yield loops, inner, offset + before
                before += size_of(part, sizes)
        case Product(parts):
            for i, part in enumerate(parts):
                times, tail = size_of(Product(parts[:i]), sizes), size_of(Product(parts[i + 1 :]), sizes)
                for loops, inner, offset in find_occurrences(part, key, sizes):
                    around = [(times, size_of(part, sizes) * tail)] if times > 1 else []
                    yield _merge_loops([*around, *((n, s * tail) for n, s in loops)]), inner * tail, offset * tail


def divide_dims(dims: tuple[Dim, ...], divisor: int) -> tuple[Dim, ...]:
    """Return dimensions whose product is divided by ``divisor``, if their fixed sizes contain it; else unchanged.

    >>> divide_dims((128, "a", 3), 64), divide_dims((3, "a"), 64)
    ((2, 'a', 3), (3, 'a'))
    """
    rest = divisor  # what is still to be divided out

    def divide(dim: Dim) -> Dim:
        nonlocal rest
        match dim:
            case int():
                shared = gcd(dim, rest)
                rest //= shared
                return dim // shared
            case Product(parts):
                return Product(tuple(map(divide, parts)))
        return dim

    result = tuple(map(divide, dims))
    return result if rest == 1 else dims


def _merge_loops(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return loops (times, stride in entries), where those that continue each other are one, the most times first."""
    merged: list[tuple[int, int]] = []
    for times, stride in sorted(loops, key=lambda loop: -loop[1]):
        if merged and merged[-1][1] == times * stride:
            merged[-1] = (merged[-1][0] * times, stride)
        else:
            merged.append((times, stride))
    return sorted(merged, key=lambda loop: -loop[0])


class Role(StrEnum):
    """What a tensor's dimension does with units: produce (a weight's outputs), consume (its inputs), scale or shift."""

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
        """(size, sorted fields of the slots, with ``#`` for numbers in names): equal for like axes in other blocks."""
        slots = {
            (re.sub(r"(^|\.)\d+(?=\.)", r"\1#", s.name), s.dim, s.outer, s.stride, s.inner, s.offset, s.role)
            for s in self.slots
        }
        return (self.size, tuple(sorted(slots)))

    def consumers(self) -> tuple[Slot, ...]:
        """Return the slots in dimensions that consume the units as input (the other roles are left out)."""
        return tuple(slot for slot in self.slots if slot.role is Role.CONSUMES)

    @property
    def label(self) -> str:
        """Name of the axis in reports, equal in every block: producers → consumers (``up_proj → down_proj``)."""
        producers = _module_names(slot.name for slot in self.slots if slot.role is Role.PRODUCES)
        consumers = _module_names(slot.name for slot in self.consumers())
        widths = {slot.inner for slot in self.consumers() if slot.inner > 1}
        every = producers or _module_names(slot.name for slot in self.slots)
        text = f"{_join_names(producers)} → {_join_names(consumers)}" if consumers else _join_names(every)
        return f"{text} (blocks of {min(widths)})" if widths else text


def _module_names(names: Iterable[str]) -> list[str]:
    """Return the last named module in each tensor name, without numbers and repetitions (``up_proj``)."""
    result = []
    for name in names:
        parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
        result.append(re.sub(r"\d+$", "", parts[-1]) or parts[-1] if parts else name)
    return list(dict.fromkeys(result))


def _join_names(names: list[str]) -> str:
    """Return up to three names with commas, and how many more there are."""
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


def to_example(example: object, model: nn.Module) -> Example:
    """Convert an example input: a tensor, a tuple or list of inputs, a dict of inputs by name, or a batch.

    Labels in a dict are left out, but for networks of a user's own that take them; the input of a decoder is made of
    them. Raise InputError for anything else, ``None`` and tuples of integers (sizes) included. Nothing is copied.

    >>> to_example({"input": torch.ones(1), "labels": torch.ones(1)}, nn.ReLU()).kwargs
    {'input': tensor([1.])}
    """
    match example:
        case Example():
            return example
        case Batch():
            return Example(example.args, example.kwargs)
        case Tensor():
            return Example((example,))
        case tuple() | list() if example and all(isinstance(size, int) for size in example):
            sizes = ", ".join(map(str, example))
            raise InputError(f"example must hold tensors, got sizes; write torch.ones({sizes})")
        case tuple() | list():
            return Example(tuple(example))
    if isinstance(example, Mapping):
        taken = {} if hasattr(model, "config") else inspect.signature(model.forward).parameters
        named = {str(key): x for key, x in example.items() if key in taken or key not in LABEL_KEYS}
        shift = find_decoder_inputs(model)
        if shift and "decoder_input_ids" not in example and isinstance(labels := example.get("labels"), Tensor):
            named["decoder_input_ids"] = shift(labels)
        return Example((), named)
    raise InputError(
        f"example must be a tensor, a tuple of inputs or a dict of inputs by name, got a {type(example).__name__}; "
        "for example torch.ones(1, 3, 224, 224)"
    )


@dataclass
class AxisTensor:
    """A tensor that follows the network's axes: ``apply`` cuts and widens it like the network's own parameters.

    Args:
        values: The tensor, such as a mask, an anchor or learned thresholds. Entries that a plan adds are 0 (``False``).
        dims: Its dimensions, as in ``AxisGraph.shapes``: axis keys, or numbers where no plan changes them.
        lr: Learning rate of a tensor that is trained; ``None``: it is not trained.
    """

    values: Tensor
    dims: tuple[Dim, ...]
    lr: float | None = None
