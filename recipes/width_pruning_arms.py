"""Arms of the width-pruning tables: the rows of one pruning at one keep and fold, and differences between two."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from harness import Row
from width_pruning_points import DOMAINS, FOLDS, MEASURED_FISHER, METHODS, level

from regrow.evaluation import mean_and_error

Draw = tuple[int, str]
"""A calibration sample, and the dtype that it was computed in."""
Series = Mapping[Draw, Sequence[float]]
"""Draw → a value per window or item."""


@dataclass(frozen=True)
class Difference:
    """A paired difference, averaged over calibration samples.

    Args:
        mean: Its mean over windows or items.
        error: Its standard error over windows or items.
        spread: The standard deviation of the mean over samples; NaN for a single sample.
        count: The number of windows or items.
    """

    mean: float
    error: float
    spread: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}{'' if math.isnan(self.spread) else f' [{self.spread:.4f}]'}"

    def percent(self) -> str:
        """The same in percent."""
        return f"{100 * self.mean:+.2f} ± {100 * self.error:.2f}"


def paired(arm: Series, other: Series) -> Difference | None:
    """Arm minus other over the draws that both have.

    >>> first, second = (0, "bfloat16"), (1, "float32")
    >>> print(paired({first: [1.0, 2.0], second: [2.0, 3.0]}, {first: [0.5, 1.5], second: [1.0, 1.0]}))
    +1.0000 ± 0.2500 [0.7071]
    """
    both = sorted(set(arm) & set(other))
    if not both:
        return None
    each = [[a - b for a, b in zip(arm[one], other[one], strict=True)] for one in both]
    mean, error = mean_and_error([fmean(row) for row in zip(*each, strict=True)])
    spread = stdev(map(fmean, each)) if len(each) > 1 else math.nan
    return Difference(mean, error, spread, len(each[0]))


def recovered(arm: Series, baseline: Series, dense: Mapping[str, Sequence[float]]) -> tuple[float, float] | None:
    """The fraction of the nats that the baseline loses which the arm does not lose, and its standard error.

    With b, a, d per window, averaged over samples, R = mean(b − a) / mean(b − d), and by the delta method its error is
    that of the mean of ((b − a) − R (b − d)) / mean(b − d).

    >>> draw = (0, "float32")
    >>> found = recovered({draw: [2.0, 3.0]}, {draw: [3.0, 4.5]}, {"float32": [1.0, 2.5]})
    >>> [round(one, 4) for one in found]
    [0.625, 0.125]
    """
    both = sorted(one for one in set(arm) & set(baseline) if one[1] in dense)
    if not both:
        return None
    gains = [fmean(row) for row in zip(*(minus(baseline[one], arm[one]) for one in both), strict=True)]
    losses = [fmean(row) for row in zip(*(minus(baseline[one], dense[one[1]]) for one in both), strict=True)]
    ratio, lost = fmean(gains) / fmean(losses), fmean(losses)
    return ratio, mean_and_error([(gain - ratio * loss) / lost for gain, loss in zip(gains, losses, strict=True)])[1]


def draw(row: Row) -> Draw:
    """The calibration sample of a row, and its dtype."""
    return row["sample"], row["dtype"]


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """The differences of two lists of equal length."""
    return [x - y for x, y in zip(a, b, strict=True)]


@dataclass(frozen=True)
class Arm:
    """The samples of an arm at one keep and fold.

    Args:
        name: The name of the arm.
        fold: The fold.
        rows: One row per calibration sample.
    """

    name: str
    fold: int
    rows: tuple[Row, ...]

    @property
    def baseline(self) -> bool:
        """Whether it can be the baseline: a published method without reconstruction."""
        row = self.rows[0]
        return row["method"] in METHODS[:-1] and not row["reconstruct"] and row["arm"] not in MEASURED_FISHER

    @property
    def draws(self) -> frozenset[Draw]:
        """The calibration samples, and their dtypes."""
        return frozenset(map(draw, self.rows))

    def windows(self, seen: bool = False) -> dict[Draw, list[float]]:
        """Draw → the likelihood of each window of the unseen domains, or of the others."""
        names = FOLDS[self.fold] if seen else FOLDS[1 - self.fold]
        return {draw(row): [value for name in names for value in row["nll"][name]] for row in self.rows}

    def level(self, seen: bool = False, of: frozenset[Draw] = frozenset()) -> float:
        """Mean over draws, or some of them, and windows, in nats per token."""
        names = FOLDS[self.fold] if seen else FOLDS[1 - self.fold]
        return fmean(level(row, names) for row in self.rows if not of or draw(row) in of)

    def bits(self) -> float:
        """Bits per byte of unseen domains, mean over domains and samples."""
        return fmean(row["bits_per_byte"][name] for row in self.rows for name in FOLDS[1 - self.fold])

    def seconds(self) -> str:
        """Seconds of calibration, plan and cut, and of reconstruction, means over samples."""
        first, last = (
            [sum(row["seconds"].get(name, 0) for name in names) for row in self.rows]
            for names in (("calibrate", "plan", "apply"), ("reconstruct",))
        )
        return f"{fmean(first):.0f}" + (f" + {fmean(last):.0f}" if any(last) else "")


def arms(every: Sequence[Row], keep: float, fold: int, on: str = "domains") -> dict[str, Arm]:
    """The arms that have rows, by name."""
    found: dict[str, list[Row]] = {}
    for row in every:
        if (row["keep"], row["fold"], row["on"]) == (keep, fold, on) and "error" not in row:
            found.setdefault(row["arm"], []).append(row)
    return {name: Arm(name, fold, tuple(own)) for name, own in found.items()}


def before(every: Sequence[Row], fold: int) -> Arm:
    """The network before pruning in each dtype, as an arm, on as many windows of seen domains as the pruned ones."""
    own = [row for row in every if row["on"] == DOMAINS and row.get("nll")]
    pruned = [row["nll"] for row in own if row["method"] != "dense" and row["fold"] == fold]
    many = {name: min(len(nll[name]) for nll in pruned) for name in FOLDS[fold] if pruned}
    dense = [row for row in own if row["method"] == "dense"]
    cut = [{name: values[: many.get(name)] for name, values in row["nll"].items()} for row in dense]
    return Arm("dense", fold, tuple({**row, "nll": nll} for row, nll in zip(dense, cut, strict=True)))


def strongest(baselines: Sequence[Arm]) -> Arm | None:
    """The baseline that loses least on the draws that all of them have."""
    common = frozenset.intersection(*(arm.draws for arm in baselines)) if baselines else frozenset()
    return min(baselines, key=lambda arm: arm.level(of=common), default=None)
