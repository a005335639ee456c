"""``metrics.jsonl``: the measurements of a run; most have a key, so that a resumed run adds none a second time."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec

from regrow.core.errors import InputError
from regrow.core.limits import parse_json
from regrow.store.atomic import write_bytes
from regrow.store.convert import convert, replace_nonfinite
from regrow.store.errors import StoreError, check_readable
from regrow.store.schemas import Count

Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
Figure = Number | None  # a number; None if it was not finite
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]  # a fraction


class MetricsRow(msgspec.Struct, frozen=True):
    """A line of ``metrics.jsonl``, with its kind in ``what``."""

    what: str  # a key of ROW_KINDS, or another kind


class SizeRow(msgspec.Struct, frozen=True):
    """The size of a model: parameters, multiply–accumulates of one example, bytes."""

    model: str  # which model of the run: "dense", "cut" (before its layers are fitted), "pruned", "recovered"
    params_all: Count  # all parameters
    params_counted: Count  # the weights of which keep is a fraction (AxisGraph.counted)
    macs: Count  # of the traced example
    bytes: Count  # bytes of the weights on disk in dtype
    dtype: str = ""  # the dtype in which bytes are counted


class PerplexityRow(msgspec.Struct, frozen=True):
    """The perplexity of a model on a source, with the negative log-likelihood (``nll``) and standard error."""

    model: str  # as in SizeRow
    source: str  # the name of the source
    ppl: Figure  # exp(nll)
    nll: Figure  # the mean negative log-likelihood, in nats per token
    seen: bool = False  # whether importance was measured on this source
    se: Figure = None  # the standard error of nll
    tokens: Count | None = None  # the number of labelled positions
    bits_per_byte: Figure = None  # bits per UTF-8 byte of the text
    nll_per_window: list[Figure] = []  # the summed negative log-likelihood of each window, in nats


class ChoiceRow(msgspec.Struct, frozen=True):
    """The accuracy of a model on a multiple-choice task or a source, with its standard error."""

    model: str  # as in SizeRow
    task: str  # the name of the task or source
    acc: Share  # the accuracy, 0 to 1
    n: Count  # the number of questions or images
    acc_se: Figure = None  # the standard error of acc


class PairedRow(msgspec.Struct, frozen=True):
    """The difference in negative log-likelihood of two models on the same windows of a source."""

    source: str
    delta_nll: Figure  # the mean difference (second model − first), in nats per token
    se: Figure = None  # the standard error of delta_nll
    of: list[str] = []  # the two models; dense and pruned if empty


class VerifyRow(msgspec.Struct, frozen=True):
    """The largest difference between the outputs of the masked and the cut model, and its allowed bound."""

    max_abs_diff: Figure  # absolute
    bound: Figure  # the largest difference that is allowed
    ok: bool = True  # whether the check passed
    dtype: str = ""  # the dtype in which both were run


class BudgetRow(msgspec.Struct, frozen=True):
    """The quantity that a budget limits: requested, before the cut, after it, and predicted."""

    measure: str  # what is counted, as a core.amounts.Measure: "params", "ms" and others
    context: Count  # the tokens in the key-value cache, or of a timed row; 0 if the target names none
    asked: Figure  # the budget, in units of the measure
    before: Figure
    after: Figure
    predicted: Figure = None  # the milliseconds that the plan predicted, if time is counted; after is then measured


class RecoveryRow(msgspec.Struct, frozen=True):
    """One round of recovery after a cut: the method, the tokens used and the seconds taken."""

    by: str  # the method
    tokens: Count
    seconds: Seconds
    round: Count = 1  # the number of the recovery since the cut, from 1
    note: str = ""  # a remark for readers of the results


class ReconstructionRow(msgspec.Struct, frozen=True):
    """The least squares after a cut: the tokens used, the seconds taken, and the error of each layer."""

    tokens: Count
    seconds: Seconds
    layers: list[dict[str, Any]] = []  # per layer weight, the errors before, after and seen, ridge and shrinkage
    left_out: dict[str, str] = {}  # name of a layer weight that was not fitted → why
    note: str = ""  # a remark for readers of the results


class DistillationRow(msgspec.Struct, frozen=True):
    """The training of a cut model on what the model before the cut predicts: tokens, seconds and steps."""

    tokens: Count
    seconds: Seconds
    steps: Count


class TaskRow(msgspec.Struct, frozen=True):
    """A task that was learned: its index, and the accuracy on every task known by then."""

    name: str
    task: Count  # the index of the task, from 0
    accuracy: Annotated[list[Share | None], msgspec.Meta(min_length=1)]  # per task, after this one; None: no data
    parameters: Count  # of the network after learning it
    nonzero: Count | None = None  # those that are not 0
    macs: Count | None = None  # of one example
    remembered: Count | None = None  # bytes of the method's masks, factors and examples
    seconds: Figure = None  # the time that learning it took
    nats: list[Figure] = []  # of text: the loss per token on every task known by then

    def __post_init__(self) -> None:
        if len(self.accuracy) <= self.task:
            raise ValueError(f"Field `accuracy` has {len(self.accuracy)} entries at task {self.task}")


class CommitRow(msgspec.Struct, frozen=True):
    """A change of a network's shape in training: ``commit`` (of a search) or ``growth`` (of continual learning)."""

    task: Count  # the index of the task during which the shape changed
    epoch: Count  # the epoch after which it changed
    grown: dict[str, Count] = {}  # axis key → units added
    cut: dict[str, Count] = {}  # axis key → units removed
    dropped: list[str] = []  # paths of modules that were dropped whole
    back: list[str] = []  # paths of modules that were restored


