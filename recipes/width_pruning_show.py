"""Print the tables of width_pruning.py from its rows; nothing is computed.

    python recipes/width_pruning_show.py screen|test|stages|zero_shot [--model gemma3-270m] [--out FILE]

Perplexities are geometric means over windows. Differences are of the mean negative log-likelihood over windows of the
unseen domains, in nats per token: per window, averaged over the calibration samples that both arms have (computed in
the same dtype), ± standard error over windows. The spread is the standard deviation over samples of the difference.
``recovered`` is (baseline − arm) / (baseline − dense), the fraction of the lost nats that is recovered, ± standard
error by the delta method. The baseline is the one that loses least in this very table, without reconstruction, on the
samples that all baselines have: no other choice is harder to beat. ``recovered of reconstructed`` is the same against
that baseline with ``--reconstruct``.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rows import head, line, rows
from width_pruning import OUT
from width_pruning_bench import MARGIN, PER_BYTE, unpack
from width_pruning_points import (
    CONTRASTS,
    DOMAINS,
    FOLDS,
    GPRUNE,
    KEEPS,
    LEFT_OUT,
    METHODS,
    RECONSTRUCTED,
    STAGE_ARMS,
    TASKS,
    Row,
    level,
    named,
)

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
    gains = [fmean(row) for row in zip(*(_minus(baseline[one], arm[one]) for one in both), strict=True)]
    losses = [fmean(row) for row in zip(*(_minus(baseline[one], dense[one[1]]) for one in both), strict=True)]
    ratio, lost = fmean(gains) / fmean(losses), fmean(losses)
    return ratio, mean_and_error([(gain - ratio * loss) / lost for gain, loss in zip(gains, losses, strict=True)])[1]


def draw(row: Row) -> Draw:
    """The calibration sample of a row, and its dtype."""
    return row["sample"], row["dtype"]


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
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
        return self.rows[0]["method"] in METHODS[:-1] and not self.rows[0]["reconstruct"]

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


def screen_table(every: Sequence[Row]) -> Iterator[str]:
    """What the best baselines lose on domains that were left out of calibration, and how many were tried."""
    yield head(("keep", "fold", "baseline", "nats lost, first domain left out", "all left out", "to the best"))
    dense = {(row["on"], row["dtype"]): row for row in every if row["method"] == "dense"}
    for keep in sorted(KEEPS, reverse=True):
        for fold, names in enumerate(FOLDS):
            own = [{name: arms(every, keep, fold, LEFT_OUT + name)} for name in names]
            found: dict[str, dict[str, list[float]]] = {}
            for one in own:
                for name, cells in one.items():
                    for arm, cell in cells.items():
                        row = cell.rows[0]
                        lost = _minus(row["nll"][name], dense[row["on"], row["dtype"]]["nll"][name])
                        found.setdefault(arm, {})[name] = lost
            ordered = sorted(found.items(), key=lambda item: (-len(item[1]), fmean(map(fmean, item[1].values()))))
            for arm, cells in ordered[:12]:
                whole = f"{fmean(map(fmean, cells.values())):.4f}" if len(cells) == len(names) else ""
                flat, top = ([value for cell in one.values() for value in cell] for one in (cells, ordered[0][1]))
                other = len(flat) == len(top) and cells is not ordered[0][1]
                to = paired({(0, ""): flat}, {(0, ""): top}) if other else None
                first = f"{fmean(cells[names[0]]):.4f}" if names[0] in cells else ""
                yield line((str(keep), str(fold), arm, first, whole, str(to or "")))
            if len(ordered) > 12:
                yield line((str(keep), str(fold), f"({len(ordered) - 12} more)", "", "", ""))


COLUMNS = (
    *("keep", "fold", "arm", "PPL, unseen", "PPL, seen", "bits/byte, unseen"),
    *("difference to the baseline, nats ± se [spread]", "recovered, %", "recovered of reconstructed, %"),
    "difference, seen",
    *("seconds", "samples"),
)


def test_table(every: Sequence[Row]) -> Iterator[str]:
    """Arms by what they lose on unseen domains, the strongest baseline in bold."""
    for fold in range(len(FOLDS)):
        dense = before(every, fold)
        yield (
            f"Dense, fold {fold}: unseen ({', '.join(FOLDS[1 - fold])}) {math.exp(dense.level()):.2f}, "
            f"{dense.bits():.4f} bits per byte; seen {math.exp(dense.level(seen=True)):.2f}."
        )
    yield ""
    yield head(COLUMNS)
    for keep in sorted(KEEPS, reverse=True):
        for fold in range(len(FOLDS)):
            found = arms(named(every, GPRUNE), keep, fold)
            baseline = strongest([arm for arm in found.values() if arm.baseline])
            if baseline is None:
                continue
            fitted = found.get(baseline.name + RECONSTRUCTED)
            rest = sorted((arm for arm in found.values() if arm is not baseline), key=Arm.level)
            for arm in (baseline, *rest):
                yield line((str(keep), str(fold), *_cells(arm, baseline, fitted, before(every, fold))))


def strongest(baselines: Sequence[Arm]) -> Arm | None:
    """The baseline that loses least on the draws that all of them have."""
    common = frozenset.intersection(*(arm.draws for arm in baselines)) if baselines else frozenset()
    return min(baselines, key=lambda arm: arm.level(of=common), default=None)


def _cells(arm: Arm, baseline: Arm, fitted: Arm | None, dense: Arm) -> Iterator[str]:
    own = arm is baseline
    yield f"**{arm.name}**" if own else arm.name
    yield from (f"{math.exp(arm.level()):.2f}", f"{math.exp(arm.level(seen=True)):.2f}", f"{arm.bits():.4f}")
    yield "" if own else str(paired(arm.windows(), baseline.windows()) or "")
    whole = {dtype: values for (_, dtype), values in dense.windows().items()}
    for other in (baseline, fitted):
        known = None if other is None or other is arm else recovered(arm.windows(), other.windows(), whole)
        yield "" if known is None else f"{100 * known[0]:+.1f} ± {100 * known[1]:.1f}"
    yield "" if own else str(paired(arm.windows(seen=True), baseline.windows(seen=True)) or "")
    yield from (arm.seconds(), str(len(arm.rows)))


def stages_table(every: Sequence[Row]) -> Iterator[str]:
    """Each stage with and without: a difference below 0 is a gain of the first arm."""
    every = named(every, {arm: ("mlp", settings) for arm, settings in STAGE_ARMS.items()})
    yield head(
        ("stage", "arm", "against", "keep", "fold", "difference, nats ± se [spread]", "standard errors", "samples")
    )
    for stage, name, other in CONTRASTS:
        for keep in (0.8, 0.7):
            for fold in range(len(FOLDS)):
                found = arms(every, keep, fold)
                if name in found and other in found:
                    one = paired(found[name].windows(), found[other].windows())
                    if one is not None:
                        ratio = f"{one.mean / one.error:+.1f}" if one.error else ""
                        count = min(len(found[name].rows), len(found[other].rows))
                        yield line((stage, name, other, str(keep), str(fold), str(one), ratio, str(count)))


def zero_shot_table(every: Sequence[Row]) -> Iterator[str]:
    """Accuracy and margins over the items of all tasks, and differences to the strongest baseline, paired by item."""
    columns = ("accuracy, %", "per byte, %", "accuracy, difference", "per byte, difference")
    yield head(("keep", "fold", "arm", *columns, "margin, difference", "margin per byte, difference", "samples"))
    dense = [row for row in every if row["method"] == "dense" and row["on"] == TASKS]
    for keep in sorted(KEEPS, reverse=True):
        for fold in range(len(FOLDS)):
            found = arms(named(every, GPRUNE), keep, fold, TASKS)
            baselines = [arm for arm in found.values() if arm.baseline]
            if not baselines:
                continue
            baseline = max(baselines, key=lambda arm: _mean(items(arm, "right")))
            rest = sorted((arm for arm in found.values() if arm is not baseline), key=lambda arm: arm.name)
            same = tuple(
                {**one, "sample": row["sample"]}
                for row in baseline.rows
                for one in dense
                if one["dtype"] == row["dtype"]
            )
            for arm in (*([Arm("dense", fold, same)] if same else ()), baseline, *rest):
                name = f"**{arm.name}**" if arm is baseline else arm.name
                yield line((str(keep), str(fold), name, *_task_cells(arm, baseline), str(len(arm.rows))))


def _task_cells(arm: Arm, baseline: Arm) -> Iterator[str]:
    for what in ("right", "right_per_byte"):
        yield f"{100 * _mean(items(arm, what)):.2f}"
    for what in ("right", "right_per_byte", "margins", "margins_per_byte"):
        one = None if arm is baseline else paired(items(arm, what), items(baseline, what))
        yield "" if one is None else one.percent() if what.startswith("right") else str(one)


def items(arm: Arm, what: str) -> dict[Draw, list[float]]:
    """Draw → a value per item of all tasks."""
    return {draw(row): [value for task in row["tasks"] for value in _values(task, what)] for row in arm.rows}


def _values(task: Mapping[str, Any], what: str) -> list[float]:
    if what.startswith("right"):
        return [float(one) for one in task[what]]
    return unpack(task[what], PER_BYTE if what.endswith("per_byte") else MARGIN)


def _mean(series: Series) -> float:
    return fmean(map(fmean, series.values()))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"screen": screen_table, "test": test_table, "stages": stages_table, "zero_shot": zero_shot_table}
    parser.add_argument("stage", choices=tables)
    parser.add_argument("--out", type=Path, default=OUT, help="the rows of width_pruning.py")
    parser.add_argument("--model", default="smollm2-135m", help="of which model")
    args = parser.parse_args()
    print("\n".join(tables[args.stage]([row for row in rows(args.out) if row["model"] == args.model])))


if __name__ == "__main__":
    main()
