"""The figures of pages, as inline SVG in the page's colours; a function returns ``None`` if its data are missing."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.core.errors import install_command
from regrow.reports import quantities as q
from regrow.reports.reading import ReportError
from regrow.reports.records import Run, SearchEpoch
from regrow.reports.summary import name_measure, search_target

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Colours that occur nowhere else: in the SVG, each is replaced by a variable of the page's style.
INK, MUTED, LINE, FAINT, ACCENT, PAPER = (f"#0a0b{i:02}" for i in range(1, 7))
_NAMES = {MUTED: "muted", LINE: "line", FAINT: "faint", ACCENT: "accent", PAPER: "paper"}
_VARIABLES = {INK: "currentColor"} | {colour: f"var(--{name})" for colour, name in _NAMES.items()}
_WIDTH, _PIXELS = 440, 72  # of a figure, in pixels; pixels per inch
_MAX_ROWS = 40  # text domains in a figure
_STYLE = Path(__file__).parent / "templates" / "figures.mplstyle"

# A label, a horizontal and a vertical value; a point with a missing value is not drawn.
Point = tuple[str, float | None, float | None]


@dataclass(frozen=True)
class Drawing:
    """A figure as inline SVG, and in words."""

    svg: str  # the text of the `<svg>` element, with the colours as CSS variables
    description: str  # what it shows, for screen readers


def draw_quality(run: Run) -> Drawing | None:
    """Draw the perplexity of a run's models on each text domain, with 95 % intervals; ``None`` below two domains."""
    rows = [row for row in run.quality if row.seen is not None and row.lost is not None][:_MAX_ROWS]
    if len(rows) < 2:
        return None
    colours = {"before": MUTED, "cut": FAINT, "changed": ACCENT, "recovered": ACCENT}
    if "recovered" in run.models:
        colours["changed"] = FAINT

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        for step, (model, title) in enumerate(run.models.items()):
            places = [i + 0.2 * (step - (len(run.models) - 1) / 2) for i in range(len(rows))]
            values = [row.value(model) or math.nan for row in rows]
            errors = [row.error(model) or 0.0 for row in rows]
            axes.errorbar(values, places, xerr=errors, fmt="o", color=colours[model], label=title)
        axes.set_xscale("log")
        _format_ticks(axes.xaxis, "number")
        labels = [q.shorten(row.name, 20) + ("" if row.seen else " (unseen)") for row in rows]
        axes.set_yticks(range(len(rows)), labels=labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row is at the top
        axes.set_xlabel("perplexity (log scale), lower is better")
        figure.legend(loc="outside upper left", ncols=4)

    ends = [f"{row.name} {q.significant(row.value('before'))} to {q.significant(row.after)}" for row in rows[:12]]
    return _draw("quality", f"Perplexity per text domain: {'; '.join(ends)}", 90 + 30 * len(rows), paint)


def draw_search(run: Run) -> Drawing | None:
    """Draw size, allowed size and validation accuracy over the epochs of a search; ``None`` for other runs."""
    # An epoch that was run twice counts once.
    epochs = list({row.epoch: row for row in run.rows_of(SearchEpoch)}.values())
    if not epochs:
        return None
    measure, _, _ = search_target(run)
    begins = [row.epoch for before, row in pairwise(epochs) if row.stage != before.stage]

    def paint(figure: "Figure") -> None:
        sizes, accuracies = figure.subplots(2, sharex=True)
        xs = [row.epoch for row in epochs]
        sizes.plot(xs, [_nan_if_missing(row.allowed) for row in epochs], "--", color=MUTED, label="allowed")
        sizes.plot(xs, [_nan_if_missing(row.size) for row in epochs], marker="o", color=ACCENT, label="reached")
        accuracies.plot(xs, [_nan_if_missing(row.accuracy) for row in epochs], marker="o", color=ACCENT)
        for axes in (sizes, accuracies):
            for begin in begins:
                axes.axvline(begin - 0.5, color=FAINT)
        sizes.set_title(f"Size of the part that is searched, {name_measure(measure)}")
        accuracies.set_title("Validation accuracy")
        accuracies.set_xlabel("epoch; a vertical line is a new stage")
        accuracies.locator_params(axis="x", integer=True)
        _format_ticks(sizes.yaxis, "count")
        _format_ticks(accuracies.yaxis, "percent")
        sizes.legend()

    return _draw("course", f"Size and validation accuracy over {len(epochs)} epochs", 420, paint)


def draw_front(points: Sequence[Point], x_title: str, y_title: str, *, lower: bool = False) -> Drawing | None:
    """Draw labelled points and their Pareto front of small x and good y; ``None`` below two different x values.

    ``x_title``, ``y_title``: the names of the axes; ``lower``: a low y is better (log scale), else y is a fraction.
    """
    complete = sorted((x, y, label) for label, x, y in points if x is not None and y is not None)
    if len({x for x, _, _ in complete}) < 2:
        return None
    sign = 1 if lower else -1  # sign · y is better the lower it is
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(complete, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * y < sign * front[-1][1]:
            front.append((x, y))

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.plot([x for x, _ in front], [y for _, y in front], color=ACCENT)
        for x, y, label in complete:
            axes.plot([x], [y], "o", color=ACCENT if (x, y) in front else FAINT)
            axes.annotate(q.shorten(label, 16), (x, y), (8, 4), textcoords="offset points", color=MUTED)
        axes.margins(0.2, 0.12)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        if lower:
            axes.set_yscale("log")
        _format_ticks(axes.xaxis, "count")
        _format_ticks(axes.yaxis, "number" if lower else "percent")

    words = "; ".join(f"{label}: {x:.4g}, {y:.4g}" for x, y, label in complete)
    return _draw("front", f"{y_title} against {x_title}: {words}", 340, paint)


def _nan_if_missing(value: float | None) -> float:
    """Return a value, NaN for ``None``: matplotlib leaves a gap there."""
    return math.nan if value is None else value


def _format_ticks(axis: "Axis", style: str) -> None:
    """Put few ticks on an axis, as ``"percent"`` (of fractions), ``"count"`` or ``"number"``; log axes: at 1, 2, 5."""
    from matplotlib import ticker

    log = axis.get_scale() == "log"
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=5) if log else ticker.MaxNLocator(5))
    axis.set_minor_locator(ticker.NullLocator())
    number = ticker.StrMethodFormatter("{x:,.6g}")
    formatters = {"percent": ticker.PercentFormatter(1), "count": ticker.EngFormatter(sep=q.SPACE), "number": number}
    axis.set_major_formatter(formatters[style])


def _draw(name: str, description: str, height: float, paint: Callable[["Figure"], None]) -> Drawing:
    """Return what ``paint`` draws, ``height`` pixels high, in the page's style; raise ReportError without matplotlib.

    ``name`` seeds the ids in the SVG, which are unique on a page; ``description``: the figure in words.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError(f"figures need matplotlib: {install_command('report')}") from None
    buffer = io.StringIO()
    with mpl.rc_context({**mpl.rc_params_from_file(_STYLE, use_default_template=False), "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH / _PIXELS, height / _PIXELS), layout="constrained", facecolor="none")
        paint(figure)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", buffer.getvalue(), flags=re.S)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])  # of groups, which are the same in each figure
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", re.sub(r"font-family: [^;\"]*(; )?", "", svg))
    return Drawing(re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], svg), description)
