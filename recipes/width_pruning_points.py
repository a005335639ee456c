"""The points of the width-pruning tables: which arms there are at which budgets, and which baselines go to the test."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from statistics import fmean
from typing import Any

from harness import Row

FOLDS = (("news", "code", "manual", "talk"), ("prose", "legal", "wiki", "dialogue"))
"""The calibration domains of each fold; those of the other fold are its unseen domains."""
KEEPS = (0.8, 0.7, 0.9, 0.5)
METHODS = ("flap", "wanda_sp", "llm_pruner", "fisher", "magnitude", "random")
TESTED = METHODS[:4]
"""The methods whose best variant goes to the test."""
FINALISTS = 3
"""How many variants of each method are judged on all left-out domains."""
DOMAINS = "domains"
LEFT_OUT, RECONSTRUCTED = "left out: ", ", reconstructed"
WINDOWS, MORE_WINDOWS = 48, 96
"""The windows of text that the model itself generates: the 12,288 tokens of ``--generated-tokens``, and twice these."""
DISTILLED, RATES = ", distilled", (1e-4, 3e-4)
"""The end of the names of arms that are distilled, and the rates that are tried on a left-out domain."""


@dataclass(frozen=True)
class Point:
    """A network to prune and to evaluate.

    Args:
        arm: The name of what is compared.
        method: The pruning method; ``dense``: nothing is pruned.
        keep: The fraction of the weights that stays.
        fold: Which domains are calibrated on.
        sample: The seed of the calibration windows.
        on: What is evaluated: ``domains``, or ``left out: NAME`` of the calibration domains.
        only: The pattern of the axes that may be cut; empty: all.
        outer: Whether the first and last blocks are pruned; ``None``: as the method has it.
        reconstruct: Whether layers that read cut units are fitted by least squares.
        settings: Settings of the method.
        generated: How many windows of text that the model itself generates are one more calibration source.
        fit: Settings of the least squares that differ from those of ``--reconstruct``.
        distil: Settings of a distillation after it that differ from its defaults; empty: there is none.
    """

    arm: str
    method: str
    keep: float
    fold: int = 0
    sample: int = 0
    on: str = DOMAINS
    only: str = "mlp"
    outer: bool | None = None
    reconstruct: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    generated: int = 0
    fit: Mapping[str, Any] = field(default_factory=dict)
    distil: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What is computed, whatever it is called: tables share rows."""
        parts = {key: value for key, value in asdict(self).items() if key != "arm" and (key != "distil" or value)}
        return json.dumps(parts, sort_keys=True)

    @property
    def left_out(self) -> str:
        """The calibration domain that is not calibrated on; empty if none."""
        return self.on.removeprefix(LEFT_OUT) if self.on.startswith(LEFT_OUT) else ""

    @classmethod
    def of(cls, row: Row) -> "Point":
        """The point that a row was written for."""
        return cls(**{one.name: row[one.name] for one in fields(cls) if one.name in row})


def baselines() -> Iterator[Point]:
    """All variants of the baselines, at keep 1.0 of fold 0."""
    for method, allocation, only, compensate, outer in product(
        METHODS, ("ranked", "uniform"), ("mlp", ""), (True, False), (False, True)
    ):
        words = [f"{method} {allocation}", "MLP neurons" if only else "all units"]
        words += [] if compensate else ["no compensation"]
        words += [] if outer else ["outer blocks unpruned"]
        settings = {"allocation": allocation, "compensate": compensate}
        yield Point(", ".join(words), method, 1.0, only=only, outer=outer, settings=settings)


def reconstructed(point: Point) -> Point:
    """The same with least squares for the layers that read cut units."""
    return replace(point, arm=point.arm + RECONSTRUCTED, reconstruct=True)


def with_prior(point: Point, windows: int = WINDOWS, target: str = "dense") -> Point:
    """The same with generated text as one more source; the target is that of ``refit``."""
    more: dict[str, Any] = {"reconstruct": True, "generated": windows, "fit": {"target": target}}
    words = "" if target == "dense" else f", target {target}"
    return replace(point, arm=f"{point.arm}, {windows} generated windows{RECONSTRUCTED}{words}", **more)


def distilled(point: Point, rate: float) -> Point:
    """The same with a distillation on all of its text afterwards, two passes at a peak rate."""
    return replace(point, arm=point.arm + DISTILLED, distil={"passes": 2, "lr": rate})


