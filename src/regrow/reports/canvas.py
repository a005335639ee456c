"""A drawing surface in pixels: matplotlib draws, and the result becomes an inline SVG that follows the page's colours.

Colours are stand-ins that are replaced by CSS variables, text stays text in the page's own font, ids carry the name of
the figure, and each figure is drawn twice: wide for a desk, narrow for a phone.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from regrow.reports.reading import ReportError

INK, MUTED, LINE, FAINT, ACCENT, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"
_VARIABLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    FAINT: "var(--faint)",
    ACCENT: "var(--accent)",
    PAPER: "var(--paper)",
}
WIDE, NARROW = 760, 350
POINTS_PER_INCH = 72


@dataclass(frozen=True)
class Drawing:
    """A figure as two inline SVGs.

    Args:
        name: Prefix of all its ids.
        title: What it shows.
        description: What one sees in it, for those who do not see it.
        wide: The drawing for 760 pixels.
        narrow: The drawing for 350 pixels.
    """

    name: str
    title: str
    description: str
    wide: str
    narrow: str


class Canvas:
    """One drawing in the making; positions are pixels from the upper left corner.

    Args:
        width: Its width; the height is set by :meth:`start`.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.height = 0
        self.figure: Any = None

    @property
    def narrow(self) -> bool:
        """Whether it is the variant for a phone."""
        return self.width < WIDE

    def start(self, height: float) -> None:
        """Set the height."""
        from matplotlib.figure import Figure

        self.height = round(height)
        self.figure = Figure(figsize=(self.width / POINTS_PER_INCH, self.height / POINTS_PER_INCH))
        self.figure.patch.set_visible(False)

    def panel(self, top: float, height: float, left: float = 0, right: float = 0, width: float | None = None) -> Any:
        """Axes with nothing but a base line, between margins, or from ``left`` on with a ``width``."""
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
        axes.spines["bottom"].set_color(LINE)
        axes.tick_params(length=0, pad=6, colors=MUTED)
        axes.minorticks_off()
        return axes

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        """Write a line of text whose middle lies at height ``y``."""
        style = {"ha": "left", "va": "center", "color": INK} | style
        self.figure.text(x / self.width, 1 - y / self.height, words, **style)

    def dot(self, x: float, y: float, **style: Any) -> None:
        """Put a marker, as in a legend."""
        from matplotlib.lines import Line2D

        line = Line2D([x / self.width], [1 - y / self.height], linestyle="none", **({"markersize": 9} | style))
        self.figure.add_artist(line)


def draw(name: str, title: str, description: str, paint: Callable[[Canvas], None]) -> Drawing:
    """Draw a figure in both widths.

    Args:
        name: Prefix of its ids, unique in the page.
        title: What it shows.
        description: What one sees in it.
        paint: Draws on a canvas; it calls ``start`` first.

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
        variants[variant] = _inline(buffer.getvalue(), f"{name}-{variant}", title, description)
    return Drawing(name, title, description, **variants)


def _inline(svg: str, prefix: str, title: str, description: str) -> str:
    """Make matplotlib's SVG one that can stand in a page."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {k.rpartition("}")[2]: _attribute(k, v, prefix) for k, v in node.attrib.items()}
        node.tail = None
        if node.tag != "text":
            node.text = None
    for group in list(root.iter()):  # matplotlib names every group; only what is referred to needs an id
        if group.tag in ("g", "svg"):
            group.attrib.pop("id", None)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    heading = ElementTree.Element("title", {"id": f"{prefix}-title"})
    heading.text = title
    story = ElementTree.Element("desc", {"id": f"{prefix}-desc"})
    story.text = description
    root.insert(0, heading)
    root.insert(1, story)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title {prefix}-desc")
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(name: str, value: str, prefix: str) -> str:
    name = name.rpartition("}")[2]
    if name == "id":
        return f"{prefix}-{value}"
    if name == "href":
        return f"#{prefix}-{value.removeprefix('#')}"
    value = re.sub(r"url\(#([^)]*)\)", rf"url(#{prefix}-\1)", value)
    if name == "style":
        value = re.sub(r"font-family:[^;]*;?\s*", "", value)
        value = re.sub(r"font: ((?:\d+ |bold )*)([\d.]+px)[^;]*", r"font-size: \2", value)
        for stand_in, variable in _VARIABLES.items():
            value = value.replace(stand_in, variable)
    return re.sub(r"\s+", " ", value).replace("rotate(-0 ", "rotate(0 ")
