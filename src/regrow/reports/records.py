"""What a page shows of a run, as frozen records; msgspec validates and bounds what they hold."""

import math
import re
from collections.abc import Sequence
from typing import Annotated

import msgspec

from regrow.reports import quantities
from regrow.store.metrics import Figure, SizeRow
from regrow.store.schemas import Count

Fraction = Annotated[float, msgspec.Meta(ge=0, le=1.001)] | None
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e300)] | None
LogRatio = Annotated[float, msgspec.Meta(ge=-60, le=60)] | None
Spread = Annotated[float, msgspec.Meta(ge=0, le=60)] | None
Values = Sequence[float | None]
"""One value after each task, or on each task; ``None`` where it was not measured."""


class KeyNumber(msgspec.Struct, frozen=True):
    """A number at the head of a page, with a line below it."""

    label: str
    value: str
    below: str


class Pair(msgspec.Struct, frozen=True):
    """A setting or a version in words."""

    name: str
    value: str


class MissingFile(msgspec.Struct, frozen=True):
    """A file that a run folder lacks, and what the page lacks without it."""

    file: str
    means: str


class SourceRow(msgspec.Struct, frozen=True):
    """A source of data, and how much of it was read."""

    name: str
    origin: str = ""
    calibration_tokens: Count | None = None
    evaluation_tokens: Count | None = None


class SourcePerplexity(msgspec.Struct, frozen=True):
    """The perplexity of a model on a text domain, with the standard error of its logarithm."""

    model: str
    source: str
    ppl: Annotated[float, msgspec.Meta(gt=0, le=1e300)] | None
    seen: bool = False
    se: Spread = None
    tokens: Count | None = None
    bits_per_byte: Figure = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the 95 % interval."""
        if self.ppl is None or self.se is None:
            return None
        factor = math.exp(min(1.96 * self.se, 60))
        return self.ppl / factor, self.ppl * factor


class PairedDifference(msgspec.Struct, frozen=True):
    """The difference of the log-perplexities of two models on a text domain, paired per window."""

    source: str
    delta_nll: LogRatio = None
    se: Spread = None


class Domain(msgspec.Struct, frozen=True):
    """The perplexities of a run on a text domain: of the model before it, after the cut, after the fit and at the end.

    Args:
        source: The name of the text domain.
        seen: Whether it was seen in calibration.
        before: Of the model before the run.
        cut: After the cut, if a reconstruction or recovery followed.
        fitted: After the reconstruction, if a recovery followed.
        after: Of the model that the run wrote.
        delta_nll: The difference of the log-perplexities, paired per window.
        delta_se: Its standard error.
    """

    source: str
    seen: bool = False
    before: SourcePerplexity | None = None
    cut: SourcePerplexity | None = None
    fitted: SourcePerplexity | None = None
    after: SourcePerplexity | None = None
    delta_nll: LogRatio = None
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


class SourceAccuracy(msgspec.Struct, frozen=True):
    """The accuracy of a model on a task."""

    task: str
    model: str
    acc: Fraction
    n: Count
    acc_se: Spread = None
    acc_norm: Fraction = None


class ChoiceTask(msgspec.Struct, frozen=True):
    """The accuracies of a run on a task: before it, after the cut if it was fitted, and at the end."""

    task: str
    before: SourceAccuracy | None = None
    cut: SourceAccuracy | None = None
    after: SourceAccuracy | None = None


class Sizes(msgspec.Struct, frozen=True):
    """The size of the model before and after a run."""

    before: SizeRow | None = None
    after: SizeRow | None = None

    @property
    def left(self) -> float | None:
        """The counted weights after ÷ before."""
        if not (self.before and self.after and self.before.params_counted):
            return None
        return self.after.params_counted / self.before.params_counted


class MaskingCheck(msgspec.Struct, frozen=True):
    """A check of masked = shrunk."""

    max_abs_diff: Amount
    bound: Amount
    dtype: str = ""
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


class Bounds(msgspec.Struct, frozen=True):
    """The scores on both sides of the cut of an axis."""

    dropped_max: float | None = None
    kept_min: float | None = None


class MassiveActivation(msgspec.Struct, frozen=True):
    """A unit with massive activations, and whether it was kept."""

    key: str
    block: str
    kind: str
    unit: int
    ratio: float
    kept: bool | None


class ScoreRows(msgspec.Struct, frozen=True):
    """The metric of the scores, where each axis was cut, and the units with massive activations."""

    metric: str
    bounds: dict[str, Bounds]
    massive: list[MassiveActivation]


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
    def cell(self) -> tuple[bool, str]:
        """Whether the module is of pooled axes, and its words."""
        fit = re.fullmatch(r"( and \d+ more)?(?: (.*))?", self.name.removeprefix(self.space))
        return (bool(fit[1]), fit[2] or "") if fit else (False, "")


def geometric_mean(domains: Sequence[Domain]) -> Mean | None:
    """Return geometric means over the text domains measured on both sides, or after the run only."""
    after = [row for row in domains if row.ppl("after")]
    both = [row for row in after if row.ppl("before")]
    rows = both or after
    if not rows:
        return None

    def over(side: str) -> float | None:
        logs = [math.log(ppl) for row in rows if (ppl := row.ppl(side))]
        return math.exp(sum(logs) / len(logs)) if len(logs) == len(rows) else None

    return Mean(len(rows), over("before"), over("cut"), over("after") or 0.0)
