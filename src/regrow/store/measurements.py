"""Schemas of the rows of ``metrics.jsonl``, by kind: the fields that are needed when a run is resumed or shown.

Rows may have further fields, and rows of unknown kinds may hold anything.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from regrow.store.schemas import Count

Figure = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)] | None
"""A number; ``None`` if it was not finite."""
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class SizeRow(msgspec.Struct, frozen=True):
    """The size of a model: parameters, multiply–accumulates of one example, bytes."""

    model: str
    params_all: Count
    params_counted: Count
    macs: Count
    bytes: Count
    dtype: str = ""


class PerplexityRow(msgspec.Struct, frozen=True):
    """The perplexity of a model on a source, with the negative log-likelihood (``nll``) and standard error."""

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
    """The accuracy of a model on a multiple-choice task or a source, with its standard error."""

    model: str
    task: str
    acc: Share
    n: Count
    acc_se: Figure = None


class PairedRow(msgspec.Struct, frozen=True):
    """The difference in negative log-likelihood of two models on the same windows of a source."""

    source: str
    delta_nll: Figure
    se: Figure = None
    of: list[str] = []


class VerifyRow(msgspec.Struct, frozen=True):
    """The largest difference between the outputs of the masked and the cut model, and its allowed bound."""

    max_abs_diff: Figure
    bound: Figure
    ok: bool = True
    dtype: str = ""


class BudgetRow(msgspec.Struct, frozen=True):
    """The quantity that a budget limits: requested, before the cut, after it, and predicted."""

    measure: str
    context: Count
    asked: Figure
    before: Figure
    after: Figure
    predicted: Figure = None


class RecoveryRow(msgspec.Struct, frozen=True):
    """One round of recovery after a cut: the method, the tokens used and the seconds taken."""

    by: str
    tokens: Count
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    round: Count = 1
    note: str = ""


class TaskRow(msgspec.Struct, frozen=True):
    """A task that was learned: its index, and the accuracy on every task known by then."""

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
    """A change of shape during training, with the loss before it and the steps until it was reached again."""

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
    """The accuracy matrix of a sequence of tasks, with average accuracy, forgetting and transfer."""

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
    """Tasks whose data are no longer available."""

    tasks: list[str]


class EpochRow(msgspec.Struct, frozen=True):
    """The state of a search after an epoch."""

    epoch: Count


class LevelsRow(msgspec.Struct, frozen=True):
    """The cost that each level of a search (operations, filters, weights) removed."""

    saved: dict[str, Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]]


class SearchResultRow(msgspec.Struct, frozen=True):
    """The network that a search found; version 0.1 recorded neither multiply–accumulates nor bytes."""

    accuracy: Share
    parameters: Count
    nonzero: Count
    macs: Count | None = None
    bytes: Count | None = None


class TestRow(msgspec.Struct, frozen=True):
    """The test accuracy at the end of a search, and the number of images."""

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
"""Kind of measurement (``what``) → the schema of its row."""
