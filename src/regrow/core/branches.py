"""Branches: whole modules (residual bodies, attentions, candidate operations) that can be dropped, as plain data.

A module is a branch if its output reaches the rest of the network through additions alone (the body of a residual
block, the attention or the MLP of a decoder layer, one of several operations that are summed), or if its output is its
input plus something. It can be dropped, and the network computes what is left of the sum. So can all but one of the
operations that a :class:`regrow.Candidates` sums, whatever they compute.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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

    def to_data(self) -> dict[str, int | str]:
        """Return the placeholder as JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: object) -> "Placeholder":
        """Read a placeholder from JSON data, checking every value.

        Args:
            data: What :meth:`to_data` returned.

        Raises:
            ValueError: If the data are not those of a placeholder.

        >>> Placeholder.from_data(Placeholder("zero", "x").to_data())
        Placeholder(gives='zero', takes='x', of=0, at=0)
        """
        if not isinstance(data, dict) or data.keys() != {"gives", "takes", "of", "at"}:
            raise ValueError(
                f"a placeholder has the fields gives, takes, of and at; got {str(data)[:60]}; restore the file"
            )
        gives, takes, of, at = (data[name] for name in ("gives", "takes", "of", "at"))
        if gives not in ("zero", "input", "nothing"):
            raise ValueError(f"a dropped module gives 'zero', 'input' or 'nothing'; got {str(gives)[:40]!r}")
        if type(takes) not in (int, str) or (isinstance(takes, int) and not 0 <= takes < 256):
            raise ValueError(f"it takes an argument by position or name; got {str(takes)[:40]!r}")
        if type(of) is not int or type(at) is not int or not 0 <= at < max(of, 1) <= 256:
            raise ValueError(f"it answers with part {str(at)[:20]} of {str(of)[:20]}, which is no part")
        return cls(gives, takes, of, at)


@dataclass(frozen=True)
class Branch:
    """A module that can be dropped whole, with everything that goes with it, or the reason why it cannot.

    Args:
        module: The path of the module. Its output is replaced by zeros, its input or ``None``
            (``placeholders[module].gives``).
        placeholders: Module path → placeholder, for the module and for every module whose output only it uses (the norm
            in front of an attention).
        reason: Why it cannot be dropped; empty if it can.
    """

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

        Args:
            name: Its dotted name.
        """
        return any(lies_in(name, path) for path in self.placeholders)


def lies_in(name: str, path: str) -> bool:
    """Whether a dotted name is that of a module or of anything inside it.

    >>> lies_in("a.b.weight", "a.b"), lies_in("a.bc.weight", "a.b")
    (True, False)

    Args:
        name: The name of a module or tensor.
        path: The path of the module.
    """
    return f"{name}.".startswith(f"{path}.")
