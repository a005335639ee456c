"""What the rows of ``metrics.jsonl`` must hold, by kind: at least what is read again when a run goes on or is shown.

Rows may hold more, and kinds that are not known here may hold anything.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from regrow.store.schemas import Count

Figure = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)] | None
"""A number; ``None`` stands for one that is not finite."""
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class SizeRow(msgspec.Struct, frozen=True):
    """The size of a model."""

    model: str
    params_all: Count
    params_counted: Count
    macs: Count
    bytes: Count
    dtype: str = ""


class PerplexityRow(msgspec.Struct, frozen=True):
    """The perplexity of a model on a source."""

    model: str
    source: str
    ppl: Figure
    nll: Figure
    seen: bool = False
    se: Figure = None
    tokens: Count | None = None
    bits_per_byte: Figure = None
    nll_per_window: list[Figure] = []


class ChoiceRow(msgspec.Struct, frozen=True):
    """The accuracy of a model on a source or task."""

    model: str
    task: str
    acc: Share
    n: Count
    acc_se: Figure = None


class PairedRow(msgspec.Struct, frozen=True):
    """The difference of two models on the same windows."""

    source: str
    delta_nll: Figure
    se: Figure = None
    of: list[str] = []


class VerifyRow(msgspec.Struct, frozen=True):
    """How far the masked and the shrunk model differ."""

    max_abs_diff: Figure
    bound: Figure
    ok: bool = True
    dtype: str = ""


class BudgetRow(msgspec.Struct, frozen=True):
    """What a budget counts, before and after a cut."""

    measure: str
    context: Count
    asked: Figure
    before: Figure
    after: Figure
    predicted: Figure = None


class RecoveryRow(msgspec.Struct, frozen=True):
    """A recovery after a cut."""

    by: str
    tokens: Count
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    round: Count = 1
    note: str = ""


class TaskRow(msgspec.Struct, frozen=True):
    """A task that was learned: its number, and the accuracy on every task known by then."""

    name: str
    task: Count
    accuracy: Annotated[list[Share | None], msgspec.Meta(min_length=1)]
    parameters: Count
    nonzero: Count | None = None
    macs: Count | None = None
    seconds: Figure = None

    def __post_init__(self) -> None:
        if len(self.accuracy) <= self.task:
            raise ValueError(f"Field `accuracy` has {len(self.accuracy)} entries at task {self.task}")


class CommitRow(msgspec.Struct, frozen=True):
    """A change of shape while a network is trained."""

    task: Count
    epoch: Count
    steps_watched: Count
    loss_before: Figure
    recovery_steps: Count | None
    grown: dict[str, Count] = {}
    cut: dict[str, Count] = {}
    dropped: list[str] = []
    back: list[str] = []


class MatrixRow(msgspec.Struct, frozen=True):
    """The accuracy matrix of a sequence of tasks."""

    tasks: list[str]
    matrix: list[list[Share | None]]
    before: list[Share | None]
    average: Figure
    average_along: Figure
    learning: Figure
    forgetting: Figure
    backward_transfer: Figure
    forward_transfer: Figure

    def __post_init__(self) -> None:
        if len(self.matrix) != len(self.tasks) or any(len(row) > len(self.tasks) for row in self.matrix):
            raise ValueError("Field `matrix` has other rows or columns than there are `tasks`")


class MissingTasksRow(msgspec.Struct, frozen=True):
    """Tasks whose data are not there any more."""

    tasks: list[str]


class EpochRow(msgspec.Struct, frozen=True):
    """Where a search stands after an epoch."""

    epoch: Count


class LevelsRow(msgspec.Struct, frozen=True):
    """What each level of a search left out."""

    saved: dict[str, Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]]


class SearchResultRow(msgspec.Struct, frozen=True):
    """The network that a search left; version 0.1 noted neither multiply–accumulates nor bytes."""

    accuracy: Share
    parameters: Count
    nonzero: Count
    macs: Count | None = None
    bytes: Count | None = None


class TestRow(msgspec.Struct, frozen=True):
    """The test at the end of a search."""

    accuracy: Share
    images: Count


KINDS: Mapping[str, type[Any]] = {
    "budget": BudgetRow,
    "choice": ChoiceRow,
    "commit": CommitRow,
    "epoch": EpochRow,
    "found": SearchResultRow,
    "front": EpochRow,
    "gone": MissingTasksRow,
    "growth": CommitRow,
    "levels": LevelsRow,
    "matrix": MatrixRow,
    "paired": PairedRow,
    "perplexity": PerplexityRow,
    "recovery": RecoveryRow,
    "size": SizeRow,
    "task": TaskRow,
    "test": TestRow,
    "verify": VerifyRow,
}
"""Kind of measurement → what its row must hold."""
