"""Branches: whole modules that can go, as plain data.

What a module gives may reach the rest of a network through additions alone: the body of a residual block, the
attention or the MLP of a decoder layer, one of several operations that are summed. Or it is a residual step as a whole:
its input, plus something. Such a module can be dropped, and the network computes what is left of the sum. So can all
but one of the operations that a :class:`regrow.Candidates` sums, whatever they do.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Gives = Literal["zero", "input", "nothing"]


@dataclass(frozen=True)
class Placeholder:
    """The placeholder of a module that is dropped.

    Args:
        gives: ``"zero"``: zeros in the form of an argument; ``"input"``: the argument as it is;
            ``"nothing"``: ``None``, which a :class:`regrow.Candidates` leaves out of its sum.
        takes: Which argument, by its position or name.
        of: Of how many parts its answer is a tuple; 0 where it answers with a tensor.
        at: Which of them is the tensor; the others are ``None``.
    """

    gives: Gives
    takes: int | str
    of: int = 0
    at: int = 0

    def to_data(self) -> dict[str, Any]:
        """It as JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: object) -> "Placeholder":
        """Read it back.

        Raises:
            ValueError: If the data say something else.

        >>> Placeholder.from_data(Placeholder("zero", "x").to_data())
        Placeholder(gives='zero', takes='x', of=0, at=0)
        """
        if not isinstance(data, dict) or not data.keys() <= {"gives", "takes", "of", "at"}:
            raise ValueError(f"The placeholder of a module is told by gives, takes, of and at; got {str(data)[:60]}")
        gives, takes, of, at = (data.get(name, 0) for name in ("gives", "takes", "of", "at"))
        if gives not in ("zero", "input", "nothing"):
            raise ValueError(f"a dropped module gives 'zero', 'input' or 'nothing'; got {str(gives)[:40]!r}")
        if type(takes) not in (int, str) or (isinstance(takes, int) and not 0 <= takes < 256):
            raise ValueError(f"it takes an argument by position or name; got {str(takes)[:40]!r}")
        if type(of) is not int or type(at) is not int or not 0 <= at < max(of, 1) <= 256:
            raise ValueError(f"it answers with part {str(at)[:20]} of {str(of)[:20]}, which is no part")
        return cls(gives, takes, of, at)


@dataclass(frozen=True)
class Branch:
    """A module that can be dropped, or the reason why it cannot.

    Args:
        module: Its path. What it gives is replaced: by zero, or by its own input (``placeholders[module].gives``).
        placeholders: Its placeholder, and those of every module that nothing but it had use of (the norm in front of an
            attention).
        reason: Why it cannot be dropped; empty if it can.
    """

    module: str
    placeholders: Mapping[str, Placeholder] = field(default_factory=dict)
    reason: str = ""

    @property
    def free(self) -> bool:
        """Whether it can be dropped."""
        return not self.reason

    @property
    def gives(self) -> str:
        """What its placeholder gives: ``"zero"``, ``"input"`` or ``"nothing"``; empty if it cannot be dropped."""
        return self.placeholders[self.module].gives if self.free else ""

    def holds(self, name: str) -> bool:
        """Whether a module or tensor of this name goes with it.

        >>> Branch("a.b", {"a.b": Placeholder("zero", 0)}).holds("a.b.weight")
        True
        """
        return any(lies_in(name, path) for path in self.placeholders)


def lies_in(name: str, path: str) -> bool:
    """Whether a dotted name is a path, or begins with it.

    >>> lies_in("a.b.weight", "a.b"), lies_in("a.bc.weight", "a.b")
    (True, False)
    """
    return f"{name}.".startswith(f"{path}.")
