"""Typed records of what pages read of run folders (rows of ``metrics.jsonl``, whole runs), and of what they say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import Annotated, Any, TypeVar

import msgspec

from regrow.reports.cells import FoundNetwork
from regrow.reports.quantities import NONE
from regrow.store import metrics
from regrow.store.metrics import Figure
from regrow.store.schemas import Count, RunJson, StageJson

Record = TypeVar("Record")
# Bounded, so that a figure can show them; None if not measured or not finite
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1.001)] | None
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e300)] | None
Spread = Annotated[float, msgspec.Meta(ge=0, le=60)] | None


class BoundedPerplexity(metrics.PerplexityRow, frozen=True):
    """The perplexity of a model on a text domain; bounded, so that a figure can show it."""

    ppl: Annotated[float, msgspec.Meta(gt=0, le=1e200)] | None
    se: Spread = None  # the standard error of the log-perplexity


class PairedDifference(metrics.PairedRow, frozen=True):
    """The mean paired difference of two models' loss per token on a text domain; bounded for figures."""

    # In nats per token; each window counts alike: if lengths differ, it is not the difference of log-perplexities.
    delta_nll: Annotated[float, msgspec.Meta(ge=-60, le=60)] | None
    se: Spread = None


class Commit(metrics.CommitRow, frozen=True):
    """A change of shape in training: a growth, or a cut of a search, which may also restore units."""

    restored: dict[str, Count] = msgspec.field(default_factory=dict)  # axis key → units
    stood: bool = False  # whether what it removed was active before
    logits_moved: Amount = None  # the largest change of a logit


class SearchEpoch(msgspec.Struct, frozen=True):
    """The state of a search after an epoch, of the part of the network that is searched in its stage."""

    epoch: Count
    stage: Count = 0
    accuracy: Figure = None  # on the validation data, 0 to 1
    size: Amount = None  # what is not removed yet, in the measure of the target
    allowed: Amount = None  # the size that is allowed after this epoch


class FoundRow(msgspec.Struct, frozen=True):
    """The network that a search found: its size, and its validation accuracy or another score."""

    parameters: Count
    nonzero: Count  # the parameters that are not 0
    macs: Count  # multiply–accumulates of one example
    bytes: Count
    accuracy: Fraction = None  # None if another score is given
    metric: str = "accuracy"  # the name of the score
    score: Figure = None


class SearchTotals(msgspec.Struct, frozen=True):
    """The size that a search was to reach, and the size that it reached, in its measure."""

    measure: str = ""  # such as `params`
    asked: Amount = None  # the largest allowed size
    size: Amount = None  # the size of what was found


class StageMemoryRow(msgspec.Struct, frozen=True):
    """The peak of memory of a stage of a search, and whether parts were recomputed in the backward pass."""

    peak: Count | None = None  # in bytes
    recomputed: bool = False


class PassTimes(msgspec.Struct, frozen=True):
    """Measured milliseconds of a forward pass of the network before the run, and of its result."""

    whole: Amount = None
    found: Amount = None
    tokens: Count = 0  # of the row that was timed; 0: it was the traced example
    device: str = ""


class TrainingRow(msgspec.Struct, frozen=True):
    """The training of a grown network: of which parameters, its steps, and the loss before and after."""

    train: str  # the parameters that were trained: `new` or `all`
    steps: Count
    loss_before: Figure
    loss_after: Figure


ROWS: dict[str, type[Any]] = {key: row for key, (row, _) in metrics.ROW_KINDS.items() if row is not metrics.MetricsRow}
ROWS |= {
    "commit": Commit,
    "epoch": SearchEpoch,
    "found": FoundRow,
    "growth": Commit,
    "latency": PassTimes,
    "levels": SearchTotals,
    "memory": StageMemoryRow,
    "paired": PairedDifference,
    "perplexity": BoundedPerplexity,
    "result": FoundRow,
    "stages": StageMemoryRow,
    "training": TrainingRow,
}
"""Kind of measurement → the schema of its row, as pages read it."""


@dataclass
class Quality:
    """The perplexity on a text domain, or the accuracy on a task, of the models of a run."""

    name: str  # of the text domain or task
    seen: bool | None = None  # whether a domain was calibrated on; None for a task
    # "before", "cut" (before layers are fitted), "changed" (cut or grown), "recovered" → what was measured
    models: dict[str, BoundedPerplexity | metrics.ChoiceRow] = field(default_factory=dict)
    paired: PairedDifference | None = None  # of the last two models that were compared

    def value(self, model: str) -> float | None:
        """Return the perplexity or accuracy (0 to 1) of a model, a key of ``models``; ``None`` if not measured."""
        row = self.models.get(model)
        if isinstance(row, BoundedPerplexity):
            return row.ppl
        return row.acc if row else None

    def error(self, model: str) -> float | None:
        """Return half the width of the 95 % interval of :meth:`value`, of perplexity its upper half, or ``None``."""
        row = self.models.get(model)
        if isinstance(row, BoundedPerplexity):
            return None if row.ppl is None or row.se is None else row.ppl * math.expm1(1.96 * row.se)
        return None if row is None or row.acc_se is None else 1.96 * row.acc_se

    @property
    def after(self) -> float | None:
        """The perplexity or accuracy at the end of the run; ``None`` if it was not measured."""
        return self.value("recovered" if "recovered" in self.models else "changed")

    @property
    def lost(self) -> float | None:
        """The log-perplexity at the end minus that before, in nats; of a task accuracy minus accuracy; or ``None``.

        If the run has a paired difference, that is returned (:attr:`PairedDifference.delta_nll`). Positive is worse for
        a text domain, better for a task.
        """
        if self.paired and self.paired.delta_nll is not None:
            return self.paired.delta_nll
        before, after = self.value("before"), self.after
        if before is None or after is None:
            return None
        return after - before if self.seen is None else math.log(after) - math.log(before)

    @property
    def recovered(self) -> float | None:
        """The fraction of the log-perplexity lost by the cut that was won back; ``None`` if unknown or not lost."""
        before, after, cut = self.value("before"), self.after, self.value("cut" if "cut" in self.models else "changed")
        if self.seen is None or len(self.models) < 3 or not (before and cut and after):
            return None
        lost = math.log(cut) - math.log(before)
        return (math.log(cut) - math.log(after)) / lost if lost > 0 else None