class MatrixRow(msgspec.Struct, frozen=True):
    """The accuracy matrix of a sequence of tasks, with average accuracy, forgetting and transfer."""

    tasks: list[str]  # their names, in the order of learning
    matrix: list[list[Share | None]]  # matrix[i][j]: accuracy on task j after learning task i; None: no data
    before: list[Share | None]  # the accuracy on each task before any was learned
    average: Figure  # over all tasks, after the last one
    average_along: Figure  # during learning: over the tasks learned by then, averaged over all points in time
    learning: Figure  # on each task just after it was learned
    forgetting: Figure  # this and the next two as in evaluation.continual.Matrix
    backward_transfer: Figure
    forward_transfer: Figure

    def __post_init__(self) -> None:
        if len(self.matrix) != len(self.tasks) or any(len(row) > len(self.tasks) for row in self.matrix):
            raise ValueError("Field `matrix` has other rows or columns than there are `tasks`")


class MissingTasksRow(msgspec.Struct, frozen=True):
    """Tasks whose data are no longer available."""

    tasks: list[str]  # their names


class LevelsRow(msgspec.Struct, frozen=True):
    """The cost that each level of a search (operations, filters, weights) removed."""

    saved: dict[str, Number]  # level → cost, in units of the search's measure


class SearchResultRow(msgspec.Struct, frozen=True):
    """The network that a search found, with its accuracy."""

    accuracy: Share
    parameters: Count
    nonzero: Count  # parameters that are not 0
    macs: Count  # of one example
    bytes: Count  # of parameters and buffers


class TestRow(msgspec.Struct, frozen=True):
    """The test accuracy at the end of a search, and the number of examples."""

    accuracy: Share
    images: Count  # the number of test examples


