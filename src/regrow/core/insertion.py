"""Insertions: copies of residual blocks that compute nothing yet, put into a stack of blocks, as plain data.

A stack is an ``nn.Sequential`` or ``nn.ModuleList`` of blocks whose output is their input plus something. A copy whose
last projections are 0 gives its input unchanged (LLaMA Pro, arXiv 2401.02415; of a block that ends in BatchNorm: weight
and bias of that, Goyal et al., arXiv 1706.02677), so a network with such copies computes what it computed before.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from regrow.core.change import PlanError, whole

MOST_BLOCKS = 4096
"""The largest number of modules of a stack, and of copies that one plan inserts into it."""


@dataclass(frozen=True)
class Stack:
    """A container of modules, with those that can be copied such that the copy gives its input unchanged.

    Args:
        size: How many modules the container has.
        zeros: Index of a module that can be copied → the names, within it, of the parameters that are 0 in a copy.
    """

    size: int
    zeros: Mapping[int, tuple[str, ...]]


@dataclass(frozen=True)
class BlockCopy:
    """A copy of a block in a stack.

    Args:
        position: Its index in the stack after the insertion; at least 1, since a block's input must be the output of
            another block.
        of: The index, before the insertion, of the block that it copies.
        zeros: The names, within the block, of the parameters that are 0 in the copy.
    """

    position: int
    of: int
    zeros: tuple[str, ...] = ()


@dataclass(frozen=True)
class Insertion:
    """Copies of blocks that are inserted into a stack.

    Args:
        size: How many modules the stack has before the insertion.
        copies: The copies, by ascending position.
    """

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
        """Raise ``PlanError`` unless the insertion is valid by itself, without knowing the network.

        Args:
            path: The path of the stack, for the message.

        Raises:
            PlanError: If a position or a block does not exist or occurs twice, or there are too many.
        """
        positions = [copy.position for copy in self.copies]
        if not 0 < self.size <= MOST_BLOCKS or not 0 < len(self.copies) <= MOST_BLOCKS:
            raise PlanError(
                f"stack {path!r}: 1 to {MOST_BLOCKS} blocks are inserted into as many, the plan says "
                f"{len(self.copies):,} into {self.size:,}; make it again for this network"
            )
        if positions != sorted(set(positions)) or positions[0] < 1 or positions[-1] >= self.after:
            raise PlanError(
                f"stack {path!r}: positions of new blocks must be ascending, each once, within 1..{self.after - 1}"
            )
        if odd := next((copy for copy in self.copies if not 0 <= copy.of < self.size), None):
            raise PlanError(f"stack {path!r}: there is no block {odd.of} to copy among {self.size}")
        if any(not all(part for part in name.split(".")) for copy in self.copies for name in copy.zeros):
            raise PlanError(f"stack {path!r}: a parameter that is 0 in a copy has no name; restore the plan")

    def to_data(self) -> dict[str, Any]:
        """Return the insertion as JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> "Insertion":
        """Read an insertion from JSON data, checking the type of every value.

        Args:
            data: What :meth:`to_data` returned.

        Raises:
            PlanError: If a value has the wrong type.
        """
        copies = []
        for one in data["copies"]:
            zeros = tuple(str(name) for name in one["zeros"])
            copies.append(BlockCopy(whole(one["position"], "position"), whole(one["of"], "of"), zeros))
        return cls(whole(data["size"], "size"), tuple(copies))


def check_insertions(insert: Mapping[str, Insertion], remove: Mapping[str, Insertion], others: Iterable[str]) -> None:
    """Raise ``PlanError`` unless a plan's insertions are valid by themselves and together.

    Args:
        insert: Path of a stack → what is inserted.
        remove: Path of a stack → the insertion that is undone.
        others: What else the plan does that no insertion can be combined with, in words.

    Raises:
        PlanError: If one is not valid, or a plan does several things that need plans of their own.
    """
    for path, insertion in (*insert.items(), *remove.items()):
        insertion.check(path)
        if other := next((one for one in (*insert, *remove) if f"{path}.".startswith(f"{one}.") and one != path), ""):
            raise PlanError(f"stack {path!r} lies in stack {other!r}, which the plan changes too; make two plans")
    doing = [*(["inserts blocks"] if insert else []), *(["removes inserted blocks"] if remove else [])]
    if doing and (several := [*doing, *others])[1:]:
        raise PlanError(f"one plan {several[0]}, or {several[1]}; make two")
