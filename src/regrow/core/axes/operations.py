"""Records of the operations of a traced network: MACs, divisors, data-dependent decisions, and droppable branches.

A module is a branch if its output reaches the rest of the network through additions alone (the body of a residual
block, the attention or the MLP of a decoder layer, one of several operations that are summed), or if its output is its
input plus something. It can be dropped, and the network computes what is left of the sum. So can all but one of the
operations that a :class:`regrow.Candidates` sums, whatever they compute.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from regrow.core.axes.axis import Dim


class Tracer(StrEnum):
    """How the operations of a network are recorded on fake tensors; a later one is tried where an earlier one fails."""

    # In export mode; the operations of repeated modules are copied from the first
    RECORD = "record"
    # As the network runs without gradients, outside export mode; every module runs
    PLAIN = "plain"
    # By `torch.export`
    EXPORT = "export"


Number = int | float | str | None
# The constants of an operation in order: numbers and words, and lists of them
Numbers = tuple[Number | tuple[Number, ...], ...]


@dataclass(frozen=True)
class Work:
    """One contraction, ``op``, in the module at a path; its multiply–accumulates are the product of ``dims``."""

    module: str
    op: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Fold:
    """An axis size used as a divisor (in a norm or attention scale), and the parameter that compensates for a change.

    A root-mean-square norm divides by the number of units it runs over. When that number goes from ``n_old`` to
    ``n_new``, the kept units have the same output as if the others were 0, if the gain becomes γ′ = γ·√(n_old / n_new)
    and the constant under the root ε′ = ε·n_old / n_new. An attention that scales by its query size takes √(n_new /
    n_old) into the weight and bias that make the query.

    Args:
        over: The dimensions whose sizes multiplied are the divisor.
        weight: Name of the parameter that is multiplied by √(n_old / n_new), or √(n_new / n_old) for ``"scale"``.
        kind: ``"norm"`` for a root-mean-square norm, ``"scale"`` for the scale of an attention.
        plus: The constant that the network adds to the parameter before it multiplies (1 where the gain is ``1 + γ``).
        epsilon: ``module:attribute`` that holds the constant under the root; empty for ``"scale"``.
        value: The constant under the root.
    """

    over: tuple[Dim, ...]
    weight: str
    kind: str = "norm"
    plus: float = 0.0
    epsilon: str = ""
    value: float = 0.0


@dataclass(frozen=True)
class RecordedStep:
    """One recorded operation in comparable form, to check that a cut network runs the same operations as the original.

    Args:
        op: The name of the operation.
        module: The path of the module in whose forward it ran.
        shapes: The dimensions of each result; ``None`` for a result that is no tensor.
        numbers: The constants of the call that are not sizes: numbers, truth values and words.
        start: For a slice: how many entries lie before it.
        operands: The inputs, in order: the index of an earlier operation, the name of a parameter or buffer, ``"input
            0"``, or ``"constant"``.
    """

    op: str
    module: str
    shapes: tuple[tuple[Dim, ...] | None, ...]
    numbers: Numbers = ()
    start: Dim | None = None
    operands: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """A data-dependent value (``answer``) that a run used: the result of ``op``, such as ``.item()``, in a module."""

    op: str
    module: str
    answer: object


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
    """A module (by its path) that can be dropped, or the ``reason`` why not; empty: it can be.

    ``placeholders``: path → what replaces that module; they replace the module itself and those that only it uses.
    ``scales``: names of its parameters that scale what it adds: with all of them at 0, the network computes what it
    does without the branch. All branches that have any can be dropped together; a search takes them as operations.
    """

    module: str
    placeholders: Mapping[str, Placeholder] = field(default_factory=dict)
    reason: str = ""
    scales: tuple[str, ...] = field(default=(), compare=False)  # no plan needs them

    @property
    def free(self) -> bool:
        """Whether the module can be dropped."""
        return not self.reason

    @property
    def gives(self) -> str:
        """Output of the placeholder, ``"zero"``, ``"input"`` or ``"nothing"``; empty if it cannot be dropped."""
        return self.placeholders[self.module].gives if self.free else ""

    def holds(self, name: str) -> bool:
        """Whether the module or tensor ``name`` is removed when the branch is dropped.

        >>> Branch("a.b", {"a.b": Placeholder("zero", 0)}).holds("a.b.weight")
        True
        """
        return any(lies_in(name, path) for path in self.placeholders)


def lies_in(name: str, path: str) -> bool:
    """Whether the dotted ``name`` is the module ``path`` itself or lies inside it.

    >>> lies_in("a.b.weight", "a.b"), lies_in("a.bc.weight", "a.b")
    (True, False)
    """
    return f"{name}.".startswith(f"{path}.")
