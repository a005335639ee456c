"""Figures of a pruning run's page: each takes a run of the summary, and returns ``None`` if data are missing."""

import math
from typing import TYPE_CHECKING, Any

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import SMALL, Canvas, Drawing, columns, draw, legend, log_axis, log_ticks
from regrow.reports.panels import shorten, stack_panels
from regrow.reports.records import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ROWS = 40
MAX_PANELS = 6


def perplexity(run: Run) -> Drawing | None:
    """Draw perplexity per text domain before and after, with 95 % intervals; calibration domains and unseen ones apart.

    Args:
        run: A run of the summary.
    """
    rows = [row for row in run["perplexity"] if (row["after"] or row["before"] or {}).get("ppl")][:MAX_ROWS]
    if not rows:
        return None
    groups = [
        (words, [row for row in rows if row["seen"] is seen])
        for words, seen in (("Seen in calibration", True), ("Unseen", False), ("Text domains", None))
    ]
    groups = [(words, members) for words, members in groups if members]
    description = "; ".join(
        f"{row['source']} {' to '.join(q.significant(side['ppl']) for side in _sides(row))}" for row in rows[:12]
    )

    def paint(canvas: Canvas) -> None:
        step, head, top = (52 if canvas.narrow else 38), 40, 30
        places, y = [], 0.0
        headings = []
        for words, members in groups:
            headings.append((words, top + y + head / 2 + 4))
            y += head
            for row in members:
                places.append((row, y + step * (0.66 if canvas.narrow else 0.5)))
                y += step
            y += 8
        canvas.start(top + y + 44)
        left = 12 if canvas.narrow else 130
        axes = canvas.panel(top, y, left=left, right=12)
        axes.set_ylim(y, 0)
        values = [v for row in rows for side in _sides(row) for v in (side["ppl"], side["low"], side["high"]) if v]
        cuts = [value for row in rows if (value := _cut_of(row))]
        values += cuts
        log_axis(axes, values, canvas.width - left - 12, 58, "perplexity (log scale), lower is better")
        for words, at in headings:
            canvas.text(0, at, words, color=palette.MUTED, fontsize=SMALL)
        for row, at in places:
            _dumbbell(axes, row, at)
            canvas.text(0, top + at - (24 if canvas.narrow else 0), shorten(row["source"], 40 if canvas.narrow else 17))
        legend(
            canvas,
            12,
            [
                ("before", palette.MUTED, "o", 1.0),
                (run["outcome"].lower(), palette.ACCENT, "o", 1.0),
                *([("cut", palette.INK, "|", 1.0)] if cuts else []),
                ("95 % interval", palette.MUTED, "s", 0.26),
            ],
        )

    return draw("fig-perplexity", "Perplexity per text domain, before and after", description, paint)


def widths(run: Run) -> Drawing | None:
    """Draw the units left per layer over depth, one panel per kind of axis.

    Args:
        run: A run of the summary.
    """
    kinds = [kind for kind in run["widths"] if kind["changed"]][:MAX_PANELS]
    if not kinds:
        return None
    description = "; ".join(
        f"{kind['kind']}: {kind['before']:,} units before, {kind['after']:,} after" for kind in kinds
    )

    def panel(axes: "Axes", kind: dict[str, Any]) -> None:
        depth = [row["depth"] for row in kind["rows"]]
        before, after = ([row[side] for row in kind["rows"]] for side in ("before", "after"))
        columns(axes, depth, [0] * len(depth), before, color=palette.FAINT)
        columns(axes, depth, [0] * len(depth), after, color=palette.ACCENT)
        top = max(*before, *after)
        axes.set_ylim(0, top * 1.02)
        axes.set_yticks(sorted({0, top / 2 if top % 2 == 0 or top > 20 else 0, top}))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    def heading(kind: dict[str, Any]) -> str:
        return f"{kind['before']:,} → {kind['after']:,} units, {q.percent(kind['after'] / kind['before'])} kept"

    legend_of = [("kept", palette.ACCENT, "s", 1.0), ("cut", palette.FAINT, "s", 1.0)]

    def paint(canvas: Canvas) -> None:
        stack_panels(canvas, kinds, 128, panel, heading, legend_of)

    return draw("fig-widths", "Units per layer, before and after", description, paint)


