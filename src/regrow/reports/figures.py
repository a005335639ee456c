"""The figures of pages; each returns ``None`` if its data are missing."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from regrow.reports import quantities as q
from regrow.reports.drawing import ACCENT, COOL, FAINT, INK, MUTED, PAPER, WARM, Drawing, draw
from regrow.reports.findings import rank_means
from regrow.reports.reading import block_of, depths_of, kind_of
from regrow.reports.rows import RunFindings
from regrow.reports.runs import Run
from regrow.reports.search import unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MAX_ROWS, MAX_PANELS, MAX_LAYERS = 40, 6, 500

Line = tuple[str, Sequence[float | None]]
"""A label, and values."""
Panel = tuple[str, Callable[[float | None], str], Sequence[Line]]
"""A title, the format of its values, and its lines."""
Point = tuple[str, float | None, float | None]
"""A label, a horizontal and a vertical value."""


def perplexity(run: Run) -> Drawing | None:
    """Draw perplexity per text domain before and after, with 95 % intervals; domains seen in calibration come first."""
    rows = [row for row in run.perplexity if row.ppl("after") or row.ppl("before")]
    rows = sorted(rows, key=lambda row: not row.seen)[:MAX_ROWS]
    if not rows:
        return None
    sides = {"before": MUTED, "cut": INK, "after": ACCENT}
    ends = ((row.source, [q.significant(row.ppl(side)) for side in ("before", "after")]) for row in rows[:12])
    description = "; ".join(f"{source} {' to '.join(values)}" for source, values in ends)

    def paint(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        for y, row in enumerate(rows):
            known = [ppl for side in sides if (ppl := row.ppl(side))]
            axes.plot(known, [y] * len(known), color=FAINT, zorder=1)
        for side, colour in sides.items():
            known = [row.ppl(side) or math.nan for row in rows]
            marker, size, edge = ("|", 14, INK) if side == "cut" else ("o", 9, PAPER)
            label = run.outcome.lower() if side == "after" else side
            if any(row.ppl(side) for row in rows):
                axes.plot(known, range(len(rows)), marker, color=colour, label=label, ms=size, mec=edge)
            for y, row in enumerate(rows if side != "cut" else []):
                low, high = (getattr(row, side) and getattr(row, side).ends) or (math.nan, math.nan)
                axes.hlines([y], low, high, color=colour, lw=6, alpha=0.26)
        axes.set_xscale("log")
        _format(axes.xaxis, q.tick, narrow)
        names = [f"{q.shorten(row.source, 20)}{'' if row.seen else ' (unseen)'}" for row in rows]
        axes.set_yticks(range(len(rows)), labels=names, color=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel("perplexity (log scale), lower is better")
        figure.legend(loc="outside upper left", ncols=3)

    return draw(
        "fig-perplexity", "Perplexity per text domain, before and after", description, 90 + 34 * len(rows), paint
    )


def widths(run: Run) -> Drawing | None:
    """Draw the units left per layer over depth, one panel per kind of axis."""
    groups = [kind for kind in run.widths if kind.changed][:MAX_PANELS]
    if not groups:
        return None
    counts = [f"{kind.before:,} → {kind.after:,} units, {q.percent(kind.after / kind.before)} kept" for kind in groups]

    def paint(figure: "Figure", narrow: bool) -> None:
        for axes, kind, words in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, counts, strict=True):
            rows = kind.rows[:MAX_LAYERS]
            depth = [row.depth for row in rows]
            _bars(axes, depth, [row.before for row in rows], FAINT, narrow, "cut")
            _bars(axes, depth, [row.after for row in rows], ACCENT, narrow, "kept")
            axes.set_title(f"{q.shorten(kind.kind, 40)}{chr(10) if narrow else ': '}{words}")
            _depth(axes, kind.numbered)
            axes.set_ylim(0)
            _format(axes.yaxis, q.count, narrow)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)

    description = "; ".join(f"{kind.kind}: {words}" for kind, words in zip(groups, counts, strict=True))
    return draw("fig-widths", "Units per layer, before and after", description, 60 + 170 * len(groups), paint)


def spectrum(findings: RunFindings | None) -> Drawing | None:
    """Draw, per layer, how many units change rank between text domains beyond noise, and how similar the orders are."""
    means = [row for row in rank_means(findings) if not row.pooled][:3] if findings else []
    if findings is None or not means:
        return None
    spaces = [
        [row for row in findings.spectrum if row.axes == 1 and kind_of(row.space, row.label) == kind.name][:MAX_LAYERS]
        for kind in means
    ]
    correlations = {
        "spearman": ("between domains", INK, "_"),
        "spearman_shards": ("between parts of different domains", ACCENT, "o"),
        "spearman_within": ("between parts of one domain", MUTED, "o"),
    }
    titles = [
        f"{kind.name}: {q.percent(kind.means['significant'])} of the units change rank beyond noise, "
        f"mean rank correlation {q.significant(kind.means['spearman'])}"
        for kind in means
    ]

    def paint(figure: "Figure", narrow: bool) -> None:
        panels = figure.subplots(2 * len(means), squeeze=False)[:, 0]
        for moved, alike, rows, title in zip(panels[::2], panels[1::2], spaces, titles, strict=True):
            depth, numbered = depths_of([block_of(row.space) for row in rows])
            _bars(moved, depth, [row.exceeds or 0 for row in rows], FAINT, narrow, "F above 1")
            _bars(moved, depth, [row.significant or 0 for row in rows], ACCENT, narrow, "beyond noise")
            chance = [math.nan if row.exceeds_null is None else row.exceeds_null for row in rows]
            moved.plot(depth, chance, "_", mec=INK, ms=10, label="F above 1 by chance")
            moved.axhline(0.05, color=INK, lw=1, ls="--")
            moved.set_ylim(0, 1)
            moved.set_title(q.shorten(title, 44 if narrow else 110))
            _format(moved.yaxis, q.percent_tick, narrow)
            for name, (label, colour, marker) in correlations.items():
                values = [math.nan if (v := getattr(row, name)) is None else v for row in rows]
                alike.plot(
                    depth, values, marker, color=colour, mec=colour if marker == "_" else PAPER, ms=9, label=label
                )
            alike.set_title("rank correlations")
            _format(alike.yaxis, q.tick, narrow)
            for axes in (moved, alike):
                _depth(axes, numbered)

        handles = [line for axes in panels[:2] for line in axes.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside lower left", ncols=1 if narrow else 3)

    title = "Rank changes between text domains, per layer"
    return draw("fig-spectrum", title, "; ".join(titles), 400 * len(means) + 90, paint)


def learned_size(run: Run) -> Drawing | None:
    """Draw the number of parameters, and of non-zero parameters, after each task."""
    records = run.course.records if run.course else []
    sizes: list[Line] = [("parameters", [row.parameters for row in records])]
    sizes.append(("nonzero", [row.nonzero for row in records]))
    return draw_lines("fig-course-size", "Parameters after each task", "tasks learned", [("", q.count, sizes)])


def search_size(run: Run) -> Drawing | None:
    """Draw size, allowed size and validation accuracy over the epochs of a search."""
    rows = run.search.epochs if run.search else []
    if run.search is None or not rows:
        return None
    sizes = [("allowed", [row.allowed for row in rows]), ("active", [row.size for row in rows])]
    panels: list[Panel] = [
        (f"Size of the active part, {unit(run.search)}", q.count, sizes),
        ("Validation accuracy", q.percent_tick, [("accuracy", [row.accuracy for row in rows])]),
    ]
    begins = [row.epoch for i, row in enumerate(rows) if i and row.stage != rows[i - 1].stage]
    title, below = "Size and validation accuracy over epochs", "epoch; a dashed line is a new stage"
    return draw_lines("fig-search-size", title, below, panels, [row.epoch for row in rows], begins)


def search_front(run: Run) -> Drawing | None:
    """Draw validation accuracy against size for the networks at the epochs of the last stage."""
    if run.search is None or not run.search.front:
        return None
    points: list[Point] = [(f"epoch {row.epoch}", row.size, row.accuracy) for row in run.search.front]
    points.append(("final", run.search.reached, run.search.network.accuracy))
    title = "Validation accuracy against size during the search"
    return draw_front("fig-search-front", title, points, unit(run.search), "validation accuracy, before training")


def draw_front(
    name: str, title: str, points: Sequence[Point], below: str, above: str, lower: bool = False
) -> Drawing | None:
    """Draw labelled points, and a line through those that no smaller one beats."""
    known = [(label, x, y) for label, x, y in points if x is not None and y is not None]
    if len({x for _, x, _ in known}) < 2:
        return None
    xs, ys = [x for _, x, _ in known], [y for _, _, y in known]
    leads = q.leaders(xs, [-y if lower else y for y in ys])
    front = sorted((x, y) for x, y, lead in zip(xs, ys, leads, strict=True) if lead)

    def paint(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        axes.plot([x for x, _ in front], [y for _, y in front], color=ACCENT)
        for (label, x, y), lead in zip(known, leads, strict=True):
            axes.plot([x], [y], "o", ms=9, color=ACCENT if lead else FAINT)
            axes.annotate(
                q.shorten(label, 18), (x, y), (8, 3), textcoords="offset points", color=INK if lead else MUTED
            )
        axes.margins(0.2, 0.12)
        axes.set_xlabel(below)
        axes.set_ylabel(above)
        if lower:
            axes.set_yscale("log")
        _format(axes.xaxis, q.percent_tick if lower else q.count, narrow)
        _format(axes.yaxis, q.tick if lower else q.percent_tick, narrow)

    write = (q.percent, q.significant) if lower else (q.count, q.percent)
    description = "; ".join(f"{label}: {write[0](x)} {below}, {write[1](y)}" for label, x, y in known)
    return draw(name, title, description, 340, paint)


def draw_lines(
    name: str,
    title: str,
    below: str,
    panels: Sequence[Panel],
    xs: Sequence[int] = (),
    begins: Sequence[int] = (),
    floor: float | None = 0,
) -> Drawing | None:
    """Draw panels of lines over tasks or epochs."""
    known = [
        (head, write, [line for line in lines if any(v is not None for v in line[1])]) for head, write, lines in panels
    ]
    known = [panel for panel in known if panel[2]]
    if not known:
        return None

    def paint(figure: "Figure", narrow: bool) -> None:
        from cycler import cycler

        for axes, (head, write, lines) in zip(figure.subplots(len(known), squeeze=False)[:, 0], known, strict=True):
            axes.set_prop_cycle(cycler(ls=["-", "--", ":", "-."]) * cycler(color=[ACCENT, INK, COOL, WARM, MUTED]))
            for label, values in lines:
                shown = [math.nan if v is None else v for v in values]
                axes.plot(xs or range(1, len(shown) + 1), shown, marker="o", label=q.shorten(label, 22))
            for begin in begins:
                axes.axvline(begin - 0.5, color=MUTED, lw=1, ls="--")
            axes.set_title(head)
            axes.set_xlabel(below)
            axes.set_ylim(bottom=floor)
            axes.locator_params(axis="x", integer=True)
            _format(axes.yaxis, write, narrow)
        if labels > 1:
            figure.legend(loc="outside lower left", ncols=2 if narrow else 4)

    description = "; ".join(
        f"{head}{': ' * bool(head)}{label}: {', '.join(map(write, values[:12]))}"
        for head, write, lines in known
        for label, values in lines[:12]
    )
    labels = sum(len(lines) for _, _, lines in known)
    return draw(name, title, description, 200 * len(known) + 40 + 10 * labels, paint)


def _bars(axes: "Axes", at: Sequence[int], heights: Sequence[float], colour: str, narrow: bool, label: str) -> None:
    """Draw vertical bars as one collection; hundreds of separate bars take seconds."""
    thick = min(24.0, 0.7 * (280 if narrow else 660) / max(max(at) - min(at) + 1, 1))
    axes.vlines(at, 0, heights, color=colour, lw=thick, label=label)


def _depth(axes: "Axes", numbered: bool) -> None:
    axes.set_xlabel("layer" if numbered else "place in the network")
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.05)
    axes.grid(visible=False, axis="x")


def _format(axis: "Axis", write: Callable[[Any], str], narrow: bool) -> None:
    """Write the ticks of a matplotlib axis in the page's format; few on a narrow screen and on log axes."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    most = 4 if narrow else 7
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5), numticks=most) if axis.get_scale() == "log" else MaxNLocator(most)
    )
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: write(value))