# Kind of measurement (``what``) → the schema of its rows, and the fields that, with the kind, identify a row of a run;
# ``None``: its number does. Rows may have further fields, and rows of other kinds may hold anything.
ROW_KINDS: Mapping[str, tuple[type[Any], tuple[str, ...] | None]] = {
    "budget": (BudgetRow, ()),
    "choice": (ChoiceRow, ("model", "task", "round")),
    "commit": (CommitRow, None),
    "distillation": (DistillationRow, ()),
    "epoch": (MetricsRow, ("epoch",)),
    "found": (SearchResultRow, ()),
    "gone": (MissingTasksRow, ("tasks",)),
    "growth": (CommitRow, None),
    "latency": (MetricsRow, ()),
    "levels": (LevelsRow, ()),
    "matrix": (MatrixRow, ("tasks",)),
    "memory": (MetricsRow, None),
    "paired": (PairedRow, ("source", "of", "round")),
    "perplexity": (PerplexityRow, ("model", "source", "round")),
    "reconstruction": (ReconstructionRow, ()),
    "recovery": (RecoveryRow, ("round",)),
    "result": (MetricsRow, ()),
    "retrained": (MetricsRow, ("fresh",)),
    "size": (SizeRow, ("model", "round")),
    "stages": (MetricsRow, ()),
    "task": (TaskRow, ("task",)),
    "test": (TestRow, ()),
    "training": (MetricsRow, ()),
    "verify": (VerifyRow, ()),
}
# Kind of measurement → the fields that identify a row, for kinds that have such fields.
KEYS: Mapping[str, tuple[str, ...]] = {what: fields for what, (_, fields) in ROW_KINDS.items() if fields is not None}


@dataclass
class Metrics:
    """The rows of a ``metrics.jsonl`` file, which need not exist; adding a row writes the whole file again, atomically.

    The keys in the file are read once, so only one object at a time may add rows to it.
    """

    path: Path

    def rows(self) -> list[dict[str, Any]]:
        """Return every row, in order; raise StoreError if one does not have the schema of its kind."""
        rows = []
        for where, row in self._iterate_rows():
            if row["what"] in ROW_KINDS:
                convert(row, ROW_KINDS[row["what"]][0], where, "restore it or delete that line")
            rows.append(row)
        return rows

    def add(self, row: Mapping[str, object], number: int | None = None) -> bool:
        """Append a row, its kind in ``row["what"]``, and sync it to the disk; ``False``: a row with its key was there.

        ``number``: how many rows of its kind the run had before; it is the key of kinds that no fields identify, and
        with ``None`` their rows may repeat. NaN and infinity become null.
        """
        plain = replace_nonfinite(row)
        key = _key(plain, number)
        if key is not None and key in self._keys:
            return False
        content = self._read()
        separator = b"\n" if content and not content.endswith(b"\n") else b""
        write_bytes(self.path, content + separator + json.dumps(plain, allow_nan=False).encode() + b"\n")
        if key is not None:
            self._keys.add(key)
        return True

    @cached_property
    def _keys(self) -> set[str | None]:
        """The keys, by :func:`_key`, of all rows of the file."""
        counts: Counter[str] = Counter()
        keys = set()
        for _, row in self._iterate_rows():
            keys.add(_key(row, counts[row["what"]]))
            counts[row["what"]] += 1
        return keys

    def _iterate_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (``FILE: line N`` for messages, row) of each line; raise StoreError for one that is no measurement."""
        for number, line in enumerate(self._read().split(b"\n"), 1):
            where = f"{self.path}: line {number}"
            if line.strip():
                try:
                    row = parse_json(line)
                    convert(row, MetricsRow)
                except (ValueError, InputError):
                    raise StoreError(f"{where} is not a measurement; restore it or delete that line") from None
                assert isinstance(row, dict)
                yield where, row

    def _read(self) -> bytes:
        """Return the content of the file, empty if it is missing; StoreError if it is a link or no regular file."""
        if self.path.is_symlink():
            raise StoreError(f"{self.path} is a symbolic link; put the file itself there")
        if not self.path.exists():
            return b""
        check_readable(self.path)
        return self.path.read_bytes()


def _key(row: Mapping[str, object], number: int | None) -> str | None:
    """Return the key that identifies a row, as JSON text; ``None`` if it may repeat. ``number``: as for ``add``."""
    what = str(row.get("what"))
    if what in KEYS:
        return json.dumps([what, *(row.get(name) for name in KEYS[what])])
    return json.dumps([what, number]) if what in ROW_KINDS and number is not None else None
