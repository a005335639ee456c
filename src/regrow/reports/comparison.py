"""Figures of a page that compares pruning runs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import SMALL, Canvas, Drawing, draw, log_axis, log_ticks
from regrow.reports.fronts import draw_front
from regrow.reports.records import Run, Summary
from regrow.reports.words import same_dense

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_KINDS = 12


def perplexity(summary: Summary) -> Drawing | None:
    """Draw the perplexity of each run, one panel per text domain; the best runs at their size are marked.

    Args:
        summary: A summary of several runs.
    """
    runs, kinds = summary["runs"], summary["kinds"][:MAX_KINDS]
    found = [(kind, [v for run in runs if (v := _value(run, kind))]) for kind in kinds]
    table = [(kind, values) for kind, values in found if len(values) == len(runs)]
    if not table:
        return None
    dense = same_dense(summary) or {}
    labels = [run["label"] for run in runs]
    description = "; ".join(
        f"{kind}: " + ", ".join(f"{label} {q.significant(v)}" for label, v in zip(labels, values, strict=True))
        for kind, values in table[:6]
    )

    def paint(canvas: Canvas) -> None:
        columns = 1 if canvas.narrow else 2
        gap, step, head, foot = 44, 25, 40, 44
        width = (canvas.width - gap * (columns - 1)) / columns
        height = step * len(runs)
        canvas.start(math.ceil(len(table) / columns) * (head + height + foot) + 8)
        for i, (kind, values) in enumerate(table):
            x, top = (i % columns) * (width + gap), (i // columns) * (head + height + foot)
            canvas.text(x, top + 18, kind[:30])
            left = 112
            axes = canvas.panel(top + head, height, left=x + left, width=width - left)
            axes.set_ylim(len(runs) - 0.5, -0.5)
            known = [*values, dense[kind]] if kind in dense else values
            log_axis(axes, known, width - left, 36, "")
            if kind in dense:
                axes.axvline(dense[kind], color=palette.MUTED, linewidth=1.2, linestyle=(0, (3, 3)))
                canvas.text(
                    x + width, top + 18, f"before {q.significant(dense[kind])}", color=palette.MUTED, ha="right"
                )
            for place, (value, best) in enumerate(zip(values, leaders(runs, values), strict=True)):
                face = palette.ACCENT if best else palette.FAINT
                axes.plot([value], [place], "o", markersize=9, markerfacecolor=face, markeredgecolor=palette.PAPER)
                axes.annotate(
                    q.significant(value),
                    (value, place),
                    xytext=(8, 0),
                    textcoords="offset points",
                    va="center",
                    color=palette.INK if best else palette.MUTED,
                    fontsize=SMALL,
                    annotation_clip=False,
                )
                label = runs[place]["label"]
                label = label if len(label) < 16 else label[:14] + "…"
                canvas.text(
                    x,
                    top + head + (place + 0.5) * step,
                    label,
                    fontsize=SMALL,
                    color=palette.INK if best else palette.MUTED,
                )

    return draw("fig-kinds", "Perplexity per text domain and run", description, paint)


def front(summary: Summary) -> Drawing | None:
    """Draw the geometric mean of perplexity over the shared text domains against the fraction of weights kept.

    Args:
        summary: A summary of several runs.
    """
    points = [(run["label"], kept_share(run), (run["means"]["shared"] or {}).get("after")) for run in summary["runs"]]
    known = [(label, x, y) for label, x, y in points if x and y]
    if len({x for _, x, _ in known}) < 2:
        return None
    description = "; ".join(f"{label}: {q.percent(x)} kept, perplexity {q.significant(y)}" for label, x, y in known)
    best = [not any(o[1] <= p[1] and o[2] <= p[2] and o[1:] != p[1:] for o in known) for p in known]

    def scale(canvas: Canvas, axes: "Axes", ys: list[float]) -> None:
        from matplotlib.ticker import MaxNLocator

        low, high = math.log10(min(ys)), math.log10(max(ys))
        room = max(high - low, 0.1) * 0.18
        axes.set_yscale("log")
        axes.set_ylim(10 ** (low - room), 10 ** (high + room))
        log_ticks(axes.yaxis, 10 ** (low - room), 10 ** (high + room), 6)
        axes.xaxis.set_major_locator(MaxNLocator(4 if canvas.narrow else 8))
        axes.xaxis.set_major_formatter(lambda value, _: q.percent_tick(value))

    title = "Perplexity against the fraction of weights kept"
    above = "perplexity, geometric mean (log scale)"
    return draw_front("fig-front", title, description, known, best, "weights kept", above, scale)


def kept_share(run: Run) -> float | None:
    """Return the fraction of the weights that a run kept: the measured one, or else the requested one.

    Args:
        run: A run of the summary.
    """
    before, after = run["size"]["before"] or {}, run["size"]["after"] or {}
    if before.get("params_counted") and after.get("params_counted"):
        return float(after["params_counted"] / before["params_counted"])
    return run["keep"] if run["measure"] in ("", "weights") else None


def leaders(runs: list[Run], values: Sequence[float | None]) -> list[bool]:
    """Return which runs have the lowest perplexity among all that keep as little or less (within half a per cent).

    Args:
        runs: The runs.
        values: Their perplexities.

    Returns:
        One bool per run; ``False`` where the perplexity is unknown.
    """
    shares = [kept_share(run) or 1.0 for run in runs]
    known = [(value, share) for value, share in zip(values, shares, strict=True) if value]
    return [
        value is not None and not any(v < value and s <= share + 0.005 for v, s in known)
        for value, share in zip(values, shares, strict=True)
    ]


def _value(run: Run, kind: str) -> float | None:
    return next((row["after"]["ppl"] for row in run["perplexity"] if row["source"] == kind and row["after"]), None)
