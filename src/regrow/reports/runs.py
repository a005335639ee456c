"""What pages show of runs, as frozen records; what is not known is ``None`` or empty."""

import math
from collections.abc import Sequence

import msgspec

from regrow.reports import quantities
from regrow.reports.cells import FoundBlock, FoundCell
from regrow.reports.rows import (
    Amount,
    FoundNetwork,
    Fraction,
    LearnedTask,
    LevelTotals,
    LogRatio,
    MaskingCheck,
    PassTimes,
    Reconstruction,
    RunFile,
    RunFindings,
    SearchEpoch,
    ShapeChange,
    SourceAccuracy,
    SourcePerplexity,
    SourceRow,
    Spread,
    StagePeaks,
    TrainingRow,
)
from regrow.store.metrics import BudgetRow, Figure, RecoveryRow, SizeRow
from regrow.store.schemas import Count, ScoreSummary, StageJson


class KeyNumber(msgspec.Struct, frozen=True):
    """A number at the head of a page, with a line below it."""

    label: str
    value: str
    below: str


class Domain(msgspec.Struct):
    """The perplexities on a text domain: of the model before a run, after the cut, after the fit and at the end."""

    source: str
    seen: bool = False  # in calibration
    before: SourcePerplexity | None = None
    cut: SourcePerplexity | None = None  # if a reconstruction or recovery followed
    fitted: SourcePerplexity | None = None  # after the reconstruction, if a recovery followed
    after: SourcePerplexity | None = None
    delta_nll: LogRatio = None  # the difference of the log-perplexities, paired per window
    delta_se: Spread = None

    def ppl(self, side: str) -> float | None:
        """Return the perplexity of one of the models; ``None`` if it was not measured."""
        measured: SourcePerplexity | None = getattr(self, side)
        return measured.ppl if measured else None

    @property
    def ratio(self) -> float | None:
        """Perplexity after ÷ before."""
        before, after = self.ppl("before"), self.ppl("after")
        if self.delta_nll is not None:
            return math.exp(self.delta_nll)
        return after / before if before and after else None

    @property
    def error(self) -> float | None:
        """Half the 95 % interval of the ratio."""
        ratio, error = self.ratio, self.delta_se
        return None if ratio is None or error is None else 1.96 * ratio * error

    @property
    def recovered(self) -> float | None:
        """The fraction of the log-perplexity lost by the cut that was won back."""
        return quantities.won_back(self.ppl("before"), self.ppl("cut"), self.ppl("after"))


class Mean(msgspec.Struct, frozen=True):
    """Geometric means of perplexities over text domains that were measured on both sides, or only after the run."""

    count: int
    before: float | None
    cut: float | None
    after: float

    @property
    def ratio(self) -> float | None:
        """After ÷ before."""
        return self.after / self.before if self.before else None

    @property
    def recovered(self) -> float | None:
        """The fraction of the log-perplexity lost by the cut that was won back."""
        return quantities.won_back(self.before, self.cut, self.after)


def geometric_mean(domains: Sequence[Domain]) -> Mean | None:
    """Return geometric means over the text domains measured on both sides, or after the run only."""
    after = [row for row in domains if row.ppl("after")]
    rows = [row for row in after if row.ppl("before")] or after
    if not rows:
        return None

    def over(side: str) -> float | None:
        logs = [math.log(ppl) for row in rows if (ppl := row.ppl(side))]
        return math.exp(sum(logs) / len(logs)) if len(logs) == len(rows) else None

    return Mean(len(rows), over("before"), over("cut"), over("after") or 0.0)


class ChoiceTask(msgspec.Struct):
    """The accuracies of a run on a task: before it, after the cut if it was fitted, and at the end."""

    task: str
    before: SourceAccuracy | None = None
    cut: SourceAccuracy | None = None
    after: SourceAccuracy | None = None


class Sizes(msgspec.Struct):
    """The size of the model before and after a run."""

    before: SizeRow | None = None
    after: SizeRow | None = None

    @property
    def left(self) -> float | None:
        """The counted weights after ÷ before."""
        if not (self.before and self.after and self.before.params_counted):
            return None
        return self.after.params_counted / self.before.params_counted


