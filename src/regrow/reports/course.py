"""The page of a continual-learning run: the accuracy matrix, growth, and the capacity that is still free."""

import math
from collections.abc import Sequence
from typing import Any

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import SMALL, Canvas, Drawing, Entry, draw, legend, steps
from regrow.reports.reading import JsonObject, RunRecord, items, mapping, number, size, text
from regrow.reports.records import Course, GrowthRow, KeyNumber, Run, Values, course_of

Panel = tuple[str, list[list[float | None]]]
"""A heading, and for every entry of the legend its values after each task."""

MAX_TASKS = 200
MAX_CELLS = 40
MAX_PANELS = 10
MAX_NAMES = 200

_FIGURES = ("average", "average_along", "learning", "backward_transfer", "forgetting", "forward_transfer")


def course(folder: RunRecord) -> Course | None:
    """Return the measurements of a continual-learning run for its page.

    Args:
        folder: A run folder.

    Returns:
        ``tasks`` (names), ``rows`` (the accuracy matrix, one list per task learned), ``before`` (accuracy of the
        untrained network), ``gone`` (names of tasks whose data are missing), ``figures``, ``sizes`` (one
        entry per task learned: ``parameters``, ``nonzero``, ``macs`` of an example, ``remembered`` (bytes beside the
        network) and ``seconds``), ``widths``, ``owned`` and ``free`` (name → value after each task) and ``events`` (one
        entry per growth); ``None`` if it is a run of
        another kind.
    """
    if folder.run.get("verb") != "learn":
        return None
    lines: dict[str, list[JsonObject]] = {}
    for line in folder.metrics:
        lines.setdefault(text(line.get("what")), []).append(line)
    records_by_task: dict[int, JsonObject] = {}
    for line in lines.get("task", []):
        if (i := size(line.get("task"), MAX_TASKS - 1)) is not None:
            records_by_task[i] = line
    last = mapping((lines.get("matrix") or [{}])[-1])
    rows = dict(enumerate(_shares(row) for row in items(last.get("matrix"), MAX_TASKS)))
    whole = max(records_by_task, default=-1) < len(
        rows
    )  # further tasks may be under way: their matrix is still to come
    rows = {i: _shares(line.get("accuracy")) for i, line in records_by_task.items()} | rows
    count = next(i for i in range(MAX_TASKS + 1) if not rows.get(i))
    records = [mapping(records_by_task.get(i)) for i in range(count)]
    names = [text(name, 60) for name in items(last.get("tasks"), MAX_TASKS)]
    names += [text(record.get("name"), 60) for record in records[len(names) :]]
    known = max((len(rows[i]) for i in range(count)), default=0)
    return {
        "tasks": [name or f"task {i + 1}" for i, name in enumerate(names + [""] * (known - len(names)))],
        "rows": [rows[i] for i in range(count)],
        "before": _shares(last.get("before")),
        "gone": [text(name, 60) for name in items(mapping((lines.get("gone") or [{}])[-1]).get("tasks"), MAX_TASKS)],
        "figures": {name: number(last.get(name), -1, 1) if whole else None for name in _FIGURES},
        "sizes": [
            {
                "parameters": size(record.get("parameters")),
                "nonzero": size(record.get("nonzero")),
                "macs": size(record.get("macs")),
                "remembered": size(record.get("remembered")),
                "seconds": number(record.get("seconds"), 0),
            }
            for record in records
        ],
        "widths": _over(records, "widths"),
        "owned": _over(records, "owned"),
        "free": _over(records, "free"),
        "events": [_event(line) for line in lines.get("growth", [])[: 10 * MAX_TASKS]],
    }


def headline(run: Run) -> str:
    """Return one sentence on what was learned, and the accuracy at the end.

    Args:
        run: A run of the summary.
    """
    found = course_of(run)
    who, n = run["method"] or "regrow learn", len(found["rows"])
    deed = f"{who} trained {run['model']} on {n} task{'s' * (n != 1)}{' in sequence' * (n > 1)}."
    if (average := found["figures"]["average"]) is None:
        return f"{deed} Its accuracy on all of them was not measured."
    over = f", on average over {'all' if (k := _measured(found)) == n else f'the {k} that could be evaluated'}"
    return f"{deed} Final accuracy: {q.percent(average)}{over * (n > 1)}."


