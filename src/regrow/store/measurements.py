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
    """The size of a model: parameters, multiply–accumulates of one example, bytes.

    Args:
        model: Which model of the run: ``"dense"``, ``"cut"`` (before its layers are fitted), ``"pruned"``,
            ``"recovered"``.
        params_all: All parameters, tied ones once.
        params_counted: The weights of which ``keep`` is a fraction (``AxisGraph.counted``).
        macs: Multiply–accumulates of one example.
        bytes: Bytes of the weights on disk in ``dtype``.
        dtype: The dtype in which bytes are counted.
    """

    model: str
    params_all: Count
    params_counted: Count
    macs: Count
    bytes: Count
    dtype: str = ""


class PerplexityRow(msgspec.Struct, frozen=True):
    """The perplexity of a model on a source, with the negative log-likelihood (``nll``) and standard error.

    Args:
        model: Which model of the run.
        source: The name of the source.
        ppl: The perplexity.
        nll: The mean negative log-likelihood, in nats per token.
        seen: Whether importance was measured on this source.
        se: The standard error of ``nll``.
        tokens: The number of labelled positions.
        bits_per_byte: Bits per UTF-8 byte of the text.
        nll_per_window: The summed negative log-likelihood of each window, in nats.
    """

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
    """The accuracy of a model on a multiple-choice task or a source, with its standard error.

    Args:
        model: Which model of the run.
        task: The name of the task or source.
        acc: The accuracy, 0 to 1.
        n: The number of items.
        acc_se: The standard error of ``acc``.
    """

    model: str
    task: str
    acc: Share
    n: Count
    acc_se: Figure = None


class PairedRow(msgspec.Struct, frozen=True):
    """The difference in negative log-likelihood of two models on the same windows of a source.

    Args:
        source: The name of the source.
        delta_nll: The mean difference (second model − first), in nats per token.
        se: Its standard error over windows.
        of: The two models; dense and pruned if empty.
    """

    source: str
    delta_nll: Figure
    se: Figure = None
    of: list[str] = []


class VerifyRow(msgspec.Struct, frozen=True):
    """The largest difference between the outputs of the masked and the cut model, and its allowed bound.

    Args:
        max_abs_diff: The largest absolute difference of an output.
        bound: The largest difference that is allowed.
        ok: Whether the difference is within the bound.
        dtype: The dtype in which outputs were compared.
    """

    max_abs_diff: Figure
    bound: Figure
    ok: bool = True
    dtype: str = ""


class BudgetRow(msgspec.Struct, frozen=True):
    """The quantity that a budget limits: requested, before the cut, after it, and predicted.

    Args:
        measure: What the budget counts.
        context: The tokens in the key-value cache, if that is counted.
        asked: The requested limit.
        before: The amount before the cut.
        after: The amount after the cut.
        predicted: The milliseconds that the plan predicted, if time is counted; ``after`` is then measured.
    """

    measure: str
    context: Count
    asked: Figure
    before: Figure
    after: Figure
    predicted: Figure = None


class RecoveryRow(msgspec.Struct, frozen=True):
    """One round of recovery after a cut: the method, the tokens used and the seconds taken.

    Args:
        by: The recovery method.
        tokens: The tokens that it used.
        seconds: The seconds that it took.
        round: The number of the round, from 1.
        note: What a reader of results must know.
    """

    by: str
    tokens: Count
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    round: Count = 1
    note: str = ""


class ReconstructionRow(msgspec.Struct, frozen=True):
    """The least squares after a cut: the tokens used, the seconds taken, and the error of each layer.

    Args:
        tokens: The tokens that were fitted to.
        seconds: The seconds that it took.
        layers: Per layer ``weight``, the errors ``before``, ``after`` and ``seen``, ``ridge`` and ``shrinkage``.
        left_out: Name of a layer that was not fitted → why.
        note: What a reader of results must know.
    """

    tokens: Count
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    layers: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    note: str = ""


class TaskRow(msgspec.Struct, frozen=True):
    """A task that was learned: its index, and the accuracy on every task known by then.

    Args:
        name: The name of the task.
        task: The index of the task, from 0.
        accuracy: The accuracy on every task known by then; ``None`` if not measured.
        parameters: The parameters of the network after the task.
        nonzero: Those that are not 0.
        macs: Multiply–accumulates of one example.
        seconds: The seconds that learning took.
    """

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
    """A change of shape during training, with the loss before it and the steps until it was reached again.

    Args:
        task: The index of the task during which the shape changed.
        epoch: The epoch after which it changed.
        steps_watched: The steps for which the loss was watched afterwards.
        loss_before: The smoothed loss before the change.
        recovery_steps: The steps until the loss was at most ``loss_before`` again; ``None`` if it was not.
        grown: Axis key → units added.
        cut: Axis key → units removed.
        dropped: Paths of modules that were dropped.
        back: Paths of modules that were restored.
    """

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
    """The accuracy matrix of a sequence of tasks, with average accuracy, forgetting and transfer.

    Args:
        tasks: The names of the tasks.
        matrix: ``matrix[i][j]``: the accuracy on task j after learning task i.
        before: The accuracy on each task before any was learned.
    """

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


class NetworkRow(msgspec.Struct, frozen=True):
    """The size of a network that a search found."""

    parameters: Count
    nonzero: Count
    macs: Count
    bytes: Count


class SearchResultRow(NetworkRow, frozen=True):
    """The network that a search found, with its accuracy."""

    accuracy: Share


class ScoreRow(NetworkRow, frozen=True):
    """The network that a search found, with the score of an objective whose scores are no accuracies."""

    metric: str
    score: Figure


class TestRow(msgspec.Struct, frozen=True):
    """The test accuracy at the end of a search, and the number of examples."""

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
    "reconstruction": ReconstructionRow,
    "recovery": RecoveryRow,
    "result": ScoreRow,
    "size": SizeRow,
    "task": TaskRow,
    "test": TestRow,
    "verify": VerifyRow,
}
"""Kind of measurement (``what``) → the schema of its row."""
