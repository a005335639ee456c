"""The page that compares continual-learning runs: accuracy of each, and size."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import SMALL, Canvas, Drawing, draw, steps
from regrow.reports.fronts import against, leaders
from regrow.reports.records import CourseCell, CourseLine, Run, Summary, course_of

MAX_LINES = 24


def _signed(difference: float | None) -> str:
    return q.points(difference).removesuffix(f"{q.SPACE}points")


_FIGURES = (
    ("Final average", "average", q.percent, 1),
    ("Average during learning", "average_along", q.percent, 1),
    ("Learning", "learning", q.percent, 1),
    ("Forgetting", "forgetting", _signed, -1),
    ("Backward transfer", "backward_transfer", _signed, 1),
    ("Forward transfer", "forward_transfer", _signed, 1),
)
COLUMNS = tuple(label for label, *_ in _FIGURES)

Line = tuple[str, list[float | None]]
"""A run's label, and its value after each task."""


def are_learning_runs(summary: Summary) -> bool:
    """Whether every run of a summary is a continual-learning run.

    Args:
        summary: A summary of runs.
    """
    return all(run["course"] for run in summary["runs"])


def headline(summary: Summary) -> str:
    """Return one sentence on which networks are compared, and over how many tasks.

    Args:
        summary: A summary of learning runs.
    """
    runs = summary["runs"]
    models = sorted({run["model"] for run in runs})
    what = f"{len(runs)} runs of {models[0]}" if len(models) == 1 else f"{len(runs)} runs of {len(models)} networks"
    counts = sorted({len(course_of(run)["rows"]) for run in runs})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{what}, each trained on {n} task{'s' * (counts[-1] != 1)}{' in sequence' * (counts[-1] > 1)}."


def details(summary: Summary) -> list[str]:
    """Return a sentence on which run has the highest and the lowest accuracy at the end.

    Args:
        summary: A summary of learning runs.
    """
    known = [(v, run) for run in summary["runs"] if (v := course_of(run)["figures"]["average"]) is not None]
    if len(known) < 2 or not same(summary):
        return []
    (most, best), (least, worst) = (pick(known, key=lambda one: one[0]) for pick in (max, min))
    size = _parameters(best)
    return [
        f"{best['label']} has the highest final average accuracy, {q.percent(most)}"
        f"{'' if size is None else f', with {q.count(size)} parameters'}; "
        f"{worst['label']} the lowest, {q.percent(least)}."
    ]


def alarms(summary: Summary) -> list[str]:
    """Return a warning if the accuracies of the runs cannot be compared.

    Args:
        summary: A summary of learning runs.
    """
    warning = "The runs differ in tasks or in what was evaluated: their accuracies cannot be compared."
    return [] if same(summary) else [warning]


def same(summary: Summary) -> bool:
    """Whether all runs had the same tasks in the same order, were evaluated on the same, and had one scenario.

    Args:
        summary: A summary of learning runs.
    """
    evaluated = {
        (
            tuple(course_of(run)["tasks"][: len(course_of(run)["rows"])]),
            tuple(v is None for v in (course_of(run)["rows"] or [[]])[-1]),
            pair["value"],
        )
        for run in summary["runs"]
        for pair in run["settings"]
        if pair["name"] == "scenario"
    }
    return len(evaluated) <= 1


def table(summary: Summary) -> list[CourseLine]:
    """Return the rows of the comparison table: accuracy, size, growth and time of each run.

    Args:
        summary: A summary of several learning runs.

    Returns:
        One row per run: ``label``, ``cells`` (``value`` in words, and whether it is ``best`` at its size),
        ``parameters`` and ``first`` (at the end, and after the first task), ``growths``, ``shock`` (the largest change
        of mean accuracy by a growth), ``owned`` (the fraction owned at the end, mean over weights), ``seconds``
        and ``known`` (accuracy on each task at the end).
    """
    runs = summary["runs"]
    sizes = [_parameters(run) for run in runs]
    columns: list[list[CourseCell]] = []
    for _, name, unit, sign in _FIGURES:
        values = [course_of(run)["figures"][name] for run in runs]
        leads = leaders(sizes, [None if v is None else sign * v for v in values])
        columns.append([{"value": unit(v), "best": lead} for v, lead in zip(values, leads, strict=True)])
    result: list[CourseLine] = []
    for i, run in enumerate(runs):
        found = course_of(run)
        result.append(
            {
                "label": run["label"],
                "cells": [column[i] for column in columns],
                "parameters": sizes[i],
                "first": found["sizes"][0]["parameters"] if found["sizes"] else None,
                "growths": len(found["events"]),
                "shock": _shock(run),
                "owned": _mean([values[-1] for values in found["owned"].values() if values]),
                "known": found["rows"][-1] if found["rows"] else [],
                "seconds": _sum([row["seconds"] for row in found["sizes"]]),
            }
        )
    return result


def _shock(run: Run) -> float | None:
    sides = [(growth["before"], growth["after"]) for growth in course_of(run)["events"]]
    return max((abs(b - a) for a, b in sides if a is not None and b is not None), default=None)


