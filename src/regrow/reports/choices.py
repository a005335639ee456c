"""How much of each layer was cut, and why: the allocation in words, and what was measured for it."""

import math
from typing import TYPE_CHECKING, Any

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import Canvas, Drawing, draw, log_ticks
from regrow.reports.panels import stack_panels
from regrow.reports.reading import JsonObject, items, number, text
from regrow.reports.records import Run
from regrow.reports.widths import block_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_KINDS = 6
MAX_LEVELS = 5
STARTS = {
    "base": "the base method's own allocation",
    "inner": "the same fraction of every layer outside the first and last blocks",
    "uniform": "the same fraction of every layer",
}
COLOURS = (palette.MUTED, palette.ACCENT, palette.INK, palette.FAINT, palette.LINE)


def describe(run: Run) -> list[str]:
    """Return sentences on how it was decided how much of each layer is cut; empty if that is not known.

    Args:
        run: A run of the summary.
    """
    if run["verb"] != "prune" or not run["scores"]:
        return []
    lines = [line for line in (_rule(run),) if line]
    chosen = [f"--{name} {value}" for name in ("only", "exclude") if (value := _setting(run, name))]
    if chosen:
        lines.append(f"Candidates were restricted by {' and '.join(chosen)}.")
    return lines


def reasons(run: Run) -> dict[str, str]:
    """Return axis key → why as much of it was cut as was, in a few words; empty if that is not known.

    Args:
        run: A run of the summary.
    """
    if run["verb"] != "prune" or not run["scores"]:
        return {}
    scored = {row["key"] for kind in run["scores"]["kinds"] for row in kind["rows"]}
    moved = {row["key"]: row for kind in (run["findings"] or {"levels": []})["levels"] for row in kind["rows"]}
    mode, result = _mode(run), {}
    for row in (row for kind in run["widths"] for row in kind["rows"]):
        key, cut = row["key"], row["after"] != row["before"]
        if key not in scored:
            result[key] = "not a candidate"
        elif mode == "measured" and key in moved:
            factor = moved[key]["factor"]
            exchange = f"; exchanges: × {q.significant(factor)}" if abs(math.log(factor)) > 1e-9 else ""
            result[key] = f"measured divergence{exchange}"
        else:
            known = {} if mode == "measured" and run["findings"] else _WORDS.get(mode, {})
            result[key] = known.get(cut, "")
    return result


_WORDS = {
    "ranked": {True: "scores below the common threshold", False: "all scores above the common threshold"},
    "uniform": {True: "the same fraction as others", False: "left whole"},
    "base": {True: "as the base method", False: "as the base method"},
    "inner": {True: "the same fraction of inner blocks", False: "first or last block, or few units"},
    "learned": {True: "learned ratio", False: "learned ratio"},
    "measured": {True: "as the allocation with the lowest loss", False: "left whole"},
}


def levels(rows: list[JsonObject]) -> list[dict[str, Any]]:
    """Return what a measured allocation recorded of each axis, checked; rows that cannot be used are left out.

    Args:
        rows: The table ``levels`` of the findings.
    """
    result = []
    for row in rows:
        key = text(row.get("axis"), 300)
        columns = [[number(one, 0, 1e9) for one in items(row.get(name), MAX_LEVELS)] for name in _LISTS]
        ratios = {name: number(row.get(name), 0, 1) for name in ("measured", "chosen")}
        if not key or not columns[0] or len({len(column) for column in columns}) > 1:
            continue
        points = [dict(zip(_POINT, point, strict=True)) for point in zip(*columns, strict=True)]
        if any(value is None for point in points for value in point.values()):
            continue
        factor = math.exp(number(row.get("offset"), -50, 50) or 0.0)
        result.append({"key": key, "block": block_of({}, key), "points": points, "factor": factor} | ratios)
    return result


_LISTS = ("levels", "divergences", "means")
_POINT = ("ratio", "worst", "mean")