def dense(on: str, fold: int = 0) -> Point:
    """The network before pruning; on domains it is the same for both folds."""
    return Point("dense", "dense", 1.0, fold=fold, on=on, only="")


def screen_all(keeps: Sequence[float], folds: Sequence[int]) -> Iterator[Point]:
    """Every variant of every baseline, judged on the first calibration domain, which is left out."""
    for fold in folds:
        on = LEFT_OUT + FOLDS[fold][0]
        yield dense(on, fold)
        for keep in keeps:
            yield from (replace(one, keep=keep, fold=fold, on=on) for one in baselines())


def screen_finalists(rows: Sequence[Row], keeps: Sequence[float], folds: Sequence[int]) -> Iterator[Point]:
    """The best variants of each method, with each other domain left out; the very best with least squares, too."""
    for fold in folds:
        first, *others = FOLDS[fold]
        for name in others:
            yield dense(LEFT_OUT + name, fold)
            for keep in keeps:
                finalists = best(rows, keep, fold, FINALISTS, domains=(first,))
                yield from (replace(one, on=LEFT_OUT + name) for one in finalists)
    for fold, keep in product(folds, keeps):
        first = FOLDS[fold][0]
        for one in best(rows, keep, fold, domains=(first,))[:2]:
            left = replace(one, on=LEFT_OUT + first)
            yield from (reconstructed(left), with_prior(left, MORE_WINDOWS))


def best(rows: Sequence[Row], keep: float, fold: int, count: int = 1, domains: Sequence[str] = ()) -> tuple[Point, ...]:
    """The variants of each method that lose least on domains that were left out of calibration, best first.

    Args:
        rows: Rows of one model; those of the stage ``screen`` are used.
        keep: The budget.
        fold: The fold; nothing of its unseen domains is looked at.
        count: How many variants of each method.
        domains: The domains that were left out; empty: all calibration domains of the fold.

    Raises:
        SystemExit: If the screen is not finished.
    """
    on = [LEFT_OUT + name for name in domains or FOLDS[fold]]
    losses = {(row["on"], row["dtype"]): level(row) for row in rows if row["method"] == "dense" and row["on"] in on}
    arms: dict[str, list[Row]] = {}
    for row in rows:
        if row["on"] in on and (row["keep"], row["fold"]) == (keep, fold) and not row["reconstruct"] and "nll" in row:
            arms.setdefault(row["arm"], []).append(row)
    full = [own for own in arms.values() if len(own) == len(on)]
    full.sort(key=lambda own: fmean(level(row) - losses[row["on"], row["dtype"]] for row in own))
    chosen = []
    for method in TESTED:
        own = [one for one in full if one[0]["method"] == method]
        if len(own) < count:
            raise SystemExit(
                f"keep {keep}, fold {fold}, {method}: {len(own)} of {count} variants are screened; run screen first"
            )
        chosen += own[:count]
    return tuple(replace(Point.of(own[0]), on=DOMAINS) for own in full if own in chosen)


def level(row: Row, names: Sequence[str] = ()) -> float:
    """The mean over windows of some domains, or all, in nats per token."""
    return fmean(value for name in names or row["nll"] for value in row["nll"][name])


LEARNED = {"base": "flap", "steps": 12, "every": 12, "switch": "blend"}
BASE_ORDER = {"partition": "layer", "switch": "never"}
FISHER, RANKED = "fisher uniform, MLP neurons, outer blocks unpruned", "fisher ranked, all units"
MEASURED_FISHER = {"fisher, measured allocation, all units": "", "fisher, measured allocation, MLP neurons": "mlp"}
"""The arms of Fisher pruning with the best of three allocations: name → the axes that may be cut."""
HALF = 0.5
"""The budget at which one ranking of all units loses less on left-out news (fold 0) than neurons of inner blocks."""
OBS = "obs uniform, MLP neurons, outer blocks unpruned"
GPRUNE: Mapping[str, tuple[str, Mapping[str, Any]]] = {"gprune, learned shares": ("mlp", LEARNED)}
"""The arms of GPrune: name → axes that may be cut, settings."""