class AxisWidth(msgspec.Struct, frozen=True):
    """The width of an axis before and after a run; depth is its block's number, or its place."""

    key: str
    block: str
    before: int
    after: int
    depth: int = 0


class AxisKind(msgspec.Struct, frozen=True):
    """The axes of one kind in all blocks, in order of depth."""

    kind: str
    numbered: bool
    rows: list[AxisWidth]

    @property
    def before(self) -> int:
        """The units before."""
        return sum(row.before for row in self.rows)

    @property
    def after(self) -> int:
        """The units after."""
        return sum(row.after for row in self.rows)

    @property
    def changed(self) -> int:
        """The number of axes whose width changed."""
        return sum(row.before != row.after for row in self.rows)


class AccuracyMatrix(msgspec.Struct):
    """The accuracy matrix of a sequence of tasks, and the figures that follow from it."""

    tasks: list[str] = []
    matrix: list[list[Fraction]] = []
    before: list[Fraction] = []
    average: Figure = None
    average_along: Figure = None
    learning: Figure = None
    forgetting: Figure = None
    backward_transfer: Figure = None
    forward_transfer: Figure = None


class Course(msgspec.Struct, frozen=True):
    """The measurements of a continual-learning run; the matrix has no figures until the last task is done."""

    matrix: AccuracyMatrix
    records: list[LearnedTask]
    events: list[ShapeChange]
    gone: list[str] = []

    @property
    def measured(self) -> int:
        """The number of learned tasks whose accuracy was measured at the end."""
        rows = self.matrix.matrix
        return sum(value is not None for value in rows[-1][: len(rows)]) if rows else 0

    @property
    def parameters(self) -> int | None:
        """The parameters of the network at the end."""
        return self.records[-1].parameters if self.records else None


class SearchRun(msgspec.Struct, frozen=True):
    """The measurements of a search; ``asked`` and ``reached`` are sizes in the measure of its target."""

    target: str
    measure: str
    asked: Amount
    reached: Amount
    retrained: Count
    inherited: bool
    epochs: list[SearchEpoch]
    front: list[SearchEpoch]
    commits: list[ShapeChange]
    stages: list[StagePeaks]
    recomputed: bool
    budget: int | None
    latency: PassTimes
    levels: LevelTotals | None
    network: FoundNetwork
    test: FoundNetwork
    cells: list[FoundCell]
    blocks: list[FoundBlock]


class Run(msgspec.Struct, frozen=True):
    """What a page shows of a run; settings are in words."""

    name: str
    label: str
    file: RunFile
    model: str
    method: str
    keep: Fraction
    measure: str
    target: str
    regular: bool
    budget: BudgetRow | None
    settings: dict[str, str]
    method_settings: dict[str, str]
    defaults: dict[str, str]
    sources: list[SourceRow]
    perplexity: list[Domain]
    outcome: str
    choice: list[ChoiceTask]
    size: Sizes
    verify: list[MaskingCheck]
    reconstruction: Reconstruction | None
    recovery: RecoveryRow | None
    training: TrainingRow | None
    widths: list[AxisKind]
    frozen: dict[str, int]
    scores: ScoreSummary | None
    findings: RunFindings | None
    course: Course | None
    search: SearchRun | None
    missing: dict[str, str]  # file → what the page lacks without it
    problems: list[str]  # what is left out, and why

    @property
    def stages(self) -> list[StageJson]:
        """The runs that made the network, in order, if it has had more than this one."""
        return [*self.file.stages, *filter(None, [self.file.stage])] if self.file.stages else []

    @property
    def means(self) -> dict[str, Mean | None]:
        """Geometric means of perplexity over domains seen in calibration, unseen ones, and all."""
        seen = [row for row in self.perplexity if row.seen]
        unseen = [row for row in self.perplexity if not row.seen]
        parts = {"seen": seen, "unseen": unseen, "all": self.perplexity}
        return {name: geometric_mean(rows) for name, rows in parts.items()}

    @property
    def kept(self) -> float | None:
        """The fraction of weights kept: the measured one, or else the requested one."""
        if (left := self.size.left) is not None:
            return left
        return self.keep if self.measure in ("", "weights") else None


class Summary(msgspec.Struct, frozen=True):
    """Several runs, and the text domains on which all were evaluated."""

    runs: list[Run]
    domains: list[str]
