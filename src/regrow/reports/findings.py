"""What a pruning method found out: rank changes between text domains, ratios of modules, and the allocation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from regrow.reports import quantities as q
from regrow.reports.reading import kind_of
from regrow.reports.records import ModuleRatio, RankVariation, Values
from regrow.reports.runs import Run, RunFindings

GRID = ("robust weak", "robust strong", "sensitive weak", "sensitive strong")
MAX_CELLS = 24
STARTS = {
    "base": "the base method's own allocation",
    "inner": "the same fraction of every layer outside the first and last blocks",
    "uniform": "the same fraction of every layer",
}
_REASONS = {
    "ranked": ("scores below the common threshold", "all scores above the common threshold"),
    "uniform": ("the same fraction as others", "left whole"),
    "base": ("as the base method", "as the base method"),
    "inner": ("the same fraction of inner blocks", "first or last block, or few units"),
    "learned": ("learned ratio", "learned ratio"),
    "measured": ("as the allocation with the lowest loss", "left whole"),
}
"""How the fractions were decided → why an axis was cut, and why it was not."""
_RULES = {
    "learned": "The fraction that each module loses was learned by gradients, and judged on held-out text.",
    "measured": "Three allocations were compared by the loss of the cut network: the same fraction of every candidate, "
    "the same outside the first and last blocks, and one ranking. A note says which was taken.",
}
_RANKS = ("significant", "exceeds", "exceeds_null", "spearman", "spearman_shards", "spearman_within")


@dataclass(frozen=True)
class MeanRow:
    """Means over the units of some ranking spaces or modules.

    Args:
        name: The kind of axis, or the module.
        pooled: Whether units of several axes are ranked together.
        axes: The number of axes.
        units: The number of units.
        means: The mean of each value over the units for which it is known.
    """

    name: str
    pooled: bool
    axes: int
    units: int
    means: dict[str, float | None]


def rank_means(findings: RunFindings) -> list[MeanRow]:
    """Return the means of the rank changes, one row per kind of axis."""
    groups: dict[tuple[str, bool], list[RankVariation]] = {}
    for row in findings.spectrum:
        groups.setdefault((kind_of(row.space, row.label), row.axes > 1), []).append(row)
    return [
        _mean_row(name, pooled, sum(row.axes for row in rows), rows, {k: [getattr(r, k) for r in rows] for k in _RANKS})
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
        result.append((kind, [_module_row(name, members) for name, members in parts]))
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


def describe_allocation(run: Run) -> list[str]:
    """Return sentences on how it was decided how much of each layer is cut; empty if that is not known."""
    if run.verb != "prune" or not run.scores:
        return []
    settings = _settings(run)
    restrictions = [f"--{name} {value}" for name in ("only", "exclude") if (value := settings.get(name))]
    lines = [_rule(run, settings)]
    if restrictions:
        lines.append(f"Candidates were restricted by {' and '.join(restrictions)}.")
    return [line for line in lines if line]


def explain_widths(run: Run) -> dict[str, str]:
    """Return axis key → why as much of it was cut as was, in a few words; empty if that is not known."""
    if run.verb != "prune" or not run.scores:
        return {}
    cut, whole = _REASONS.get(_mode(run, _settings(run)), ("", ""))
    result = {}
    for row in (row for kind in run.widths for row in kind.rows):
        reason = whole if row.after == row.before else cut
        result[row.key] = reason if row.key in run.scores.bounds else "not a candidate"
    return result


def _mean_row(
    name: str, pooled: bool, axes: int, rows: Sequence[RankVariation | ModuleRatio], values: dict[str, Values]
) -> MeanRow:
    units, means = [row.units for row in rows], dict[str, float | None]()
    for key, column in values.items():
        known = [(value, n) for value, n in zip(column, units, strict=True) if value is not None and n]
        means[key] = sum(value * n for value, n in known) / sum(n for _, n in known) if known else None
    return MeanRow(name, pooled, axes, sum(units), means)


def _module_row(name: str, rows: list[ModuleRatio]) -> MeanRow:
    names = ("sensitivity", "activity", "start", "learned", "given")
    values: dict[str, Values] = {key: [getattr(row, key) for row in rows] for key in names}
    values["switched"] = [None if row.trust is None else 1 - min(row.trust, 1) for row in rows]
    return _mean_row(name, False, len(rows), rows, values)


def _order(cell: str) -> tuple[int, int, str]:
    """Return a sort key: cells of the grid in reading order, other cells by their number."""
    digits = re.search(r"\d+", cell)
    return GRID.index(cell) if cell in GRID else len(GRID), int(digits.group()[:9]) if digits else 0, cell


def _best(findings: RunFindings) -> tuple[int, float]:
    """Return the step of learning that was kept, and its loss on held-out text; so far, the step of the lowest."""
    steps = [(row.step, row.held_out) for row in findings.history if row.held_out is not None] or [(0, 0.0)]
    kept = [step for step in steps if step[0] == findings.best_step]
    return kept[0] if kept else min(steps, key=lambda step: step[1])


def _mode(run: Run, settings: dict[str, str]) -> str:
    """Return how the fractions were decided: ``ranked``, ``uniform``, ``measured``, ``learned`` or a start's name."""
    findings, mode = run.findings, settings.get("allocation", "")
    if findings is None or mode:
        return mode
    if findings.history and _best(findings)[0]:
        return "learned"
    losses = {name: loss for name, loss in findings.starts.items() if loss is not None}
    return min(losses, key=lambda name: losses[name]) if losses else settings.get("start", "")


def _rule(run: Run, settings: dict[str, str]) -> str:
    mode = _mode(run, settings)
    if run.findings and mode in STARTS:
        return f"The learned allocation was not better on held-out text than its best start, {mode} ({STARTS[mode]})."
    if mode in _RULES:
        return _RULES[mode]
    if mode == "ranked":
        per_weight = run.scores and run.scores.metric.endswith("/cost")
        ranking = "the estimated loss per removed weight" if per_weight else "the standardised scores"
        return f"One ranking of {ranking} of all candidates decides: the lowest go until the budget is met."
    if mode == "uniform":
        ends = any(settings.get(name, "0").strip("0.") for name in ("spare_first", "spare_last")) and not run.regular
        where = " outside the first and last blocks, which stay whole," if ends else ""
        return f"Every candidate{where} loses the same fraction of its units, those with the lowest scores."
    if spare := settings.get("spare"):
        where = {
            "always": " outside the first and last blocks, which stay whole,",
            "measured": " (outside the first and last blocks, unless the loss is lower with these cut, too)",
        }.get("" if run.regular else spare, "")
        return f"Every candidate{where} loses the same fraction of its units, those whose removal adds least loss."
    return ""


def _settings(run: Run) -> dict[str, str]:
    return {pair.name: pair.value for pair in (*run.defaults, *run.settings, *run.method_settings)}