def test(rows: Sequence[Row], keeps: Sequence[float], folds: Sequence[int], samples: int) -> Iterator[Point]:
    """The best baseline, ours, the baseline with least squares; then all other arms. On unseen domains."""
    yield dense(DOMAINS)
    for sample, fold, keep in product(range(samples), folds, keeps):
        chosen = replace(best(rows, keep, fold)[0], sample=sample)
        ours = fisher(keep, fold, sample), obs(keep, fold, sample)
        yield from (chosen, *map(with_prior, ours), reconstructed(chosen))
    for sample, fold, keep in product(range(samples), folds, keeps):
        at: dict[str, Any] = {"keep": keep, "fold": fold, "sample": sample}
        chosen, *others = (replace(one, sample=sample) for one in best(rows, keep, fold))
        yield from others
        for arm, (only, settings) in GPRUNE.items():
            yield Point(arm, "gprune", only=only, settings=settings, **at)
        yield from (with_prior(fisher(keep, fold, sample), MORE_WINDOWS), with_prior(chosen, MORE_WINDOWS))


UNSCREENED = [
    f"{method} uniform, MLP neurons{outer}"
    for method in ("flap", "fisher", "llm_pruner")
    for outer in ("", ", outer blocks unpruned")
] + [RANKED]
"""The baselines where none are screened: the strongest of them in the table counts."""


def unscreened(keeps: Sequence[float], folds: Sequence[int], samples: int) -> Iterator[Point]:
    """Some baselines, with least squares, too, and ours: for keep 0.9 or another model, where the screen takes days."""
    yield dense(DOMAINS)
    variants = {one.arm: one for one in baselines()}
    for sample, fold, keep in product(range(samples), folds, keeps):
        own = [replace(variants[arm], keep=keep, fold=fold, sample=sample) for arm in UNSCREENED]
        yield from own
        yield from (*map(with_prior, (*own[2:4], own[-1])), *map(reconstructed, own), *measured(keep, fold, sample))
        yield with_prior(own[-1], target="own")


def fisher(keep: float, fold: int = 0, sample: int = 0, on: str = DOMAINS) -> Point:
    """Fisher pruning with its defaults, of MLP neurons; at keep 0.5 and below by one ranking of all units."""
    half = keep <= HALF
    settings = {"allocation": "ranked" if half else "uniform", "compensate": True}
    more: dict[str, Any] = {"only": "" if half else "mlp", "outer": half, "settings": settings}
    return Point(RANKED if half else FISHER, "fisher", keep, fold, sample, on, **more)


def measured(keep: float, fold: int = 0, sample: int = 0) -> Iterator[Point]:
    """Fisher pruning of all units, and of MLP neurons, with the best of three allocations by the calibration loss."""
    for arm, only in MEASURED_FISHER.items():
        yield Point(arm, "fisher", keep, fold, sample, only=only, settings={"allocation": "measured"})


def obs(keep: float, fold: int = 0, sample: int = 0) -> Point:
    """OBS, of MLP neurons, with the same blocks unpruned and the same fraction of the others cut."""
    settings = {"allocation": "uniform", "compensate": True}
    return Point(OBS, "obs", keep, fold, sample, outer=False, settings=settings)


def distil_rates(folds: Sequence[int]) -> Iterator[Point]:
    """Fisher pruning with generated text, distilled at each rate, with the first domain of each fold left out."""
    for fold, rate in product(folds, RATES):
        yield distilled(with_prior(fisher(0.7, fold, on=LEFT_OUT + FOLDS[fold][0])), rate)


def distil(rows: Sequence[Row], keeps: Sequence[float], folds: Sequence[int], samples: int) -> Iterator[Point]:
    """The same on unseen domains, at the rate that does best on the left-out domain of the fold."""
    for sample, fold, keep in product(range(samples), folds, keeps):
        tried = [row for row in rows if row["fold"] == fold and row.get("distil") and row["on"].startswith(LEFT_OUT)]
        if (many := len({row["distil"]["lr"] for row in tried})) < len(RATES):
            raise SystemExit(f"fold {fold}: {many} of {len(RATES)} rates are tried; run distil without --match")
        yield distilled(with_prior(fisher(keep, fold, sample)), min(tried, key=level)["distil"]["lr"])


