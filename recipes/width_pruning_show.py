"""Print the tables of width_pruning.py from its rows; nothing is computed.

    python recipes/width_pruning_show.py test|stages|bases [--model gemma3-270m] [--out FILE]
    python recipes/width_pruning_show.py test --against "fisher uniform, MLP neurons, outer blocks unpruned"

Perplexities are geometric means over windows. Differences are of the mean negative log-likelihood over windows of the
unseen domains, in nats per token: per window, averaged over the calibration samples that both arms have (computed in
the same dtype), ± standard error over windows. The spread is the standard deviation over samples of the difference.
``recovered`` is (baseline − arm) / (baseline − dense), the fraction of the lost nats that is recovered, ± standard
error by the delta method [on each sample]. Arms may have other samples: compare rows with ``--against``, which takes
those that both have. The baseline is the one that loses least in this very table, without reconstruction, on the
samples that all baselines have: no other choice is harder to beat. ``recovered of reconstructed`` is the same against
that baseline with ``--reconstruct``. With ``--against`` the differences are to that arm instead.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev

from harness import Row, arguments, line, rows, table
from width_pruning import OUT
from width_pruning_points import (
    BASE_STAGES,
    BASES,
    CONTRASTS,
    DOMAINS,
    FOLDS,
    GPRUNE,
    KEEPS,
    MEASURED_FISHER,
    METHODS,
    RECONSTRUCTED,
    STAGE_ARMS,
    level,
    named,
    staged,
)  # fmt: skip

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


# --- tables ----------------------------------------------------------------------------------------------------------

CELLS = [*product(sorted(KEEPS, reverse=True), range(len(FOLDS)))]
"""Keep and fold, in the order of tables."""
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
    yield from table(COLUMNS)
    for keep, fold in CELLS:
        found = arms(named(every, GPRUNE), keep, fold)
        baseline = strongest([arm for arm in found.values() if arm.baseline])
        if baseline is None:
            continue
        fitted = found.get(baseline.name + RECONSTRUCTED)
        rest = sorted((arm for arm in found.values() if arm is not baseline), key=Arm.level)
        for arm in (baseline, *rest):
            yield line((keep, fold, *_cells(arm, baseline, fitted, before(every, fold))))


def against_table(every: Sequence[Row], name: str) -> Iterator[str]:
    """The differences of all arms to one of them, on the samples that both have."""
    yield from table(("keep", "fold", "arm", "difference, unseen, nats ± se [spread]", "difference, seen", "samples"))
    for keep, fold in CELLS:
        found = arms(named(every, GPRUNE), keep, fold)
        other = found.get(name)
        for arm in sorted(found.values(), key=Arm.level) if other else ():
            if other is not None and arm is not other and (common := arm.draws & other.draws):
                both = [paired(arm.windows(seen), other.windows(seen)) or "" for seen in (False, True)]
                yield line((keep, fold, arm.name, *both, len(common)))


def _cells(arm: Arm, baseline: Arm, fitted: Arm | None, dense: Arm) -> Iterator[str]:
    own = arm is baseline
    yield f"**{arm.name}**" if own else arm.name
    yield from (f"{math.exp(arm.level()):.2f}", f"{math.exp(arm.level(seen=True)):.2f}", f"{arm.bits():.4f}")
    yield "" if own else str(paired(arm.windows(), baseline.windows()) or "")
    whole = {dtype: values for (_, dtype), values in dense.windows().items()}
    for other in (baseline, fitted):
        known = None if other is None or other is arm else recovered(arm.windows(), other.windows(), whole)
        share = f"{100 * known[0]:+.1f} ± {100 * known[1]:.1f}" if known else ""
        yield share + (_each(arm, other, whole) if share and other else "")
    yield "" if own else str(paired(arm.windows(seen=True), baseline.windows(seen=True)) or "")
    yield from (arm.seconds(), ", ".join(str(sample) for sample in sorted(row["sample"] for row in arm.rows)))


def _each(arm: Arm, other: Arm, dense: Mapping[str, Sequence[float]]) -> str:
    """The recovered fraction on each of several calibration samples, in percent, in brackets."""
    common = sorted(arm.draws & other.draws)
    values = [recovered({one: arm.windows()[one]}, {one: other.windows()[one]}, dense) for one in common]
    found = [f"{100 * one[0]:.1f}" for one in values if one is not None]
    return f" [{', '.join(found)}]" if len(found) > 1 else ""


def stages_table(every: Sequence[Row]) -> Iterator[str]:
    """Each stage with and without: a difference below 0 is a gain of the first arm."""
    every = named(every, {arm: ("mlp", settings) for arm, settings in STAGE_ARMS.items()})
    columns = (
        "stage",
        "arm",
        "against",
        "keep",
        "fold",
        "difference, nats ± se [spread]",
        "standard errors",
        "samples",
    )
    yield from table(columns)
    for (stage, name, other), keep, fold in product(CONTRASTS, (0.8, 0.7), range(len(FOLDS))):
        found = arms(every, keep, fold)
        gap = paired(found[name].windows(), found[other].windows()) if {name, other} <= found.keys() else None
        if gap is not None:
            ratio = f"{gap.mean / gap.error:+.1f}" if gap.error else ""
            yield line((stage, name, other, keep, fold, gap, ratio, min(len(found[arm].rows) for arm in (name, other))))


def bases_table(every: Sequence[Row]) -> Iterator[str]:
    """Perplexity on unseen domains by base metric, and how much it depends on it, with and without the switch."""
    yield from table(
        ("keep", "fold", "stages", *BASES, "worst against best, nats ± se [spread]", "max ÷ min", "samples")
    )
    every = named(every, {staged(stage, base): ("mlp", own) for (stage, base), own in BASE_STAGES.items()})
    for keep, fold, stage in product((0.8, 0.7), range(len(FOLDS)), dict.fromkeys(stage for stage, _ in BASE_STAGES)):
        found = arms(every, keep, fold)
        own = [found[name] for name in (staged(stage, base) for base in BASES) if name in found]
        common = frozenset.intersection(*(arm.draws for arm in own)) if len(own) == len(BASES) else frozenset()
        if not common:  # in different dtypes
            continue
        worst, *_, best = sorted(own, key=lambda arm: -arm.level(of=common))
        cells = [f"{math.exp(arm.level(of=common)):.2f}" for arm in own]
        ratio = math.exp(worst.level(of=common) - best.level(of=common))
        gap = paired({draw: values for draw, values in worst.windows().items() if draw in common}, best.windows())
        yield line((keep, fold, stage, *cells, gap, f"{ratio:.3f}", len(common)))


TABLES = {
    "test": test_table,
    "stages": stages_table,
    "bases": bases_table,
}


def main() -> None:
    """Print a table."""
    args = arguments(__doc__, OUT, {"stage": TABLES}, model="smollm2-135m", against="")
    every = [row for row in rows(args.out) if row["model"] == args.model]
    if args.against and (args.stage != "test" or all(row["arm"] != args.against for row in every)):
        raise SystemExit("--against takes the name of an arm of the stage test, as its table has it")
    print("\n".join(against_table(every, args.against) if args.against else TABLES[args.stage](every)))


if __name__ == "__main__":
    main()
