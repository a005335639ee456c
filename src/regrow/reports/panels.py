"""Figures of one panel per kind of axis, over depth in the network."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from regrow.reports.canvas import SMALL, Canvas, Entry, depth_axis, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def stack_panels(
    canvas: Canvas,
    kinds: Sequence[dict[str, Any]],
    height: int,
    panel: Callable[["Axes", dict[str, Any]], None],
    heading: Callable[[dict[str, Any]], str],
    entries: Sequence[Entry],
) -> None:
    """Draw one panel per kind of axis over depth, below each other, under a legend.

    Args:
        canvas: The canvas, which is started.
        kinds: The kinds, as :func:`regrow.reports.widths.group_rows` has them.
        height: The height of a panel, in pixels.
        panel: Draws a kind on matplotlib axes.
        heading: Returns what is written beside the name of a kind.
        entries: The entries of the legend.
    """
    head = 62 if canvas.narrow else 42
    step = head + height + 58
    canvas.start(28 + step * len(kinds))
    legend(canvas, 12, entries)
    for i, kind in enumerate(kinds):
        top = 28 + i * step
        canvas.text(0, top + 20, shorten(kind["kind"], 44 if canvas.narrow else 60))
        canvas.note(heading(kind), top + 40 if canvas.narrow else top + 20, SMALL)
        axes = canvas.panel(top + head, height, left=58, right=2)
        panel(axes, kind)
        depth_axis(axes, [row["depth"] for row in kind["rows"]], kind["numbered"], 7 if canvas.narrow else 12)


def shorten(words: str, most: int) -> str:
    """Return words cut to a length, with an ellipsis if they are longer.

    Args:
        words: The words.
        most: The largest number of characters.
    """
    return words if len(words) <= most else words[: most - 1] + "…"