def accuracy(summary: Summary) -> Drawing | None:
    """Draw the mean accuracy over the tasks learned so far, after each task, one line per run.

    Args:
        summary: A summary of learning runs.
    """
    lines: list[Line] = []
    for run in _few(summary):
        known = [[v for v in row[: i + 1] if v is not None] for i, row in enumerate(course_of(run)["rows"])]
        lines.append((run["label"], [_mean(values) for values in known]))
    return _lines("fig-courses", "Average accuracy over the tasks learned, after each task", lines, q.percent)


def widths(summary: Summary) -> Drawing | None:
    """Draw the number of units of all axes together, after each task, one line per run.

    Args:
        summary: A summary of learning runs.
    """
    lines = [
        (run["label"], [_sum(units) for units in zip(*course_of(run)["widths"].values(), strict=True)])
        for run in _few(summary)
    ]
    return _lines("fig-courses-widths", "Units of all axes together, after each task", lines, q.count)


def sizes(summary: Summary) -> Drawing | None:
    """Draw final average accuracy against parameters; the runs that no smaller run beats are joined.

    Args:
        summary: A summary of learning runs.
    """
    points = [(run["label"], _parameters(run), course_of(run)["figures"]["average"]) for run in summary["runs"]]
    words = ("parameters at the end", "final average accuracy")
    return against("fig-courses-size", "Final average accuracy against parameters", points, *words)


def _lines(name: str, title: str, lines: Sequence[Line], unit: Any) -> Drawing | None:
    """Draw one line per run over tasks, with its label at its end; the one that ends highest is emphasised."""
    lines = [(label, values) for label, values in lines if any(v is not None for v in values)]
    if not lines:
        return None
    ends = [next(v for v in reversed(values) if v is not None) for _, values in lines]
    description = "; ".join(f"{label}: {', '.join(map(unit, values[:12]))}" for label, values in lines[:12])

    def paint(canvas: Canvas) -> None:
        top, right = 12, 118
        high = max(240, 15 * len(lines))
        canvas.start(top + high + 46)
        axes = canvas.panel(top, high, left=54, right=right)
        n = max(len(values) for _, values in lines)
        known = [v for _, values in lines for v in values if v is not None]
        room = max(max(known) - min(known), 0.02 * max(*known, 1e-9)) * 0.06
        low, up = min(known) - room, max(known) + room
        axes.set_xlim(0.8, max(n, 2) + 0.2)
        axes.set_ylim(low, up)
        axes.set_xticks(steps(1, n, 5 if canvas.narrow else 10))
        axes.locator_params(axis="y", nbins=6)
        axes.yaxis.set_major_formatter(lambda value, _: q.count(value) if unit is q.count else q.percent_tick(value))
        axes.grid(axis="y", color=palette.LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.set_xlabel("tasks learned", color=palette.MUTED, fontsize=SMALL, labelpad=4)
        heights = apart([high * (up - end) / (up - low) for end in ends], 14, high)
        for i, ((label, values), height) in enumerate(zip(lines, heights, strict=True)):
            best = i == ends.index(max(ends))
            colour, style = (
                (palette.ACCENT, "-") if best else ((palette.INK, palette.MUTED)[i % 2], _STYLES[i // 2 % len(_STYLES)])
            )
            shown = [math.nan if v is None else v for v in values]
            axes.plot(
                range(1, len(shown) + 1),
                shown,
                "o-",
                ls=style,
                color=colour,
                lw=2 if best else 1.2,
                ms=4,
                zorder=3 if best else 2,
                clip_on=False,
            )
            axes.annotate(
                text_of(label),
                (len(shown), ends[i]),
                xytext=(canvas.width - right + 10, canvas.height - top - height),
                textcoords="figure points",
                va="center",
                color=palette.INK if best else palette.MUTED,
                fontsize=SMALL,
                annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": palette.FAINT, "lw": 0.7, "shrinkA": 1, "shrinkB": 3},
            )

    return draw(name, title, description, paint)


_STYLES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


def apart(places: Sequence[float], least: float, room: float) -> list[float]:
    """Move places so that they are at least ``least`` apart, in their order, and within 0 and ``room`` if possible.

    Args:
        places: The places, in pixels.
        least: The smallest distance, in pixels.
        room: The largest place, in pixels.

    >>> apart([10, 12, 80], 10, 100)
    [10, 20, 80]
    >>> apart([99, 98], 10, 100)
    [100, 90]
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    result = list(places)
    for before, i in zip([None, *order], order, strict=False):
        result[i] = max(result[i], 0 if before is None else result[before] + least)
    limit = room
    for i in reversed(order):
        result[i] = min(result[i], limit)
        limit = result[i] - least
    return result


def text_of(label: str) -> str:
    """Shorten a label for the margin of a figure.

    Args:
        label: The label.
    """
    return label if len(label) <= 17 else label[:16] + "…"


def _few(summary: Summary) -> list[Run]:
    result: list[Run] = summary["runs"][:MAX_LINES]
    return result


def _parameters(run: Run) -> int | None:
    rows = course_of(run)["sizes"]
    result: int | None = rows[-1]["parameters"] if rows else None
    return result


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known and len(known) == len(values) else None
