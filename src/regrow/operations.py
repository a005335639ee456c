"""Records of the operations of a traced network: what they cost, what folds, what they decide."""

from dataclasses import dataclass
from typing import Any

from regrow.dims import Dim


@dataclass(frozen=True)
class Work:
    """Multiply–accumulates of one operation: the product of ``dims``, done in ``module``."""

    module: str
    op: str
    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Fold:
    """A size that stands in a divisor, and the numbers that take up its change.

    A root-mean-square norm divides by the number of units it runs over. When that number goes from ``n_old`` to
    ``n_new``, the kept units stay as if the others were 0 if the gain becomes γ′ = γ·√(n_old / n_new) and the
    constant under the root ε′ = ε·n_old / n_new. An attention that scales by its query size takes √(n_new / n_old)
    into the weight and bias that make the query.

    Args:
        over: The dimension whose size is divided by.
        weight: The parameter that takes up √(n_old / n_new), or √(n_new / n_old) for ``"scale"``.
        kind: ``"norm"`` or ``"scale"``.
        plus: What the network adds to the parameter before it multiplies (1 where the gain is ``1 + γ``).
        epsilon: ``module:attribute`` of the constant under the root; empty for ``"scale"``.
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
    """One recorded operation, so that a cut network can be held against the one that was traced.

    Args:
        op: Its name.
        module: The module in whose forward it ran.
        shapes: The shape of each of its results; ``None`` for what is no tensor.
        numbers: The constants of the call that are not sizes: numbers, truth values and words.
        start: For a slice: how many entries lie before it.
        operands: What it works on, in order: the number of an earlier operation, the name of a parameter or buffer,
            ``"input 0"``, or ``"constant"``.
    """

    op: str
    module: str
    shapes: tuple[tuple[Dim, ...] | None, ...]
    numbers: tuple[Any, ...] = ()
    start: Dim | None = None
    operands: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What data decided at one place of one run.

    Args:
        op: The operation that asked: ``"aten.item.default"``, ``"torchvision.nms.default"``.
        module: The module in whose forward it asked.
        answer: What came of it: a number, or tensors (of positions, mostly).
    """

    op: str
    module: str
    answer: Any