def spectra(run: Run) -> Drawing | None:
    """Draw the quantiles of the units' scores in each layer, and where the cut lies.

    Args:
        run: A run of the summary.
    """
    scores: dict[str, Any] = run["scores"] or {"kinds": [], "metric": ""}
    kinds = scores["kinds"]
    changed = {kind["kind"] for kind in run["widths"] if kind["changed"]}
    kinds = sorted(kinds, key=lambda kind: kind["kind"] not in changed)[: min(MAX_PANELS, max(1, len(changed)))]
    if not kinds:
        return None
    description = "; ".join(
        f"{kind['kind']}: median score {q.significant(min(row['quantiles'][10] for row in kind['rows']))} to "
        f"{q.significant(max(row['quantiles'][10] for row in kind['rows']))} over {len(kind['rows'])} axes"
        for kind in kinds
    )

    def panel(axes: "Axes", kind: dict[str, Any]) -> None:
        depth = [row["depth"] for row in kind["rows"]]
        positive = [v for row in kind["rows"] for v in row["quantiles"] if v > 0]
        logarithmic = bool(positive) and min(v for row in kind["rows"] for v in row["quantiles"]) >= 0
        floor = min(positive) if logarithmic else -math.inf
        for span, strength in (((0, 20), 0.14), ((1, 19), 0.16), ((5, 15), 0.26)):
            bottom, top = ([max(row["quantiles"][at], floor) for row in kind["rows"]] for at in span)
            columns(axes, depth, bottom, top, color=palette.MUTED, alpha=strength)
        medians = [max(row["quantiles"][10], floor) for row in kind["rows"]]
        axes.hlines(medians, [d - 0.37 for d in depth], [d + 0.37 for d in depth], color=palette.INK, linewidth=1.3)
        if logarithmic:
            axes.set_yscale("log")
            room = (max(positive) / floor) ** 0.04 * 1.02
            axes.set_ylim(floor / room, max(positive) * room)
            log_ticks(axes.yaxis, floor / room, max(positive) * room, 4)
        else:
            low, high = (pick(v for row in kind["rows"] for v in row["quantiles"]) for pick in (min, max))
            room = 0.04 * (high - low) or 1.0
            axes.set_ylim(low - room, high + room)
        cuts = [(row["depth"], [max(v, floor) for v in _bounds(row)]) for row in kind["rows"] if _bounds(row)]
        for d, bounds in cuts:
            if bounds[0] > bounds[-1]:
                axes.vlines([d], bounds[-1], bounds[0], color=palette.ACCENT, linewidth=1.4)
            middle = math.sqrt(bounds[0] * bounds[-1]) if logarithmic else (bounds[0] + bounds[-1]) / 2
            axes.hlines([middle], d - 0.48, d + 0.48, color=palette.ACCENT, linewidth=2.4)

    metric = scores["metric"] or "score"
    entries = [("cut", palette.ACCENT, "_", 1.0), ("median", palette.INK, "_", 1.0)]
    entries += [
        ("half", palette.MUTED, "s", 0.47),
        ("90 %", palette.MUTED, "s", 0.28),
        ("all units", palette.MUTED, "s", 0.14),
    ]

    def paint(canvas: Canvas) -> None:
        stack_panels(canvas, kinds, 150, panel, lambda kind: f"{metric} per unit", entries)

    return draw("fig-spectra", f"Scores ({metric}) of the units per layer, and the cut", description, paint)