@dataclass(frozen=True)
class AxisKind:
    """The widths of the axes of one kind, such as the MLPs of all blocks, before and after a run, in order of depth."""

    name: str  # that of its axes, with block numbers replaced by `*`
    rows: list[tuple[str, int, int]]  # key, units before and after

    @property
    def cells(self) -> list[tuple[str, float]]:
        """(layer and units in words, the fraction that is left, 1 at most) of each axis, as cells of a strip."""
        layers = [(key.rpartition(":")[0].removesuffix(".weight"), a, b) for key, a, b in self.rows]
        return [(f"{layer}: {a:,} → {b:,} units", min(1.0, b / a) if a else 1.0) for layer, a, b in layers]

    @property
    def before(self) -> int:
        """The number of units of all its axes together before the run."""
        return sum(before for _, before, _ in self.rows)

    @property
    def after(self) -> int:
        """The number of units of all its axes together after the run."""
        return sum(after for _, _, after in self.rows)


@dataclass(frozen=True)
class TaskResults:
    """The accuracies and sizes after each task of a learning run; empty for other runs."""

    names: list[str]  # of all tasks that are known, in order
    accuracies: list[list[Fraction]]  # [i][j]: on task j after learning task i
    records: list[metrics.TaskRow]  # of each task that was learned
    end: metrics.MatrixRow | None  # the figures of the matrix, once the last task is done


@dataclass(frozen=True)
class Run:
    """The content of a run folder; what is missing or damaged is empty, and named in ``problems``."""

    name: str  # of the folder; of equal names with a number, `small #2`
    file: RunJson  # the content of run.json
    model: str  # the name of the network that the run started from, without folders
    method: str  # several of one network joined by `+`; without one, the command
    code: str  # the user's function that builds the network, `module:function`; empty: there is none
    is_text: bool  # whether it holds a language model with its tokenizer
    settings: dict[str, str]  # of the command and the method, in words
    defaults: dict[str, str]  # of the method, in words
    rows: list[Any]  # of metrics.jsonl, in order, as the records of ROWS
    quality: list[Quality]
    sizes: dict[str, metrics.SizeRow]  # "before", "cut", "changed", "recovered", as in `Quality.models`
    widths: list[AxisKind]  # of the axes that can change
    task_results: TaskResults
    found: FoundNetwork  # the network that a search found
    problems: list[str]  # what is missing or damaged, in words; 20 at most

    def rows_of(self, kind: type[Record]) -> list[Record]:
        """Return the rows of ``metrics.jsonl`` that are of a class among the values of ``ROWS``, in order."""
        return [row for row in self.rows if isinstance(row, kind)]

    def last_of(self, kind: type[Record]) -> Record | None:
        """Return the last row of ``metrics.jsonl`` that is of such a class; ``None`` if there is none."""
        return next(reversed(self.rows_of(kind)), None)

    @property
    def models(self) -> dict[str, str]:
        """The models whose quality was measured, by their key in :attr:`Quality.models` → their title in tables."""
        measured = {name for row in self.quality for name in row.models if row.value(name) is not None}
        changed = "Reconstructed" if "cut" in measured else "Pruned"
        if self.file.verb == "grow":
            changed = "Grown"
        names = {"before": "Before", "cut": "Cut", "changed": changed, "recovered": "Recovered"}
        return {name: title for name, title in names.items() if name in measured}

    @property
    def stages(self) -> list[StageJson]:
        """The runs that made the network, in order, this one last; empty if it is the only one."""
        return [*self.file.stages, *filter(None, [self.file.stage])] if self.file.stages else []


@dataclass(frozen=True)
class SummaryTable:
    """A table whose cells are formatted; the first cell of a row is its label."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    # How dark each cell is, 0 to 1, in the form of `rows`; None: it has no shade; empty: no cell has
    shades: list[list[float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class SummaryRow:
    """A row of the table at the head of a page: a quantity after a run and before it, formatted, and a remark."""

    label: str  # the name of the quantity
    after: str
    before: str = NONE  # a dash where there is no such value
    remark: str = ""


@dataclass(frozen=True)
class Summary:
    """What the head of a page says of a run, and the size and quality by which it is compared with others."""

    sentence: str  # the result in one or two sentences
    figures: list[SummaryRow]  # the table of numbers
    details: list[str]  # further sentences
    size: float | None  # parameters at the end; None if unknown
    quality: float | None  # mean perplexity, or mean accuracy (0 to 1), at the end; None if not measured
    alarms: list[str] = field(default_factory=list)  # warnings: sentences that must not be overlooked


def mean_perplexities(rows: Sequence[Quality]) -> tuple[float | None, float | None]:
    """Return geometric mean perplexities (before, after) over text domains, over those with both if any has both."""
    rows = [row for row in rows if row.seen is not None and row.after is not None]
    rows = [row for row in rows if row.value("before") is not None] or rows
    return _average([row.value("before") for row in rows]), _average([row.after for row in rows])


def _average(values: Sequence[float | None]) -> float | None:
    """Return the geometric mean of the values (above 0) that are not ``None``; ``None`` if there is none."""
    known = [value for value in values if value is not None]
    return geometric_mean(known) if known else None
