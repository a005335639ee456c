"""What pages read of run folders: ``findings.json``, and rows of ``metrics.jsonl`` with what only pages need."""

import math
import re
from typing import Annotated, Any

import msgspec

from regrow.reports import quantities
from regrow.store import metrics
from regrow.store.metrics import Figure
from regrow.store.schemas import Count, RunJson, StageJson

Fraction = Annotated[float, msgspec.Meta(ge=0, le=1.001)] | None
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e300)] | None
LogRatio = Annotated[float, msgspec.Meta(ge=-60, le=60)] | None
Spread = Annotated[float, msgspec.Meta(ge=0, le=60)] | None


class SourcePerplexity(metrics.PerplexityRow, frozen=True):
    """The perplexity of a model on a text domain, within the bounds of a figure."""

    ppl: Annotated[float, msgspec.Meta(gt=0, le=1e300)] | None
    se: Spread = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval."""
        if self.ppl is None or self.se is None:
            return None
        factor = math.exp(min(1.96 * self.se, 60))
        return self.ppl / factor, self.ppl * factor


class PairedDifference(metrics.PairedRow, frozen=True):
    """The difference of the log-perplexities of two models on a text domain, within the bounds of a figure."""

    delta_nll: LogRatio
    se: Spread = None


class SourceAccuracy(metrics.ChoiceRow, frozen=True):
    """The accuracy of a model on a task, also normalised by length."""

    acc_norm: Fraction = None


class MaskingCheck(metrics.VerifyRow, frozen=True):
    """A check of masked = shrunk, or of grown = original."""

    argmax_flips: Count | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the difference is within the bound; ``None`` if it was not finite."""
        return None if self.max_abs_diff is None or self.bound is None else self.max_abs_diff <= self.bound


class FittedLayer(msgspec.Struct, frozen=True):
    """A layer that least squares fitted after a cut: its relative errors, and what was chosen."""

    weight: str
    before: Amount = None
    after: Amount = None
    seen: Amount = None
    ridge: Amount = None
    shrinkage: Amount = None


class Reconstruction(msgspec.Struct, frozen=True):
    """The least squares after a cut: the tokens, what layers were fitted to, and where that was judged."""

    tokens: Count
    layers: list[FittedLayer] = []
    left_out: dict[str, str] = {}
    target: str = ""
    choose_on: str | None = None

    @property
    def where(self) -> str:
        """The text on which the fit was judged."""
        return "held-out text" if self.choose_on is None else "left-out sources"


class LearnedTask(metrics.TaskRow, frozen=True):
    """The network after a task, with its widths, and what tasks own of it."""

    remembered: Count | None = None
    widths: dict[str, Amount] = msgspec.field(default_factory=dict)
    owned: dict[str, Fraction] = msgspec.field(default_factory=dict)
    free: dict[str, Fraction] = msgspec.field(default_factory=dict)


class ShapeChange(metrics.CommitRow, frozen=True):
    """A change of shape in training, a growth or a commit of a search, with accuracies before and after."""

    restored: dict[str, Count] = msgspec.field(default_factory=dict)
    stood: bool = False
    accuracy_before: list[Figure] = msgspec.field(default_factory=list)
    accuracy_after: list[Figure] = msgspec.field(default_factory=list)
    logits_moved: Amount = None
    parameters: Count | None = None

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


class SearchEpoch(msgspec.Struct, frozen=True):
    """The state of a search after an epoch: size, allowed size and validation accuracy of its active part."""

    epoch: Count
    stage: Count = 0
    accuracy: Figure = None
    size: Amount = None
    allowed: Amount = None
    nonzero: Count | None = None


class LevelTotals(metrics.LevelsRow, frozen=True):
    """What each level of a search removed and kept, and what the target asked for."""

    kept: dict[str, Fraction] = msgspec.field(default_factory=dict)
    measure: str = ""
    asked: Amount = None
    size: Amount = None


class FoundNetwork(msgspec.Struct, frozen=True):
    """The network that a search found, or its test: accuracy, examples and size."""

    accuracy: Fraction = None
    images: Count | None = None
    parameters: Count | None = None
    nonzero: Count | None = None
    macs: Count | None = None
    bytes: Count | None = None