def cost(run: Run) -> Drawing | None:
    """Draw parameters, multiply–accumulates and bytes, before and after.

    Args:
        run: A run of the summary.
    """
    before, after = run["size"]["before"] or {}, run["size"]["after"] or {}
    measures = (
        ("Weights (of linear and convolution layers)", "params_counted", q.count),
        ("All parameters", "params_all", q.count),
        ("Multiply–accumulates (MACs)", "macs", q.count),
        ("Bytes on disk", "bytes", q.octets),
    )
    rows = [(w, before[n], after[n], unit) for w, n, unit in measures if before.get(n) and after.get(n) is not None]
    if not rows:
        return None
    description = "; ".join(f"{words}: {unit(a)} before, {unit(b)} after" for words, a, b, unit in rows)

    def paint(canvas: Canvas) -> None:
        step = 72 if canvas.narrow else 54
        canvas.start(step * len(rows))
        for i, (words, a, b, unit) in enumerate(rows):
            top = i * step + 12
            figures = f"{unit(a)} → {unit(b)}, {q.percent(b / a)}"
            canvas.text(0, top, words)
            canvas.note(figures, top + 19 if canvas.narrow else top)
            axes = canvas.panel(top + (33 if canvas.narrow else 14), 12)
            axes.set_axis_off()
            axes.set_xlim(0, max(a, b))
            axes.barh([0, 0], [a, b], color=[palette.FAINT, palette.ACCENT], height=1)
            axes.set_ylim(-0.5, 0.5)

    return draw("fig-cost", "Size before and after", description, paint)


def times(run: Run) -> Drawing | None:
    """Draw the time that each stage of the run took.

    Args:
        run: A run of the summary.
    """
    rows = run["seconds"][:20]
    if not rows or not any(row["seconds"] for row in rows):
        return None
    description = "; ".join(f"{row['stage']} {q.duration(row['seconds'])}" for row in rows)

    def paint(canvas: Canvas) -> None:
        step, left, right = 26, 104, 96
        canvas.start(step * len(rows) + 4)
        axes = canvas.panel(0, step * len(rows), left=left, right=right)
        axes.set_axis_off()
        axes.barh(range(len(rows)), [row["seconds"] for row in rows], height=0.42, color=palette.FAINT)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, max(row["seconds"] for row in rows))
        for i, row in enumerate(rows):
            canvas.text(0, (i + 0.5) * step, shorten(row["stage"], 13))
            canvas.text(canvas.width, (i + 0.5) * step, q.duration(row["seconds"]), ha="right", color=palette.MUTED)

    return draw("fig-times", "Time spent per stage", description, paint)


def _dumbbell(axes: "Axes", row: dict[str, Any], y: float) -> None:
    sides = {side: row[side] for side in ("before", "after") if (row[side] or {}).get("ppl")}
    points, cut = [side["ppl"] for side in sides.values()], _cut_of(row)
    every = [*points, cut] if cut else points
    axes.plot(every, [y] * len(every), color=palette.FAINT, linewidth=1.6, zorder=2)
    if cut:
        axes.plot([cut], [y], "|", markersize=15, markeredgewidth=2.2, color=palette.INK, zorder=3.5)
    for name, side in sides.items():
        colour = palette.ACCENT if name == "after" else palette.MUTED
        if side["low"] and side["high"]:
            axes.plot([side["low"], side["high"]], [y, y], color=colour, linewidth=6, alpha=0.26, zorder=3)
        axes.plot([side["ppl"]], [y], "o", markersize=10.5, color=colour, markeredgecolor=palette.PAPER, zorder=4)
        outer = side["ppl"] == max(points) and (len(points) == 1 or name == "after" or points[0] > points[-1])
        at = max(side["high"] or side["ppl"], cut or 0) if outer else min(side["low"] or side["ppl"], cut or math.inf)
        axes.annotate(
            q.significant(side["ppl"]),
            (at, y),
            xytext=(9 if outer else -9, 0),
            textcoords="offset points",
            ha="left" if outer else "right",
            va="center",
            color=palette.INK if name == "after" else palette.MUTED,
            annotation_clip=False,
        )


def _cut_of(row: dict[str, Any]) -> float | None:
    """Return the perplexity after the cut, where it is not the last one."""
    ppl: float | None = (row["cut"] or {}).get("ppl")
    return ppl


def _sides(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row[side] for side in ("before", "after") if (row[side] or {}).get("ppl")]


def _bounds(row: dict[str, Any]) -> list[float]:
    """Return the scores on both sides of the cut; empty if nothing was cut."""
    if row["dropped_max"] is None or row["before"] == row["after"]:
        return []
    return [v for v in (row["dropped_max"], row["kept_min"]) if v is not None]
