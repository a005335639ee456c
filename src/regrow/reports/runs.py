"""Records of what a method found out, of learning runs and searches, and of everything that a page shows of a run."""

from typing import Annotated

import msgspec

from regrow.reports import quantities
from regrow.reports.cells import FoundCell
from regrow.reports.records import (
    Amount,
    AxisKind,
    ChoiceTask,
    Domain,
    Fraction,
    MaskingCheck,
    Mean,
    MissingFile,
    ModuleRatio,
    Pair,
    RankVariation,
    Reconstruction,
    ScoreRows,
    Sizes,
    SourceRow,
    geometric_mean,
)
from regrow.store.metrics import BudgetRow, Figure
from regrow.store.schemas import Count, StageJson


class HeldOut(msgspec.Struct, frozen=True):
    """The loss on held-out text at a step of learning."""

    step: Count
    held_out: Amount


class RunFindings(msgspec.Struct, frozen=True):
    """The tables in which a pruning method explains its choice."""

    method: str
    sources: list[str] = []
    spectrum: list[RankVariation] = []
    modules: list[ModuleRatio] = []
    starts: dict[str, Amount] = {}
    history: list[HeldOut] = []
    best_step: Count | None = None
    robust_among_cut: dict[str, Fraction] = {}
    notes: list[str] = []


class LearnedTask(msgspec.Struct, frozen=True):
    """The network after a task: accuracy on every task known by then, size, widths, and what tasks own."""

    name: str
    task: Annotated[int, msgspec.Meta(ge=0, lt=1000)]
    accuracy: list[Fraction]
    parameters: Count | None = None
    nonzero: Count | None = None
    macs: Count | None = None
    remembered: Count | None = None
    seconds: Amount = None
    widths: dict[str, Amount] = {}
    owned: dict[str, Fraction] = {}
    free: dict[str, Fraction] = {}


class ShapeChange(msgspec.Struct, frozen=True):
    """A change of shape in training: a growth in learning, or a commit in a search."""

    epoch: Count
    task: Count = 0
    grown: dict[str, Count] = {}
    restored: dict[str, Count] = {}
    cut: dict[str, Count] = {}
    dropped: list[str] = []
    back: list[str] = []
    stood: bool = False
    accuracy_before: list[Figure] = []
    accuracy_after: list[Figure] = []
    logits_moved: Amount = None
    parameters: Count | None = None
    newborn_gradient: Fraction = None
    newborn_entries: Fraction = None
    recovery_steps: Count | None = None
    steps_watched: Count | None = None

    @property
    def before(self) -> float | None:
        """The mean accuracy just before."""
        return quantities.mean(self.accuracy_before)

    @property
    def after(self) -> float | None:
        """The mean accuracy just after."""
        return quantities.mean(self.accuracy_after)

    @property
    def added(self) -> int:
        """The number of units that it added or restored."""
        return sum(self.grown.values()) + sum(self.restored.values())


class AccuracyMatrix(msgspec.Struct, frozen=True):
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


class SearchEpoch(msgspec.Struct, frozen=True):
    """The state of a search after an epoch: size, allowed size and validation accuracy of its active part."""

    epoch: Count
    stage: Count = 0
    accuracy: Figure = None
    size: Amount = None
    allowed: Amount = None
    nonzero: Count | None = None


class StagePeaks(msgspec.Struct, frozen=True):
    """The memory of a stage: planned before the search, predicted at its start, and measured."""

    stage: Count
    last: int | None = None
    planned: Count | None = None
    predicted: Count | None = None
    peak: Count | None = None
    resident: Count | None = None
    recomputed: bool = False


class FoundNetwork(msgspec.Struct, frozen=True):
    """The network that a search found, or its test: accuracy, examples and size."""

    accuracy: Fraction = None
    images: Count | None = None
    parameters: Count | None = None
    nonzero: Count | None = None
    macs: Count | None = None
    bytes: Count | None = None


class Level(msgspec.Struct, frozen=True):
    """A granularity of a search: the size that it removed, and the fraction that it kept."""

    level: str
    saved: float | None
    kept: float | None


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
    budget: Count | None
    clock: dict[str, Amount]
    levels: list[Level]
    network: FoundNetwork
    test: FoundNetwork
    cells: list[FoundCell]
    topology: list[FoundCell]
    notation: str
    blocks: list[FoundCell]


class Run(msgspec.Struct, frozen=True):
    """What a page shows of a run; what is not known is ``None`` or empty."""

    name: str
    label: str
    verb: str
    command: str
    model: str
    method: str
    keep: Fraction
    measure: str
    target: str
    regular: bool
    budget: BudgetRow | None
    settings: list[Pair]
    method_settings: list[Pair]
    defaults: list[Pair]
    sources: list[SourceRow]
    versions: list[Pair]
    started: str
    finished: str
    seconds: dict[str, float]
    notes: list[str]
    perplexity: list[Domain]
    outcome: str
    choice: list[ChoiceTask]
    size: Sizes
    verify: list[MaskingCheck]
    reconstruction: Reconstruction | None
    widths: list[AxisKind]
    frozen: dict[str, int]
    scores: ScoreRows | None
    findings: RunFindings | None
    course: Course | None
    search: SearchRun | None
    stages: list[StageJson]
    missing: list[MissingFile]
    problems: list[str]

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

    format: str
    runs: list[Run]
    kinds: list[str]