class PlannedStages(msgspec.Struct, frozen=True):
    """The stages that a memory budget planned: the last part of each, and its peak of memory."""

    ends: list[Count] = []
    peaks: list[Count] = []
    recomputed: bool = False


class StagePeaks(msgspec.Struct, frozen=True):
    """The memory of a stage: planned before the search, predicted at its start, and measured."""

    stage: Count
    last: int | None = None
    planned: Count | None = None
    predicted: Count | None = None
    peak: Count | None = None
    resident: Count | None = None
    recomputed: bool = False


class PassTimes(msgspec.Struct, frozen=True):
    """Measured milliseconds of a pass through the whole space, and through the found network."""

    whole: Amount = None
    found: Amount = None


class TrainingRow(msgspec.Struct, frozen=True):
    """The training of a grown network: of which parameters, its steps, and the loss before and after."""

    train: str
    steps: Count
    loss_before: Figure
    loss_after: Figure


ROWS: dict[str, type[Any]] = {what: row for what, (row, _) in metrics.KINDS.items()} | {
    "choice": SourceAccuracy,
    "commit": ShapeChange,
    "epoch": SearchEpoch,
    "found": FoundNetwork,
    "front": SearchEpoch,
    "growth": ShapeChange,
    "latency": PassTimes,
    "levels": LevelTotals,
    "memory": StagePeaks,
    "paired": PairedDifference,
    "perplexity": SourcePerplexity,
    "reconstruction": Reconstruction,
    "stages": PlannedStages,
    "task": LearnedTask,
    "test": FoundNetwork,
    "training": TrainingRow,
    "verify": MaskingCheck,
}
"""Kind of measurement → the schema of its row, as pages read it."""


class SourceRow(msgspec.Struct, frozen=True):
    """A source of data, and how much of it was read."""

    name: str
    origin: str = ""
    calibration_tokens: Count | None = None
    evaluation_tokens: Count | None = None


class RankVariation(msgspec.Struct, frozen=True):
    """How far the ranks of units of a ranking space move between text domains; of several axes, of all pooled."""

    space: str
    units: Count
    label: str = ""
    significant: Fraction = None
    exceeds: Fraction = None
    exceeds_null: Fraction = None
    spearman: Figure = None
    spearman_shards: Figure = None
    spearman_within: Figure = None

    @property
    def axes(self) -> int:
        """The number of axes whose units were ranked together."""
        return int(pooled[1]) if (pooled := re.match(r"(\d{1,6}) × ", self.space)) else 1


class ModuleRatio(msgspec.Struct, frozen=True):
    """A module of units of an axis, and the fraction of it that is cut at the start, as learned, and as cut.

    It is named "axis cell", "axis and 29 more cell" where axes are pooled, or "axis" if every axis is one module.
    """

    name: str
    space: str
    units: Count
    label: str = ""
    start: Fraction = None
    learned: Fraction = None
    given: Fraction = None
    trust: Fraction = None
    sensitivity: Amount = None
    activity: Fraction = None

    @property
    def switched(self) -> float | None:
        """The weight of the second metric."""
        return None if self.trust is None else 1 - min(self.trust, 1)

    @property
    def cell(self) -> tuple[bool, str]:
        """Whether the module is of pooled axes, and its words."""
        fit = re.fullmatch(r"( and \d+ more)?(?: (.*))?", self.name.removeprefix(self.space))
        return (bool(fit[1]), fit[2] or "") if fit else (False, "")


class HeldOut(msgspec.Struct, frozen=True):
    """The loss on held-out text at a step of learning."""

    step: Count
    held_out: Amount


class RunFindings(msgspec.Struct, frozen=True):
    """``findings.json``: the tables in which a pruning method explains its choice."""

    method: str
    sources: list[str] = []
    spectrum: list[RankVariation] = []
    modules: list[ModuleRatio] = []
    starts: dict[str, Amount] = {}
    history: list[HeldOut] = []
    best_step: Count | None = None
    robust_among_cut: dict[str, Fraction] = {}
    notes: list[str] = []


class RunFile(RunJson, frozen=True):
    """``run.json`` with the present run as a stage of its network."""

    stage: StageJson | None = None
