"""Accuracy against size, and the Pareto front."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import SMALL, Canvas, Drawing, draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[str, float, float]
"""A label, a horizontal and a vertical value."""


def leaders(sizes: Sequence[float | None], values: Sequence[float | None]) -> list[bool]:
    """Return which values are not beaten by any at the same size or less (within half a per cent).

    Args:
        sizes: Parameters of each; ``None`` if unknown.
        values: Accuracy of each, or another value of which more is better; ``None`` if unknown.

    >>> leaders([100, 100, 200], [0.7, 0.6, 0.8])
    [True, False, True]
    """
    known = [(v, s) for v, s in zip(values, sizes, strict=True) if v is not None and s is not None]
    return [
        v is not None and s is not None and not any(other > v and size <= 1.005 * s for other, size in known)
        for v, s in zip(values, sizes, strict=True)
    ]


def against(
    name: str, title: str, points: Sequence[tuple[str, float | None, float | None]], below: str, above: str
) -> Drawing | None:
    """Draw accuracy against size; the points that no smaller one beats are joined.

    Args:
        name: Prefix of the drawing's ids.
        title: The title of the figure.
        points: A label, a size and an accuracy each.
        below: The label of the size axis.
        above: The label of the accuracy axis.
    """
    known = [(label, float(x), float(y)) for label, x, y in points if x and y is not None]
    if len({x for _, x, _ in known}) < 2:
        return None
    description = "; ".join(f"{label}: {q.count(x)} {below}, {q.percent(y)}" for label, x, y in known)
    leads = leaders([x for _, x, _ in known], [y for _, _, y in known])

    def scale(canvas: Canvas, axes: "Axes", ys: list[float]) -> None:
        room = max(max(ys) - min(ys), 0.02) * 0.12
        axes.set_ylim(min(ys) - room, max(ys) + room)
        axes.locator_params(axis="x", nbins=3 if canvas.narrow else 7)
        axes.xaxis.set_major_formatter(lambda value, _: q.count(value))
        axes.yaxis.set_major_formatter(lambda value, _: q.percent_tick(value))

    return draw_front(name, title, description, known, leads, below, above, scale)


def draw_front(
    name: str,
    title: str,
    description: str,
    points: Sequence[Point],
    leads: Sequence[bool],
    below: str,
    above: str,
    scale: Callable[[Canvas, "Axes", list[float]], None],
) -> Drawing:
    """Draw labelled points, and a line through those of the Pareto front.

    Args:
        name: Prefix of the drawing's ids.
        title: The title of the figure.
        description: The content in words.
        points: A label, a horizontal and a vertical value each; the horizontal ones are not all equal.
        leads: Which points are on the front.
        below: The label of the horizontal axis.
        above: The label of the vertical axis.
        scale: Sets the vertical limits and the ticks, given the vertical values.
    """
    front = sorted((x, y) for (_, x, y), lead in zip(points, leads, strict=True) if lead)

    def paint(canvas: Canvas) -> None:
        canvas.start(340)
        axes = canvas.panel(34, 254, left=58, right=8)
        xs = [x for _, x, _ in points]
        spread = max(xs) - min(xs)
        axes.set_xlim(min(xs) - 0.08 * spread, max(xs) + spread * 120 / (canvas.width - 190))
        scale(canvas, axes, [y for _, _, y in points])
        axes.grid(color=palette.LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.set_xlabel(below, color=palette.MUTED, fontsize=SMALL, labelpad=6)
        canvas.text(0, 12, above, color=palette.MUTED, fontsize=SMALL)
        axes.plot([x for x, _ in front], [y for _, y in front], color=palette.ACCENT, linewidth=1.5)
        for (label, x, y), on in zip(points, leads, strict=True):
            face = palette.ACCENT if on else palette.FAINT
            axes.plot([x], [y], "o", markersize=10, markerfacecolor=face, markeredgecolor=palette.PAPER)
            axes.annotate(
                label[:18],
                (x, y),
                xytext=(8, 3),
                textcoords="offset points",
                color=palette.INK if on else palette.MUTED,
                fontsize=SMALL,
                annotation_clip=False,
            )

    return draw(name, title, description, paint)
