"""Accuracy against size, and the Pareto front."""

from collections.abc import Sequence

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.canvas import SMALL, Canvas, Drawing, draw


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
    front = sorted((x, y) for (_, x, y), lead in zip(known, leads, strict=True) if lead)

    def paint(canvas: Canvas) -> None:
        canvas.start(340)
        axes = canvas.panel(34, 254, left=58, right=8)
        xs, ys = [x for _, x, _ in known], [y for _, _, y in known]
        spread, room = max(xs) - min(xs), max(max(ys) - min(ys), 0.02) * 0.12
        axes.set_xlim(min(xs) - 0.08 * spread, max(xs) + spread * 120 / (canvas.width - 190))
        axes.set_ylim(min(ys) - room, max(ys) + room)
        axes.locator_params(axis="x", nbins=3 if canvas.narrow else 7)
        axes.xaxis.set_major_formatter(lambda value, _: q.count(value))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}{q.SPACE}%")
        axes.grid(color=palette.LINE, linewidth=1)
        axes.set_axisbelow(True)
        axes.set_xlabel(below, color=palette.MUTED, fontsize=SMALL, labelpad=6)
        canvas.text(0, 12, above, color=palette.MUTED, fontsize=SMALL)
        axes.plot([x for x, _ in front], [y for _, y in front], color=palette.ACCENT, linewidth=1.5)
        for (label, x, y), on in zip(known, leads, strict=True):
            axes.plot(
                [x],
                [y],
                "o",
                markersize=10,
                markerfacecolor=palette.ACCENT if on else palette.FAINT,
                markeredgecolor=palette.PAPER,
            )
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