def named(rows: Sequence[Row], names: Mapping[str, tuple[str, Mapping[str, Any]]]) -> list[Row]:
    """The rows of baselines, and those of GPrune's arms that a table shows, by the names that it has for them.

    Args:
        rows: Rows of all tables, which share points.
        names: Name of an arm → the axes that may be cut, and settings.
    """
    result = []
    for row in rows:
        own = [arm for arm, given in names.items() if given == (row["only"], row["settings"])]
        if row["method"] != "gprune":
            result.append(row)
        elif own:
            result.append({**row, "arm": own[0] + (RECONSTRUCTED if row["reconstruct"] else "")})
    return result


# --- the stages of GPrune, each alone, and with three base metrics --------------------------------------------------

NO_STAGE = "no stage (base order, outer blocks unpruned)"
UNLEARNED: Mapping[str, Any] = {"base": "flap", "steps": 0, "start": "inner", "switch": "blend"}
STAGES: Mapping[str, Mapping[str, Any]] = {
    NO_STAGE: BASE_ORDER,
    "modules, never switch": {"switch": "never"},
    "random modules, never switch": {"partition": "random", "switch": "never"},
    "modules, switch": {},
    "random modules, switch": {"partition": "random"},
    "whole layers, switch": {"partition": "layer"},
    "modules, always switch": {"switch": "always"},
    "modules, reversed switch": {"switch": "reversed"},
    "the same mixture everywhere, no switch": {"switch": "even"},
    "shares of the base method": {"start": "base"},
    "uniform shares": {"start": "uniform"},
}
"""What GPrune's stages are compared on: name → settings that differ from the unlearned method."""

STAGE_ARMS: Mapping[str, Mapping[str, Any]] = {
    **{arm: {**UNLEARNED, **change} for arm, change in STAGES.items()},
    "learned shares": LEARNED,
}
"""Name of an arm of the stages, all on MLP neurons → its settings."""

CONTRASTS = (
    ("partition, no switch", "modules, never switch", "random modules, never switch"),
    ("partition, with the switch", "modules, switch", "random modules, switch"),
    ("partition against none", "modules, never switch", NO_STAGE),
    ("partition against whole layers", "modules, switch", "whole layers, switch"),
    ("switch against never", "modules, switch", "modules, never switch"),
    ("switch against always", "modules, switch", "modules, always switch"),
    ("switch against reversed", "modules, switch", "modules, reversed switch"),
    ("switch against the same mixture everywhere", "modules, switch", "the same mixture everywhere, no switch"),
    ("switch of random modules against never", "random modules, switch", "random modules, never switch"),
    ("shares: base against inner", "shares of the base method", "modules, switch"),
    ("shares: uniform against inner", "uniform shares", "modules, switch"),
    ("shares: learned against inner", "learned shares", "modules, switch"),
    ("all stages, learned, against none", "learned shares", NO_STAGE),
)
"""The stage, the arm with it, and the arm that it is compared with."""


BASES = ("flap", "wanda_sp", "llm_pruner")
"""The base metrics whose choice should matter less with GPrune."""
BASE_STAGES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    (stage, base): {**UNLEARNED, **change, "base": base}
    for base in BASES
    for stage, change in (("none", BASE_ORDER), ("switch", {}), ("switch of random modules", {"partition": "random"}))
}
"""Stage, base metric → settings. All have the same shares; with the stage ``none`` the order is the base's own."""


def staged(stage: str, base: str) -> str:
    """The name of an arm of :data:`BASE_STAGES`."""
    return f"{stage}, base {base}"


def bases(keeps: Sequence[float], folds: Sequence[int], samples: int) -> Iterator[Point]:
    """Each base metric alone, and with the switch, on MLP neurons at keep 0.8 and 0.7."""
    yield dense(DOMAINS)
    for sample, fold, keep in product(range(samples), folds, [one for one in keeps if one in (0.8, 0.7)]):
        for (stage, base), settings in BASE_STAGES.items():
            yield Point(staged(stage, base), "gprune", keep, fold, sample, settings=settings)


def stages(keeps: Sequence[float], folds: Sequence[int], samples: int) -> Iterator[Point]:
    """Each stage of GPrune alone, on MLP neurons at keep 0.8 and 0.7."""
    yield dense(DOMAINS)
    for sample, fold, keep in product(range(samples), folds, [one for one in keeps if one in (0.8, 0.7)]):
        for arm, settings in STAGE_ARMS.items():
            yield Point(arm, "gprune", keep, fold, sample, settings=settings)
