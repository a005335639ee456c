"""Changes as plain data: of one axis (units kept, restored, added), and of a stack of blocks (copies inserted).

A stack is an ``nn.Sequential`` or ``nn.ModuleList`` of blocks whose output is their input plus something. A copy whose
last projections are 0 gives its input unchanged (LLaMA Pro, arXiv 2401.02415; of a block that ends in BatchNorm: weight
and bias of that, Goyal et al., arXiv 1706.02677), so a network with such copies computes what it computed before.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regrow.core.axes import Axis, Mark, Role, Slot

# The largest number of units that one change may add to an axis
MOST_NEW_UNITS = 2**24
# The largest number of units of an axis
MOST_UNITS = 2**26
# The largest number of modules of a stack, and of copies that one plan inserts into it
MOST_BLOCKS = 4096


class PlanError(ValueError):
    """Raised for a plan that cannot be read or carried out, or does not fit the network to which it is applied."""


@dataclass(frozen=True)
class Fill:
    """How new units are initialised such that the network's outputs do not change.

    Args:
        rule: ``zero_out``: random incoming weights, outgoing weights 0 (on the residual stream that root-mean-square
            norms run over: incoming weights 0); :func:`regrow.fit_new_units` fits such units to data. ``split``: copies
            of kept units, which share the outgoing weights (Net2Wider, Chen et al., 2016).
        seed: Seed of the random weights, and of the choice of units to copy.
    """

    rule: str = "zero_out"
    seed: int = 0


# The values of `Fill.rule`; `regrow.surgery.layout.units_after` carries them out
FILLS = ("zero_out", "split")


@dataclass(frozen=True)
class Change:
    """What a plan does to one axis: units kept, units restored, units added.

    Args:
        size: How many units the axis has before the change.
        keep: The positions of the units that stay, ascending.
        slots: Where the axis lies in each tensor, so that the plan can be checked against another network.
        ids: The ids of the units before the change; empty: 0 to ``size - 1``.
        grow: How many units are added, behind all others.
        fill: How new units are initialised.
        restore: The ids of units cut earlier that come back, ascending. Each returns to its old place: units lie in the
            order of their ids.
    """

    size: int
    keep: tuple[int, ...]
    slots: tuple[Slot, ...]
    ids: tuple[int, ...] = ()
    grow: int = 0
    fill: Fill = field(default_factory=Fill)
    restore: tuple[int, ...] = ()

    @property
    def after(self) -> int:
        """The number of units after the change."""
        return len(self.keep) + len(self.restore) + self.grow

    @property
    def alive(self) -> tuple[int, ...]:
        """The ids of the units that the axis has before the change, by position."""
        return self.ids or tuple(range(self.size))

    @property
    def idle(self) -> bool:
        """Whether the change leaves the axis as it is."""
        return len(self.keep) == self.size == self.after

    @property
    def dropped(self) -> tuple[int, ...]:
        """The positions of the units that are cut, ascending."""
        kept = set(self.keep)
        return tuple(unit for unit in range(self.size) if unit not in kept)

    def check(self, key: str) -> None:
        """Raise ``PlanError`` unless the change of axis ``key`` is valid by itself, without knowing the network."""
        if problem := self._find_problem():
            raise PlanError(f"axis {key!r}: {problem}")

    def _find_problem(self) -> str:
        """Return what is wrong with the change, for a message; empty if nothing is."""
        if not 0 < self.size <= MOST_UNITS:
            return f"an axis has 1 to {MOST_UNITS:,} units, the plan says {self.size:,}"
        if not self.keep:
            return "a plan must keep at least one unit"
        if any(map(operator.ge, self.keep, self.keep[1:])) or self.keep[0] < 0 or self.keep[-1] >= self.size:
            return f"kept units must be ascending, each once, within 0..{self.size - 1}"
        if type(self.grow) is not int or not 0 <= self.grow <= MOST_NEW_UNITS:
            return f"it can grow by 0 to {MOST_NEW_UNITS} units, a whole number; the plan says {str(self.grow)[:40]!r}"
        if not 0 <= self.fill.seed < 2**63:
            return f"a seed is a whole number from 0, below 2**63; got {self.fill.seed}"
        if self.fill.rule not in FILLS:
            return f"new units are filled by {', '.join(FILLS)}; got {self.fill.rule!r}"
        if self.ids and len(self.ids) != self.size:
            return f"{len(self.ids)} unit ids for {self.size} units"
        if list(self.restore) != sorted(set(self.restore)) or min(self.restore, default=0) < 0:
            return "units to restore are named by unit ids, ascending, each once, from 0"
        if self.restore and (living := set(self.restore).intersection(self.alive)):
            return f"unit {min(living)} is alive; only units that were cut can be restored"
        for slot in self.slots:
            if min(slot.dim, slot.offset) < 0 or min(slot.outer, slot.stride, slot.inner) < 1:
                return f"slot {slot} has a negative or empty extent"
        return ""


def sort_units(key: str, units: Iterable[Any]) -> tuple[int, ...]:
    """Return unit positions or ids, ascending; ``PlanError``, which names axis ``key``, for masks and fractions."""
    units = tuple(units)
    if set(map(type, units)) <= {int}:
        return tuple(sorted(units))
    result = []
    for unit in units:
        try:
            if isinstance(unit, bool) or "bool" in str(getattr(unit, "dtype", "")):
                raise TypeError
            result.append(operator.index(unit))
        except TypeError:
            remedy = "give positions, of a mask those of mask.nonzero().flatten()"
            raise PlanError(f"axis {key!r}: a unit is a whole number, got {str(unit)[:40]!r}; {remedy}") from None
    return tuple(sorted(result))


def find_growth_problem(axis: Axis, change: Change, parameter_names: frozenset[str]) -> str:
    """Return why an axis cannot get the units that a change adds, for a message; empty if it can."""
    if axis.narrow:
        return axis.narrow
    zero_out, folded = change.fill.rule == "zero_out", axis.mark is Mark.FOLDED
    if folded and not zero_out:
        return f"{axis.reason}; only new units of value 0 leave its result as it was: take the fill 'zero_out'"
    produced = {(slot.name, slot.dim) for slot in axis.slots if slot.role is Role.PRODUCES}
    consumed = {(slot.name, slot.dim) for slot in axis.consumers()}
    not_consumed = {(slot.name, slot.dim) for slot in axis.slots if slot.role is not Role.CONSUMES}
    shared = ", ".join(sorted(name for name, _ in not_consumed & consumed))
    if shared and not zero_out:
        return f"{shared} reads its units and does something else with them, too; take the fill 'zero_out'"
    # zero_out zeroes the consuming side, of a folded axis the producing one. What is in both sides is 0 in both.
    zeroed, random = (produced, consumed) if folded else (consumed, produced)
    if shared and random <= zeroed:
        return f"{shared} both makes and reads its units: new ones would be 0 on both sides and get no gradient"
    if zero_out and not {name for name, _ in zeroed} & parameter_names:
        return "no parameter is there that could learn to use new units"
    return ""


@dataclass(frozen=True)
class Stack:
    """A container of ``size`` modules, some of which are blocks of which a copy can be made to return its input.

    ``zeros``: index of such a block → the names, within it, of the parameters that must be 0 in a copy for that.
    """

    size: int
    zeros: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class BlockCopy:
    """A copy of module ``of`` of a stack (index before) inserted as module ``position`` (index after).

    ``zeros``: the names, within the block, of the parameters that are 0 in the copy.
    """

    position: int
    of: int
    zeros: tuple[str, ...] = ()


@dataclass(frozen=True)
class Insertion:
    """Copies of blocks, by ascending position, that are inserted into a stack that has ``size`` modules before."""

    size: int
    copies: tuple[BlockCopy, ...]

    @property
    def after(self) -> int:
        """The number of modules after the insertion."""
        return self.size + len(self.copies)

    @property
    def sources(self) -> list[int]:
        """For each module after the insertion, the index before it: of the same module, or of the one it copies."""
        new = {copy.position: copy.of for copy in self.copies}
        old = iter(range(self.size))
        return [new[i] if i in new else next(old) for i in range(self.after)]

    @property
    def kept(self) -> list[int]:
        """For each module before the insertion, its index after it."""
        new = {copy.position for copy in self.copies}
        return [i for i in range(self.after) if i not in new]

    def check(self, path: str) -> None:
        """Raise ``PlanError`` unless the insertion into stack ``path`` is valid by itself."""
        if problem := self._find_problem():
            raise PlanError(f"stack {path!r}: {problem}")

    def _find_problem(self) -> str:
        """Return what is wrong with the insertion, for a message; empty if nothing is."""
        positions = [copy.position for copy in self.copies]
        if not 0 < self.size <= MOST_BLOCKS or not 0 < len(positions) <= MOST_BLOCKS:
            return (
                f"1 to {MOST_BLOCKS} blocks are inserted into as many, the plan says {len(positions):,} into "
                f"{self.size:,}; make it again for this network"
            )
        if positions != sorted(set(positions)) or positions[0] < 1 or positions[-1] >= self.after:
            return f"positions of new blocks must be ascending, each once, within 1..{self.after - 1}"
        for copy in self.copies:
            if not 0 <= copy.of < self.size:
                return f"there is no block {copy.of} to copy among {self.size}"
            if not all(part for name in copy.zeros for part in name.split(".")):
                return "a parameter that is 0 in a copy has no name; restore the plan"
        return ""
