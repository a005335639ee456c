"""A drawing surface in pixels: matplotlib draws, and the result is inline SVG that follows the page's colours.

Placeholder colours are replaced by CSS variables, text stays text in the page's own font, ids start with the name of
the figure, and each figure is drawn twice: for wide and for narrow screens.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Literal

from regrow.reports import palette
from regrow.reports import quantities as q
from regrow.reports.reading import ReportError
from regrow.reports.svg import inline_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDE, NARROW = 760, 350
SMALL = 11.5
POINTS_PER_INCH = 72

Entry = tuple[str, str, str, float]
"""An entry of a legend: words, colour, marker, opacity."""


@dataclass(frozen=True)
class Drawing:
    """A figure as two inline SVGs, one for wide and one for narrow screens.

    Args:
        name: Prefix of all its ids.
        title: The title of the figure.
        description: The content in words, for readers who do not see it.
        wide: The drawing for 760 pixels.
        narrow: The drawing for 350 pixels.
    """

    name: str
    title: str
    description: str
    wide: str
    narrow: str

    def file(self, margin: int = 16) -> str:
        """Return the wide drawing as the text of an SVG file, with the page's colours for light and dark mode.

        Args:
            margin: The margin on each side, in pixels.
        """
        light, dark = _palettes()
        head, _, rest = self.wide.replace("xlink:", "").partition(">")
        width, height = (float(side) + 2 * margin for side in re.findall(r"[\d.]+", head)[2:4])
        box = f'viewBox="{-margin} {-margin} {width:g} {height:g}"'
        head = re.sub(r'viewBox="[^"]*"', f'xmlns="http://www.w3.org/2000/svg" {box}', head)
        style = f"svg{{font-family:system-ui,sans-serif;{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}"
        paper = f'<rect x="{-margin}" y="{-margin}" width="{width:g}" height="{height:g}" style="fill:var(--paper)"/>'
        return f"{head}><style>{style}</style>{paper}{rest}\n"


class Canvas:
    """A drawing in progress; positions are pixels from the upper left corner.

    Args:
        width: The width in pixels; the height is set by :meth:`start`.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.height = 0
        self.figure: Figure

    @property
    def narrow(self) -> bool:
        """Whether this is the variant for narrow screens."""
        return self.width < WIDE

    def start(self, height: float) -> None:
        """Create the figure with its height; must be called before anything is drawn.

        Args:
            height: The height in pixels.
        """
        from matplotlib.figure import Figure

        self.height = round(height)
        self.figure = Figure(figsize=(self.width / POINTS_PER_INCH, self.height / POINTS_PER_INCH))
        self.figure.patch.set_visible(False)

    def panel(self, top: float, height: float, left: float = 0, right: float = 0, width: float | None = None) -> "Axes":
        """Add matplotlib axes with only a base line, between margins, or from ``left`` on with a given ``width``.

        Args:
            top: The upper edge, in pixels.
            height: The height, in pixels.
            left: The left margin, in pixels.
            right: The right margin, in pixels.
            width: The width, in pixels; ``None``: up to the right margin.
        """
        width = self.width - left - right if width is None else width
        box = (
            left / self.width,
            1 - (top + height) / self.height,
            width / self.width,
            height / self.height,
        )
        axes = self.figure.add_axes(box)
        axes.patch.set_visible(False)
        for side in ("left", "right", "top"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(palette.LINE)
        axes.tick_params(length=0, pad=6, colors=palette.MUTED)
        axes.minorticks_off()
        return axes

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        color: str = palette.INK,
        fontsize: float | None = None,
        ha: Literal["left", "right", "center"] = "left",
    ) -> None:
        """Write a line of text.

        Args:
            x: The position of the text's left end, or as ``ha`` says, in pixels.
            y: The vertical middle of the text, in pixels.
            words: The text.
            color: The colour, of the palette.
            fontsize: The size of the letters; ``None``: that of the figure.
            ha: The part of the text that is at ``x``.
        """
        x, y = x / self.width, 1 - y / self.height
        self.figure.text(x, y, words, ha=ha, va="center", color=color, fontsize=fontsize)

    def note(self, words: str, y: float, fontsize: float | None = None) -> None:
        """Write muted text at the right end of a heading, or at the left end of a line of its own if it is narrow.

        Args:
            words: The text.
            y: The vertical middle of the text, in pixels.
            fontsize: The size of the letters; ``None``: that of the figure.
        """
        if self.narrow:
            self.text(0, y, words, color=palette.MUTED, fontsize=fontsize)
        else:
            self.text(self.width, y, words, color=palette.MUTED, fontsize=fontsize, ha="right")


