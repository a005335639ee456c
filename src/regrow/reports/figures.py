"""The figures of pages, as inline SVG in the page's colours; a function returns ``None`` if its data are missing."""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.reports import quantities as q
from regrow.reports.reading import ReportError
from regrow.reports.records import Run, SearchEpoch
from regrow.reports.summary import MEASURES, measure_search

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK, MUTED, LINE, FAINT, ACCENT, PAPER = (f"#0a0b{i:02}" for i in range(1, 7))
_NAMES = {MUTED: "muted", LINE: "line", FAINT: "faint", ACCENT: "accent", PAPER: "paper"}
_VARIABLES = {INK: "currentColor"} | {colour: f"var(--{name})" for colour, name in _NAMES.items()}
_WIDTH, _PIXELS, _MAX_ROWS = 440, 72, 40
_STYLE = Path(__file__).parent / "templates" / "figures.mplstyle"

Point = tuple[str, float | None, float | None]
"""A label, a horizontal and a vertical value."""


@dataclass(frozen=True)
class Drawing:
    """A figure as inline SVG, and in words."""

    svg: str
    description: str


def draw_quality(run: Run) -> Drawing | None:
    """Draw the perplexity on each text domain of the models of a run, with 95 % intervals, if there are several."""
    rows = [row for row in run.quality if row.seen is not None and row.lost is not None][:_MAX_ROWS]
    if len(rows) < 2:
        return None
    colours = {"before": MUTED, "cut": FAINT, "changed": ACCENT, "recovered": ACCENT}
    if "recovered" in run.models:
        colours["changed"] = FAINT

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        for model, title in run.models.items():
            values = [row.value(model) or math.nan for row in rows]
            errors = [row.error(model) or 0.0 for row in rows]
            axes.errorbar(values, range(len(rows)), xerr=errors, fmt="o", color=colours[model], label=title)
        axes.set_xscale("log")
        _format(axes.xaxis, "number")
        axes.set_yticks(
            range(len(rows)), labels=[q.shorten(row.name, 20) + " (unseen)" * (not row.seen) for row in rows]
        )
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("perplexity (log scale), lower is better")
        figure.legend(loc="outside upper left", ncols=4)

    ends = [f"{row.name} {q.significant(row.value('before'))} to {q.significant(row.after)}" for row in rows[:12]]
    return _draw("quality", f"Perplexity per text domain: {'; '.join(ends)}", 90 + 30 * len(rows), paint)


def draw_course(run: Run) -> Drawing | None:
    """Draw size, allowed size and validation accuracy over the epochs of a search."""
    epochs = list({row.epoch: row for row in run.of(SearchEpoch)}.values())  # an epoch that was run twice counts once
    if not epochs:
        return None
    measure = MEASURES.get(name := measure_search(run)[0], name)
    begins = [row.epoch for before, row in pairwise(epochs) if row.stage != before.stage]

    def paint(figure: "Figure") -> None:
        sizes, accuracies = figure.subplots(2, sharex=True)
        xs = [row.epoch for row in epochs]
        sizes.plot(xs, [_number(row.allowed) for row in epochs], "--", color=MUTED, label="allowed")
        sizes.plot(xs, [_number(row.size) for row in epochs], marker="o", color=ACCENT, label="reached")
        accuracies.plot(xs, [_number(row.accuracy) for row in epochs], marker="o", color=ACCENT)
        for axes in (sizes, accuracies):
            for begin in begins:
                axes.axvline(begin - 0.5, color=FAINT)
        sizes.set_title(f"Size of the part that is searched, {measure}")
        accuracies.set_title("Validation accuracy")
        accuracies.set_xlabel("epoch; a vertical line is a new stage")
        accuracies.locator_params(axis="x", integer=True)
        _format(sizes.yaxis, "count")
        _format(accuracies.yaxis, "percent")
        sizes.legend()

    return _draw("course", f"Size and validation accuracy over {len(epochs)} epochs", 420, paint)


def draw_front(points: Sequence[Point], below: str, beside: str, *, lower: bool = False) -> Drawing | None:
    """Draw labelled points, and a line through those that no smaller one beats; ``lower``: a low value is better."""
    known = sorted((x, y, label) for label, x, y in points if x is not None and y is not None)
    if len({x for x, _, _ in known}) < 2:
        return None
    front: list[tuple[float, float]] = []
    for x, y, _ in sorted(known, key=lambda point: (point[0], point[1] if lower else -point[1])):
        if not front or (y < front[-1][1] if lower else y > front[-1][1]):
            front.append((x, y))

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.plot([x for x, _ in front], [y for _, y in front], color=ACCENT)
        for x, y, label in known:
            axes.plot([x], [y], "o", color=ACCENT if (x, y) in front else FAINT)
            axes.annotate(q.shorten(label, 16), (x, y), (8, 4), textcoords="offset points", color=MUTED)
        axes.margins(0.2, 0.12)
        axes.set_xlabel(below)
        axes.set_ylabel(beside)
        if lower:
            axes.set_yscale("log")
        _format(axes.xaxis, "count")
        _format(axes.yaxis, "number" if lower else "percent")

    words = "; ".join(f"{label}: {x:.4g}, {y:.4g}" for x, y, label in known)
    return _draw("front", f"{beside} against {below}: {words}", 340, paint)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _format(axis: "Axis", what: str) -> None:
    """Write the ticks of a matplotlib axis as percentages, counts or plain numbers; few, on log axes at 1, 2 and 5."""
    from matplotlib import ticker

    log = axis.get_scale() == "log"
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=5) if log else ticker.MaxNLocator(5))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(
        {
            "percent": ticker.PercentFormatter(1),
            "count": ticker.EngFormatter(sep=q.SPACE),
            "number": ticker.StrMethodFormatter("{x:,.6g}"),
        }[what]
    )


def _draw(name: str, description: str, height: float, paint: Callable[["Figure"], None]) -> Drawing:
    """Draw a figure; ids depend on its name, colours follow the page, and text stays text in the page's own font."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("figures need matplotlib: pip install 'regrow[report]'") from None
    buffer = io.StringIO()
    with mpl.rc_context({**mpl.rc_params_from_file(_STYLE, use_default_template=False), "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH / _PIXELS, height / _PIXELS), layout="constrained", facecolor="none")
        paint(figure)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", buffer.getvalue(), flags=re.S)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])  # of groups, which are the same in each figure
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", re.sub(r"font-family: [^;\"]*(; )?", "", svg))
    return Drawing(re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], svg), description)