def details(run: Run) -> list[str]:
    """Return sentences below the headline: the origin of the method, and how the network grew.

    Args:
        run: A run of the summary.
    """
    found = course_of(run)
    lines = []
    if run["method"] == "sparsegrow":
        lines.append(
            "SparseGrow is reconstructed: the paper's body was not available, so it follows the abstracts and the "
            "public code of a predecessor; what these leave open is ours."
        )
    if found["gone"]:
        lines.append(
            f"Data of {', '.join(found['gone'])} were missing: accuracy on those tasks was not measured, and "
            "the figures are means over the others."
        )
    first, last = (found["sizes"][i]["parameters"] if found["sizes"] else None for i in (0, -1))
    n = len(found["events"])
    if n and first and last:
        lines.append(
            f"The network grew {n} time{'s' * (n != 1)}; it had {q.count(first)} parameters after the first task, "
            f"{q.count(last)} after the last."
        )
    elif not n:
        lines.append("The network did not grow.")
    return lines


def key_numbers(run: Run) -> list[KeyNumber]:
    """Return the six figures of the accuracy matrix, as ``label``, ``value`` and a line ``below`` each.

    Args:
        run: A run of the summary.
    """
    found, n, k = course_of(run)["figures"], len(course_of(run)["rows"]), _measured(course_of(run))
    over = "all tasks" if k == n else f"the {k} of {n} tasks that could be evaluated"
    shown = (
        ("Final average accuracy", "average", q.percent, f"over {over}, after the last"),
        ("Average during learning", "average_along", q.percent, "over the tasks learned, after each"),
        ("Learning accuracy", "learning", q.percent, "of each task, just after learning it"),
        ("Backward transfer", "backward_transfer", q.points, "at the end, minus just after learning"),
        ("Forgetting", "forgetting", q.points, "best earlier accuracy minus final"),
        ("Forward transfer", "forward_transfer", q.points, "before learning the task, minus untrained"),
    )
    return [{"label": a, "value": unit(found[b]), "below": c} for a, b, unit, c in shown if found[b] is not None]


def _measured(found: Course) -> int:
    """Return the number of tasks whose accuracy was measured at the end."""
    return sum(v is not None for v in found["rows"][-1][: len(found["rows"])]) if found["rows"] else 0


