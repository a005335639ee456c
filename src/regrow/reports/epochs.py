"""Figures of a search over its epochs, granularities and stages."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import SMALL, Canvas, Drawing, Entry, draw, legend, steps
from regrow.reports.fronts import against
from regrow.reports.records import Run, search_of

Format = Callable[[float | None], str]
Panel = tuple[str, Sequence[tuple[str, str, str]], Format, float | None]
"""A heading, its lines (field of an epoch, name, colour), the number format, and the top of the scale."""

LEVELS = (("operations", palette.ACCENT), ("filters", palette.COOL), ("weights", palette.WARM))


def size(run: Run) -> Drawing | None:
    """Draw size, allowed size and validation accuracy over epochs.

    Args:
        run: A run of the summary.
    """
    unit = (run["search"] or {"unit": ""})["unit"]
    panels: list[Panel] = [
        (
            f"Size of the active part, {unit}",
            (("allowed", "allowed", palette.FAINT), ("size", "active", palette.ACCENT)),
            q.count,
            None,
        ),
        ("Validation accuracy", (("accuracy", "validation", palette.INK),), q.percent, None),
    ]
    return _over_epochs(run, "fig-search-size", "Size and validation accuracy over epochs", panels)


def front(run: Run) -> Drawing | None:
    """Draw validation accuracy against size for the networks at the epochs of the last stage.

    Args:
        run: A run of the summary.
    """
    found = run["search"] or {"front": [], "unit": ""}
    points = [(f"epoch {row['epoch']}", row["size"], row["accuracy"]) for row in found["front"]]
    if found["front"]:
        points.append(("final", found["reached"], found["found"]["accuracy"]))
    title = "Validation accuracy against size during the search"
    return against("fig-search-front", title, points, found["unit"], "validation accuracy, before training")


def levels(run: Run) -> Drawing | None:
    """Draw the fraction of each granularity that masks keep in the trained part, over epochs.

    Args:
        run: A run of the summary.
    """
    lines = [(level, level, colour) for level, colour in LEVELS]
    panels: list[Panel] = [("Fraction kept in the active part", lines, q.percent, 1.0)]
    return _over_epochs(run, "fig-search-levels", "Fraction kept on each level over epochs", panels)


def savings_figure(run: Run) -> Drawing | None:
    """Draw how much each granularity reduced the network's size.

    Args:
        run: A run of the summary.
    """
    colours = dict(LEVELS)
    found = run["search"] or {"levels": [], "unit": ""}
    rows = [
        (row["level"], row["saved"], q.count(row["saved"]), colours[row["level"]])
        for row in found["levels"]
        if row["saved"] is not None
    ]
    return _bars("fig-search-saved", f"Size removed on each level, {found['unit']}", rows, [])


def memory(run: Run) -> Drawing | None:
    """Draw the memory of each stage, predicted and measured, and the budget.

    Args:
        run: A run of the summary.
    """
    found = run["search"] or {"stages": [], "budget": None}
    rows = []
    for row in found["stages"]:
        for name, colour in (("planned", palette.FAINT), ("peak", palette.ACCENT)):
            if row[name] is not None:
                words = {"peak": "measured"}.get(name, name)
                rows.append((f"stage {row['stage'] + 1}, {words}", row[name], q.octets(row[name]), colour))
    marks = [] if found["budget"] is None else [(found["budget"], f"budget {q.octets(found['budget'])}")]
    return _bars("fig-search-memory", "Memory of each stage", rows, marks)


def _over_epochs(run: Run, name: str, title: str, panels: Sequence[Panel]) -> Drawing | None:
    """Draw panels over epochs, below each other, with marks at stages and at changes of the network's shape."""
    rows = (run["search"] or {"epochs": []})["epochs"]
    panels = [
        (heading, [line for line in lines if any(row[line[0]] is not None for row in rows)], unit, top)
        for heading, lines, unit, top in panels
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    marks = sorted({row["epoch"] + 0.5 for row in search_of(run)["commits"] if row["epoch"] is not None})
    begins = [i for i, row in enumerate(rows) if i == 0 or row["stage"] != rows[i - 1]["stage"]]
    description = "; ".join(
        f"{words}: {', '.join(unit(rows[i][field]) for i in _ends(rows)[:12])} at the end of each stage"
        for _, lines, unit, _ in panels
        for field, words, _ in lines
    )
    several = [line for _, lines, _, _ in panels for line in lines if len(lines) > 1]
    entries: list[Entry] = [(words, colour, "o", 1.0) for _, words, colour in several]
    entries += [("commit", palette.MUTED, "|", 1.0)] if marks else []

    def paint(canvas: Canvas) -> None:
        top, head, high, foot = 26 if entries else 0, 52, 150, 26
        canvas.start(top + len(panels) * (head + high + foot) + 20)
        legend(canvas, 12, entries)
        first, last = rows[0]["epoch"], rows[-1]["epoch"]
        for i, (heading, lines, unit, most) in enumerate(panels):
            y = top + i * (head + high + foot)
            canvas.text(0, y + 14, heading)
            axes = canvas.panel(y + head, high, left=58, right=4)
            axes.set_xlim(first - 0.6, max(last, first + 1) + 0.6)
            axes.set_xticks(steps(first, last, 7 if canvas.narrow else 15))
            known = [row[field] for row in rows for field, _, _ in lines if row[field] is not None]
            axes.set_ylim(0, 1.06 * (most or max(known) or 1))
            axes.locator_params(axis="y", nbins=5)
            axes.yaxis.set_major_formatter(partial(_tick, unit))
            axes.grid(axis="y", color=palette.LINE, linewidth=1)
            axes.set_axisbelow(True)
            for at in begins:
                if at:
                    axes.axvline(rows[at]["epoch"] - 0.5, color=palette.MUTED, lw=1, ls=(0, (3, 3)), zorder=1)
                words = f"stage {rows[at]['stage'] + 1}" if len(begins) <= (4 if canvas.narrow else 12) else ""
                axes.annotate(
                    words,
                    (rows[at]["epoch"] - 0.4, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(0, 7),
                    textcoords="offset points",
                    color=palette.MUTED,
                    fontsize=SMALL,
                )
            axes.plot(marks, [0] * len(marks), "|", color=palette.MUTED, ms=12, mew=1.4, clip_on=False, zorder=4)
            for field, _, colour in lines:
                for at, end in zip(begins, [*begins[1:], len(rows)], strict=True):  # a stage runs another network
                    part = [(row["epoch"], math.nan if row[field] is None else row[field]) for row in rows[at:end]]
                    axes.plot(*zip(*part, strict=True), "o-", color=colour, lw=1.8, ms=4, clip_on=False, zorder=3)
        axes.set_xlabel("epoch", color=palette.MUTED, fontsize=SMALL, labelpad=4)

    return draw(name, title, description, paint)


def _bars(
    name: str, title: str, rows: Sequence[tuple[str, float, str, str]], marks: Sequence[tuple[float, str]]
) -> Drawing | None:
    """Draw horizontal bars with their values, and vertical lines at marks."""
    if not rows:
        return None
    description = "; ".join(f"{label} {words}" for label, _, words, _ in rows)
    description += "".join(f"; {words}" for _, words in marks)

    def paint(canvas: Canvas) -> None:
        step, left, right, top = 27, 128, 84, 24 * bool(marks)
        canvas.start(top + step * len(rows) + 4)
        axes = canvas.panel(top, step * len(rows), left=left, right=right)
        axes.set_axis_off()
        axes.barh(range(len(rows)), [row[1] for row in rows], height=0.46, color=[row[3] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        most = max([row[1] for row in rows] + [value for value, _ in marks]) or 1
        axes.set_xlim(0, most)
        for value, words in marks:
            axes.axvline(value, color=palette.INK, lw=1.2, ls=(0, (3, 3)), clip_on=False)
            place = left + value / most * (canvas.width - left - right)
            canvas.text(
                place, 10, words, ha="right" if value > most / 2 else "left", color=palette.MUTED, fontsize=SMALL
            )
        for i, (label, _, words, _) in enumerate(rows):
            canvas.text(0, top + (i + 0.5) * step, label)
            canvas.text(canvas.width, top + (i + 0.5) * step, words, ha="right", color=palette.MUTED)

    return draw(name, title, description, paint)


def _tick(unit: Format, value: float, place: int) -> str:
    """Format a tick of the vertical axis, as matplotlib calls it."""
    return q.count(value) if unit is q.count else q.percent_tick(value)


def _ends(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Return the indices of the last epoch of each stage."""
    return [i for i, row in enumerate(rows) if i + 1 == len(rows) or rows[i + 1]["stage"] != row["stage"]]