def draw(name: str, title: str, description: str, paint: Callable[[Canvas], None]) -> Drawing:
    """Draw a figure in both widths, and return it as inline SVG.

    Args:
        name: Prefix of its ids, unique in the page.
        title: The title of the figure.
        description: The content in words, for readers who do not see it.
        paint: Draws on a canvas; it must call ``start`` first.

    Returns:
        The drawing.

    Raises:
        ReportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ReportError("figures need matplotlib: pip install 'regrow[report]'") from None

    variants = {}
    for variant, width in (("wide", WIDE), ("narrow", NARROW)):
        style = {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "font.size": 12.5,
            "font.family": "DejaVu Sans",
            "text.parse_math": False,
            "axes.unicode_minus": True,
            "path.simplify": False,
        }
        canvas = Canvas(width)
        buffer = io.StringIO()
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paint(canvas)
            canvas.figure.savefig(buffer, format="svg", metadata={"Date": None})
        variants[variant] = inline_svg(buffer.getvalue(), f"{name}-{variant}", title, description)
    return Drawing(name, title, description, **variants)


def legend(canvas: Canvas, y: float, entries: Sequence[Entry]) -> None:
    """Draw a row of markers with their meaning.

    Args:
        canvas: The canvas.
        y: The vertical position, in pixels.
        entries: The entries, from left to right.
    """
    from matplotlib.lines import Line2D

    x = 6.0
    for words, colour, marker, strength in entries:
        length, edge = (12, 2.2) if marker in "_|" else (9, 0)  # a stroke has an edge alone
        point = Line2D([x / canvas.width], [1 - y / canvas.height], linestyle="none", color=colour, alpha=strength)
        point.set(marker=marker, markersize=length, markeredgewidth=edge)
        canvas.figure.add_artist(point)
        canvas.text(x + 11, y, words, color=palette.MUTED, fontsize=SMALL)
        x += 30 + 6.9 * len(words)


def log_axis(axes: "Axes", values: Sequence[float], width: float, margin: float, label: str) -> None:
    """Make the horizontal axis of matplotlib axes logarithmic, with room for words at both ends.

    Args:
        axes: The matplotlib axes.
        values: The values that must fit.
        width: The width of the axes, in pixels.
        margin: The room at each end, in pixels.
        label: The label of the axis.
    """
    low, high = math.log10(min(values)), math.log10(max(values))
    span = max(high - low, 0.12)
    middle, reach = (low + high) / 2, span / 2 * width / max(width - 2 * margin, 1)
    axes.set_xscale("log")
    axes.set_xlim(10 ** (middle - reach), 10 ** (middle + reach))
    log_ticks(axes.xaxis, 10 ** (middle - reach), 10 ** (middle + reach), max(3, width // 95))
    axes.grid(axis="x", color=palette.LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_yticks([])
    axes.set_xlabel(label, color=palette.MUTED, fontsize=SMALL, labelpad=6)


def depth_axis(axes: "Axes", depth: Sequence[int], numbered: bool, most: int) -> None:
    """Make the horizontal axis of matplotlib axes show depth in the network.

    Args:
        axes: The matplotlib axes.
        depth: The depths of the layers.
        numbered: Whether depths are layer numbers, rather than places in the network.
        most: The largest number of ticks, about.
    """
    axes.set_xlim(min(depth) - 0.6, max(*depth, min(depth) + 11) + 0.6)  # a few bars need not be broad
    axes.set_xticks(steps(min(depth), max(depth), most))
    axes.grid(axis="y", color=palette.LINE, linewidth=1)
    axes.set_axisbelow(True)
    axes.set_xlabel("layer" if numbered else "place in the network", color=palette.MUTED, fontsize=SMALL, labelpad=4)


def log_ticks(axis: "Axis", low: float, high: float, most: float) -> None:
    """Put ticks at round numbers on a logarithmic matplotlib axis.

    Args:
        axis: The matplotlib axis.
        low: The smallest value shown.
        high: The largest value shown.
        most: The largest number of ticks.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**p for p in powers for digit in digits if low <= digit * 10.0**p <= high]
        if len(ticks) <= most:
            break
    ticks = ticks[:: max(1, math.ceil(len(ticks) / most))]
    axis.set_ticks(ticks, labels=[q.tick(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def columns(
    axes: "Axes",
    at: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    *,
    color: str,
    alpha: float | None = None,
) -> None:
    """Draw vertical bars as one collection; hundreds of separate bars take seconds.

    Args:
        axes: The matplotlib axes.
        at: The horizontal position of each bar.
        low: The lower end of each bar.
        high: The upper end of each bar.
        color: The colour, of the palette.
        alpha: The opacity; ``None``: 1.
    """
    from matplotlib.collections import PolyCollection

    corners = [
        [(x - 0.37, a), (x + 0.37, a), (x + 0.37, b), (x - 0.37, b)] for x, a, b in zip(at, low, high, strict=True)
    ]
    axes.add_collection(PolyCollection(corners, linewidths=0, color=color, alpha=alpha))


def steps(first: int, last: int, most: int) -> list[int]:
    """Return about ``most`` whole numbers from ``first`` to ``last``, at round distances, for ticks.

    Args:
        first: The smallest number.
        last: The largest number.
        most: The largest number of ticks, about.
    """
    step = next(step * 10**k for k in range(10) for step in (1, 2, 5) if (last - first) / (step * 10**k) <= most)
    return list(range(-(-first // step) * step, last + 1, step))


def _palettes() -> list[str]:
    """Return the colour declarations of the page's style, for light and for dark mode."""
    css = (resources.files("regrow.reports") / "templates" / "style.css").read_text(encoding="utf-8")
    rows = re.findall(r"(--paper: [^;]*;) --ink: ([^;]*);([^}]*?)--wash", css)
    return [f"{paper}color:{ink};{' '.join(rest.split())}" for paper, ink, rest in rows[:2]]
