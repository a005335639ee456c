"""Branches: whole modules (residual bodies, attentions, candidate operations) that can be dropped, as plain data.

A module is a branch if its output reaches the rest of the network through additions alone (the body of a residual
block, the attention or the MLP of a decoder layer, one of several operations that are summed), or if its output is its
input plus something. It can be dropped, and the network computes what is left of the sum. So can all but one of the
operations that a :class:`regrow.Candidates` sums, whatever they compute.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Gives = Literal["zero", "input", "nothing"]


@dataclass(frozen=True)
class Placeholder:
    """How a dropped module is replaced: by zeros, by one of its inputs, or by ``None``.

    Args:
        gives: The output: ``"zero"``: zeros in the shape of an argument; ``"input"``: the argument unchanged;
            ``"nothing"``: ``None``, which a :class:`regrow.Candidates` leaves out of its sum.
        takes: Which argument that is, by its position or name.
        of: How many parts the output tuple has; 0 if the output is one tensor.
        at: Which part of the tuple is the tensor; the others are ``None``.
    """

    gives: Gives
    takes: int | str
    of: int = 0
    at: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.takes, int) and not 0 <= self.takes < 256:
            raise ValueError(f"it takes an argument by position or name; got {self.takes}")
        if not 0 <= self.at < max(self.of, 1) <= 256:
            raise ValueError(f"it answers with part {self.at} of {self.of}, which is no part")


@dataclass(frozen=True)
class Branch:
    """A module that can be dropped, or the reason why not; placeholders replace it and what only it uses."""

    module: str
    placeholders: Mapping[str, Placeholder] = field(default_factory=dict)
    reason: str = ""

    @property
    def free(self) -> bool:
        """Whether the module can be dropped."""
        return not self.reason

    @property
    def gives(self) -> str:
        """Output of the placeholder, ``"zero"``, ``"input"`` or ``"nothing"``; empty if it cannot be dropped."""
        return self.placeholders[self.module].gives if self.free else ""

    def holds(self, name: str) -> bool:
        """Whether a module or tensor is removed when the branch is dropped.

        >>> Branch("a.b", {"a.b": Placeholder("zero", 0)}).holds("a.b.weight")
        True
        """
        return any(lies_in(name, path) for path in self.placeholders)


def lies_in(name: str, path: str) -> bool:
    """Whether a dotted name is that of a module or of anything inside it.

    >>> lies_in("a.b.weight", "a.b"), lies_in("a.bc.weight", "a.b")
    (True, False)
    """
    return f"{name}.".startswith(f"{path}.")
