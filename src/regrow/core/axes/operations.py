"""Records of the operations of a traced network: their MACs, sizes in divisors, and data-dependent decisions."""

from dataclasses import dataclass
from enum import StrEnum

from regrow.core.axes.axis import Dim


class Tracer(StrEnum):
    """How the operations of a network are recorded on fake tensors; later ones are slower and assume less."""

    # In export mode; the operations of repeated modules are copied from the first
    COPY = "copy"
    # In export mode; every module runs
    FULL = "full"
    # As the network runs without gradients, outside export mode; every module runs
    PLAIN = "plain"
    # By `torch.export`
    EXPORT = "export"


Number = int | float | str | None
# The constants of an operation in order: numbers and words, and lists of them
Numbers = tuple[Number | tuple[Number, ...], ...]


@dataclass(frozen=True)
class Work:
    """Multiply–accumulates of one contraction in a module: the product of the sizes of ``dims``."""

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
        over: The dimension whose size is the divisor.
        weight: The parameter that is multiplied by √(n_old / n_new), or by √(n_new / n_old) for ``"scale"``.
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
    """A data-dependent value that the network used in one run, such as the result of ``.item()`` or of an NMS."""

    op: str
    module: str
    answer: object