def divergences(run: Run) -> Drawing | None:
    """Draw the divergence of the network with one layer cut alone to a few ratios, over depth.

    Args:
        run: A run of the summary.
    """
    kinds = (run["findings"] or {"levels": []})["levels"][:MAX_KINDS]
    values = [point["worst"] for kind in kinds for row in kind["rows"] for point in row["points"] if point["worst"] > 0]
    if not values:
        return None
    most = max(len(row["points"]) for kind in kinds for row in kind["rows"])
    names = ["lowest ratio", *(f"ratio {i}" for i in range(2, most)), "highest ratio"] if most > 1 else ["divergence"]
    entries = [(name, COLOURS[i], "o", 1.0) for i, name in enumerate(names)]
    floor = min(values)

    def heading(kind: dict[str, Any]) -> str:
        ratios = [[row["points"][i]["ratio"] for row in kind["rows"] if i < len(row["points"])] for i in range(most)]
        spans = [sorted({q.percent(min(one)), q.percent(max(one))}) for one in ratios if one]
        return f"cut alone by {', '.join(' to '.join(span) for span in spans)} of its units; nats per token"

    def panel(axes: "Axes", kind: dict[str, Any]) -> None:
        for row in kind["rows"]:
            worst = [max(point["worst"], floor) for point in row["points"]]
            axes.vlines([row["depth"]], min(worst), max(worst), color=palette.FAINT, linewidth=1.6)
        for i in range(most):
            known = [
                (row["depth"], max(row["points"][i]["worst"], floor)) for row in kind["rows"] if i < len(row["points"])
            ]
            place, worst = [depth for depth, _ in known], [value for _, value in known]
            axes.plot(place, worst, "o", color=COLOURS[i], markersize=7, markeredgecolor=palette.PAPER, clip_on=False)
        axes.set_yscale("log")
        low, high = floor / 1.3, 1.3 * max(values)
        axes.set_ylim(low, high)
        log_ticks(axes.yaxis, low, high, 5)

    def paint(canvas: Canvas) -> None:
        stack_panels(canvas, kinds, 150, panel, heading, entries)

    description = "; ".join(
        f"{kind['kind']}, {row['block']}: {q.significant(row['points'][-1]['worst'])}"
        for kind in kinds
        for row in kind["rows"][:40]
    )
    return draw("fig-divergences", "Divergence of the network with one layer cut alone", description, paint)


def _mode(run: Run) -> str:
    """Return how the fractions were decided: ``ranked``, ``uniform``, ``measured``, ``learned`` or a start's name."""
    found, mode = run["findings"], _setting(run, "allocation")
    if found and mode in ("learned", "measured", ""):
        if found["allocation"]:
            return str(found["allocation"])
        first = found["starts"] and min(found["starts"], key=lambda row: row["held_out"])["name"]
        moved = found["best"] and found["best"]["step"]
        return "learned" if moved else str(first or _setting(run, "start"))
    return mode


def _rule(run: Run) -> str:
    found, mode = run["findings"], _mode(run)
    if found and mode == "measured":
        return (
            "How much of each layer is cut was measured: each layer was cut alone to a few ratios, and the divergence "
            "of the network's predictions from the dense ones was taken on sources that were left out of its scores. "
            f"Layers whose loss does little lose more. {_exchanges(found)}The result was better on held-out text than "
            "every start."
        )
    if found and mode in STARTS:
        tried = "measured" if found["allocation"] else "learned"
        return (
            f"The {tried} allocation was not better on held-out text than its best start, {mode} ({STARTS[mode]}), "
            "which was taken."
        )
    if found and mode == "learned":
        return "The fraction that each module loses was learned by gradients, and judged on held-out text."
    if mode == "ranked":
        per_weight = str((run["scores"] or {}).get("metric", "")).endswith("/cost")
        return (
            f"One ranking of {'the estimated loss per removed weight' if per_weight else 'the standardised scores'} of "
            "all candidates decides: the lowest go until the budget is met, so that a layer with many low scores loses "
            "more."
        )
    if mode == "uniform":
        ends = [number(float(value), 0, 1) for name in ("spare_first", "spare_last") if (value := _number(run, name))]
        rest = " outside the first and last blocks, which stay whole" if any(ends) and not run["regular"] else ""
        return f"Every candidate{rest} loses the same fraction of its units, those with the lowest scores."
    if mode == "measured" and not found:
        return (
            "The same fraction of every candidate, the same outside the first and last blocks, and one ranking of all "
            "candidates were compared by the loss of the cut network; a note says which of them was taken."
        )
    if spare := _setting(run, "spare"):
        rest = {
            "always": " outside the first and last blocks, which stay whole,",
            "measured": " (outside the first and last blocks, unless the loss is lower with these cut, too)",
        }.get("" if run["regular"] else spare, "")
        return f"Every candidate{rest} loses the same fraction of its units, those whose removal adds least loss."
    return ""


def _exchanges(found: dict[str, Any]) -> str:
    rounds = {row["round"] for row in found["exchanges"]}
    taken = sum(row["accepted"] for row in found["exchanges"])
    if not rounds:
        return ""
    times = "1 round" if len(rounds) == 1 else f"{len(rounds)} rounds"
    return (
        f"Then cost was exchanged between layers in {times}, each exchange judged on the whole pruned network: "
        f"{taken} of {len(found['exchanges'])} judgements accepted one. "
    )


def _setting(run: Run, name: str) -> str:
    every = (*run["defaults"], *run["settings"], *run["method_settings"])
    return {pair["name"]: pair["value"] for pair in every}.get(name, "")


def _number(run: Run, name: str) -> str:
    value = _setting(run, name)
    return value if value.replace(".", "", 1).isdigit() else ""