def matrix(run: Run) -> Drawing | None:
    """Draw the accuracy matrix as a heat map: rows are tasks learned, columns are tasks evaluated.

    Args:
        run: A run of the summary.
    """
    found = run["course"]
    if not found or not any(one is not None for row in (*found["rows"], found["before"]) for one in row):
        return None
    table = [*([("none", found["before"])] if found["before"] else []), *_named(found)]
    table = [(name, row[:MAX_CELLS]) for name, row in table[: MAX_CELLS + 1]]
    wide = max(len(row) for _, row in table)
    first = len(table) - min(len(found["rows"]), MAX_CELLS)
    description = "; ".join(f"after {name}: {', '.join(q.percent(v) for v in row[:12])}" for name, row in table[:12])

    def paint(canvas: Canvas) -> None:
        from matplotlib.collections import PolyCollection

        left, top, high = (34 if canvas.narrow else 128), 46, 27
        canvas.start(top + high * len(table) + 6)
        axes = canvas.panel(top, high * len(table), left=left, right=2)
        axes.set_axis_off()
        axes.set_xlim(0, wide)
        axes.set_ylim(len(table), 0)
        step = (canvas.width - left - 2) / wide
        cells = [(x, y, v) for y, (_, row) in enumerate(table) for x, v in enumerate(row) if v is not None]
        corners = [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for x, y, _ in cells]
        # Half the colour at most, so that numbers can be read on it by light and by dark.
        strengths = [0.02 + 0.48 * v for _, _, v in cells]
        axes.add_collection(
            PolyCollection(corners, facecolors=palette.ACCENT, edgecolors=palette.PAPER, alpha=strengths)
        )
        for x, y, v in cells if step >= 21 else []:
            words = f"{100 * v:.{1 if step >= 30 else 0}f}"
            axes.text(x + 0.5, y + 0.5, words, ha="center", va="center", color=palette.INK, fontsize=SMALL)
        stairs = [(x, first + x) for x in range(min(wide, len(table) - first))]
        axes.plot(
            [x + d for x, _ in stairs for d in (0, 1)],
            [y for _, y in stairs for _ in (0, 1)],
            color=palette.INK,
            lw=1.2,
        )
        canvas.text(0, 12, "learned" if canvas.narrow else "after learning", color=palette.MUTED, fontsize=SMALL)
        canvas.text(
            canvas.width, 12, "evaluated task, accuracy in per cent", color=palette.MUTED, fontsize=SMALL, ha="right"
        )
        for x in steps(1, wide, canvas.width // 34):
            canvas.text(left + (x - 0.5) * step, 34, f"{x}", color=palette.MUTED, fontsize=SMALL, ha="center")
        for y, (name, _) in enumerate(table):
            words = f"{y - first + 1}" if y >= first else "0"
            words = words if canvas.narrow else text(f"{words}  {name}", 18)
            canvas.text(0, top + (y + 0.5) * high, words, fontsize=SMALL)

    return draw("fig-matrix", "Accuracy on every task after each task", description, paint)


def widths(run: Run) -> Drawing | None:
    """Draw the width of each axis after each task; axes that changed come first.

    Args:
        run: A run of the summary.
    """
    found = run["course"]
    axes = sorted((found or {"widths": {}})["widths"].items(), key=lambda one: len(set(one[1]) - {None}) < 2)
    panels: list[Panel] = [(key, [values]) for key, values in axes[:MAX_PANELS]]
    return _panels(
        "fig-course-widths", "Width of each axis after each task", panels, [("units", palette.ACCENT, "o", 1.0)]
    )


def parameters(run: Run) -> Drawing | None:
    """Draw the number of parameters, and of non-zero parameters, after each task.

    Args:
        run: A run of the summary.
    """
    rows = run["course"]["sizes"] if run["course"] else []
    values: list[Values] = [[row["parameters"] for row in rows], [row["nonzero"] for row in rows]]
    entries = [("parameters", palette.MUTED, "o", 1.0), ("nonzero", palette.ACCENT, "o", 1.0)]
    return _panels("fig-course-size", "Parameters after each task", [("Parameters", values)], entries)


def shares(run: Run) -> Drawing | None:
    """Draw, per weight, the fraction owned by earlier tasks and the fraction that is free, after each task.

    Args:
        run: A run of the summary.
    """
    owned, free = (run["course"]["owned"], run["course"]["free"]) if run["course"] else ({}, {})
    names = list(dict.fromkeys([*owned, *free]))[:MAX_PANELS]
    panels: list[Panel] = [(name, [owned.get(name, []), free.get(name, [])]) for name in names]
    entries = [("owned", palette.MUTED, "o", 1.0), ("free", palette.ACCENT, "o", 1.0)]
    return _panels("fig-course-owned", "Owned and free share of each weight after each task", panels, entries, 1.0)


def _panels(
    name: str, title: str, panels: Sequence[Panel], entries: Sequence[Entry], top: float | None = None
) -> Drawing | None:
    """Draw small panels in a grid: values over tasks, from 0 up."""
    measured = [i for i in range(len(entries)) if any(v is not None for _, lines in panels for v in lines[i])]
    if not measured:
        return None
    entries = [entries[i] for i in measured]
    panels = [(heading, [lines[i] for i in measured]) for heading, lines in panels]
    unit = q.percent if top else q.count
    description = "; ".join(
        f"{heading}: "
        + ", ".join(f"{entry[0]} {_span(line, unit)}" for entry, line in zip(entries, lines, strict=True))
        for heading, lines in panels
    )

    def paint(canvas: Canvas) -> None:
        across = 1 if canvas.narrow or len(panels) == 1 else 2
        gap, head, high, foot = 34, 34, 92, 50
        width = (canvas.width - gap * (across - 1)) / across
        canvas.start(26 + math.ceil(len(panels) / across) * (head + high + foot))
        legend(canvas, 12, entries)
        for i, (heading, lines) in enumerate(panels):
            x, y = (i % across) * (width + gap), 26 + (i // across) * (head + high + foot)
            canvas.text(x, y + 16, text(heading, 26 if across > 1 or canvas.narrow else 60))
            words = f"{entries[-1][0]}: " * (len(entries) > 1) + _span(lines[-1], unit)
            canvas.text(x + width, y + 16, words, color=palette.MUTED, fontsize=SMALL, ha="right")
            axes = canvas.panel(y + head, high, left=x + 54, width=width - 58)
            n = max(map(len, lines))
            axes.set_xlim(0.7, max(n, 2) + 0.3)
            axes.set_xticks(steps(1, n, 7))
            most = top or max((v for line in lines for v in line if v), default=1)
            axes.set_ylim(0, most * 1.08)
            axes.set_yticks([0, most])
            axes.yaxis.set_major_formatter(lambda value, _: unit(value) if not top else f"{100 * value:.0f}{q.SPACE}%")
            axes.grid(axis="y", color=palette.LINE, linewidth=1)
            axes.set_axisbelow(True)
            axes.set_xlabel("tasks learned", color=palette.MUTED, fontsize=SMALL, labelpad=4)
            for (_, colour, marker, _), line in zip(entries, lines, strict=True):
                points = [math.nan if v is None else v for v in line]
                axes.plot(range(1, len(line) + 1), points, marker, ls="-", color=colour, lw=1.6, ms=5, clip_on=False)

    return draw(name, title, description, paint)


def _span(line: Sequence[float | None], unit: Any) -> str:
    known = [unit(v) for v in line if v is not None]
    return " → ".join(dict.fromkeys((known[0], known[-1]))) if known else q.NONE


def _named(found: Course) -> list[tuple[str, list[float | None]]]:
    return list(zip(found["tasks"], found["rows"], strict=False))


def _event(line: JsonObject) -> GrowthRow:
    """Return the data of one growth for the page; task and epoch are counted from 1."""
    task, epoch = (size(line.get(name)) for name in ("task", "epoch"))
    return {
        "task": None if task is None else task + 1,
        "epoch": None if epoch is None else epoch + 1,
        "grown": {text(key): n for key, value in _entries(line.get("grown")) if (n := size(value))},
        "logits_moved": number(line.get("logits_moved"), 0),
        "parameters": size(line.get("parameters")),
        "newborn_gradient": number(line.get("newborn_gradient"), 0, 1),
        "newborn_entries": number(line.get("newborn_entries"), 0, 1),
        "recovery": _recovery(size(line.get("recovery_steps")), size(line.get("steps_watched"))),
        "before": _mean(line.get("accuracy_before")),
        "after": _mean(line.get("accuracy_after")),
    }


def _mean(value: object) -> float | None:
    known = [v for v in _shares(value) if v is not None]
    return sum(known) / len(known) if known else None


def _recovery(steps: int | None, watched: int | None) -> str:
    """Return after how many steps the loss had recovered, in words."""
    if steps is not None:
        return q.count(steps)
    return f"not in {q.count(watched)}" if watched else q.NONE


def _over(records: Sequence[JsonObject], what: str) -> dict[str, list[float | None]]:
    """Return name → its value in each record, ``None`` where a record does not have it."""
    names = dict.fromkeys(key for record in records for key, _ in _entries(record.get(what)))
    return {
        text(name): [number(mapping(record.get(what)).get(name), 0) for record in records]
        for name in list(names)[:MAX_NAMES]
    }


def _entries(value: object) -> list[tuple[str, object]]:
    return list(mapping(value).items())[:MAX_NAMES]


def _shares(value: object) -> list[float | None]:
    return [number(v, 0, 1) for v in items(value, MAX_TASKS)]
