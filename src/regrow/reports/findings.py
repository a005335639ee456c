"""What a pruning method found out: rank changes between text domains, and ratios of modules."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from regrow.reports import quantities as q
from regrow.reports.reading import kind_of
from regrow.reports.rows import ModuleRatio, RankVariation, RunFindings

GRID = ("robust weak", "robust strong", "sensitive weak", "sensitive strong")
MAX_CELLS = 24
_RANKS = ("significant", "exceeds", "exceeds_null", "spearman", "spearman_shards", "spearman_within")
_RATIOS = ("sensitivity", "activity", "switched", "start", "learned", "given")


@dataclass(frozen=True)
class MeanRow:
    """Means over the units of some ranking spaces or modules, of each value where it is known."""

    name: str  # the kind of axis, or the module
    axes: int
    units: int
    means: dict[str, float | None]
    pooled: bool = False  # whether units of several axes are ranked together


def rank_means(findings: RunFindings) -> list[MeanRow]:
    """Return the means of the rank changes, one row per kind of axis."""
    groups: dict[tuple[str, bool], list[RankVariation]] = {}
    for row in findings.spectrum:
        groups.setdefault((kind_of(row.space, row.label), row.axes > 1), []).append(row)
    return [
        replace(_mean_row(name, rows, _RANKS, sum(row.axes for row in rows)), pooled=pooled)
        for (name, pooled), rows in groups.items()
    ]


def module_means(findings: RunFindings) -> list[tuple[str, list[MeanRow]]]:
    """Return the means of the modules, per kind of axis one row per cell, and one of all if there are several."""
    groups: dict[str, list[ModuleRatio]] = {}
    for row in findings.modules:
        kind = kind_of(row.space if row.name.startswith(row.space) else row.name, row.label)
        groups.setdefault(f"{kind}{', ranked together' * row.cell[0]}", []).append(row)
    result = []
    for kind, rows in groups.items():
        cells = sorted({row.cell[1] for row in rows}, key=_order)[:MAX_CELLS]
        parts = [(cell or "One module per layer", [row for row in rows if row.cell[1] == cell]) for cell in cells]
        parts += [("All", rows)] * (len(parts) > 1)
        result.append((kind, [_mean_row(name, members, _RATIOS, len(members)) for name, members in parts]))
    return result


def explain_modules(findings: RunFindings) -> str:
    """Return an explanation of modules of units, and of switched ones."""
    lines = ["Units compete only within their module, and each module has its own pruning ratio."]
    if any(row.cell[1] in GRID for row in findings.modules):
        lines.append(
            "Sensitive units change rank between text domains more than the median unit, robust units do not. "
            "Strong units score above the median, weak units do not."
        )
    lines.append(
        "The less reliable activations are in a module, the more weight a second metric gets, by default one without "
        "activations. A module in which it has more than half of the weight is called switched."
    )
    return " ".join(lines)


def describe_learning(findings: RunFindings) -> list[str]:
    """Return sentences on what learning the modules' ratios improved."""
    lines = []
    if starts := ", ".join(f"{name} {q.significant(loss)}" for name, loss in findings.starts.items()):
        lines.append(f"Loss on held-out text of the possible starting points: {starts}.")
    if len(findings.history) > 1:
        first, last, (step, loss) = findings.history[0], findings.history[-1].step, _best(findings)
        went = f"from {q.significant(first.held_out)} to {q.significant(loss)}, at step {step} of {last}."
        lines.append(
            f"Learning moved it {went}" if step > first.step else f"None of {last} steps improved on the start."
        )
    robust, base = (findings.robust_among_cut.get(name) for name in ("gprune", "base"))
    if robust is not None:
        than = "" if base is None else f"; the base method alone: {q.percent(base)}"
        lines.append(
            f"Robust units (sensitivity at most the median of their layer) are {q.percent(robust)} of the units "
            f"cut{than}."
        )
    return lines


def _mean_row(name: str, rows: Sequence[RankVariation | ModuleRatio], values: Sequence[str], axes: int) -> MeanRow:
    means: dict[str, float | None] = {}
    for key in values:
        known = [(value, row.units) for row in rows if (value := getattr(row, key)) is not None and row.units]
        means[key] = sum(value * n for value, n in known) / sum(n for _, n in known) if known else None
    return MeanRow(name, axes, sum(row.units for row in rows), means)


def _order(cell: str) -> tuple[int, int, str]:
    """Return a sort key: cells of the grid in reading order, other cells by their number."""
    digits = re.search(r"\d+", cell)
    return GRID.index(cell) if cell in GRID else len(GRID), int(digits.group()[:9]) if digits else 0, cell


def _best(findings: RunFindings) -> tuple[int, float]:
    """Return the step of learning that was kept, and its loss on held-out text; so far, the step of the lowest."""
    steps = [(row.step, row.held_out) for row in findings.history if row.held_out is not None] or [(0, 0.0)]
    kept = [step for step in steps if step[0] == findings.best_step]
    return kept[0] if kept else min(steps, key=lambda step: step[1])
