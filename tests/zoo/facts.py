"""What tracing must find in a network: facts about its axes."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from regrow.core.axes import Axis, AxisGraph, Mark

N, C, F_ = Mark.NEUTRAL, Mark.COMPETED, Mark.FOLDED


class Fact(Protocol):
    """Something that must hold of a traced network."""

    def missed(self, axes: AxisGraph) -> str:
        """What is wrong, in words; empty if the fact holds."""
        ...


@dataclass(frozen=True)
class Has:
    """A free axis of ``size`` units and one of the ``marks`` lies in each of the places (``"name:dim"``)."""

    size: int
    at: tuple[str, ...]
    marks: tuple[Mark, ...] = (N,)
    alone: bool = False
    """Whether it lies nowhere else."""

    def missed(self, axes: AxisGraph) -> str:
        """The places in which no such axis lies."""
        for axis in axes:
            places = places_of(axis)
            if axis.free and axis.size == self.size and places >= set(self.at) and axis.mark in self.marks:
                return "" if not self.alone or places == set(self.at) else f"{axis.key} also lies in {places}"
        near = [f"{a.key} ({a.size}, {a.mark}, {a.reason!r})" for p in self.at for a in lying_at(axes, p)]
        return f"no free axis of {self.size} units in {self.at} with a mark in {self.marks}; there: {sorted(set(near))}"


@dataclass(frozen=True)
class Frozen:
    """No free axis lies in any of the places, and the axis that does says why: its reason contains ``why``."""

    at: tuple[str, ...]
    why: str = ""

    def missed(self, axes: AxisGraph) -> str:
        """The free axes found there, or the missing reason."""
        for place in self.at:
            found = lying_at(axes, place)
            if free := [axis.key for axis in found if axis.free]:
                return f"{free} is free at {place}"
            if not any(axis.reason and self.why in axis.reason for axis in found):
                return f"nothing says why {place} is frozen ({self.why})"
        return ""


@dataclass(frozen=True)
class NotNeutral:
    """No neutral axis lies in any of the places; another mark is welcome if the laws hold for it."""

    at: tuple[str, ...]
    size: int = 0
    """Only axes of this size, if given."""

    def missed(self, axes: AxisGraph) -> str:
        """The neutral axes found there."""
        found = [a for place in self.at for a in lying_at(axes, place) if a.mark is N and self.size in (0, a.size)]
        return f"{[axis.key for axis in found]} is called neutral" if found else ""


@dataclass(frozen=True)
class Widths:
    """The sizes of all outermost neutral axes."""

    sizes: tuple[int, ...]

    def missed(self, axes: AxisGraph) -> str:
        """The sizes found instead."""
        found = sorted(axis.size for axis in axes.free() if axis.mark is N and not axis.inside)
        return "" if found == sorted(self.sizes) else f"outermost neutral axes {found}, not {sorted(self.sizes)}"


@dataclass(frozen=True)
class SameCount:
    """The free axes of ``size`` units at two places differ but must keep equally many units."""

    size: int
    one: str
    other: str

    def missed(self, axes: AxisGraph) -> str:
        """What they say instead."""
        ones, others = (
            [a for a in lying_at(axes, p) if a.free and a.size == self.size] for p in (self.one, self.other)
        )
        if not ones or not others:
            return f"no free axis of {self.size} units at {self.one if not ones else self.other}"
        good = any(a.count and a.count == b.count and a.key != b.key for a in ones for b in others)
        return "" if good else f"{ones[0].key} and {others[0].key} are not tied by count"


@dataclass(frozen=True)
class Noted:
    """A note about what could not be read contains this word."""

    word: str

    def missed(self, axes: AxisGraph) -> str:
        """The notes found instead."""
        return "" if any(self.word in note for note in axes.notes) else f"no note on {self.word!r} in {axes.notes}"


@dataclass(frozen=True)
class Unreached:
    """A parameter that fits the pattern is listed as not reached by the example, and lies in no free axis."""

    pattern: str

    def missed(self, axes: AxisGraph) -> str:
        """Why not."""
        names = [name for name in axes.unreached if fnmatchcase(name, self.pattern)]
        if not names:
            return f"{self.pattern} is not listed as unreached"
        cut = {slot.name for axis in axes.free() for slot in axis.slots} & set(names)
        return f"unreached, yet in a free axis: {sorted(cut)}" if cut else ""


@dataclass(frozen=True)
class Tied:
    """One tensor under two names."""

    one: str
    other: str

    def missed(self, axes: AxisGraph) -> str:
        """The ties found instead."""
        known = {frozenset(pair) for pair in axes.ties.items()}
        return "" if frozenset((self.one, self.other)) in known else f"{self.one} = {self.other} not in {axes.ties}"


@dataclass(frozen=True)
class Hoped:
    """A fact that the design promises and that does not hold yet; the day it does, a test says so."""

    fact: Fact

    def missed(self, axes: AxisGraph) -> str:
        """What is wrong, in words; empty if the fact holds."""
        return self.fact.missed(axes)


def places_of(axis: Axis) -> set[str]:
    """The dimensions in which an axis lies, as ``"name:dim"``."""
    return {f"{slot.name}:{slot.dim}" for slot in axis.slots}


def lying_at(axes: AxisGraph, place: str) -> list[Axis]:
    """The axes, free or not, that lie in a dimension."""
    return [axis for axis in axes if place in places_of(axis)]
