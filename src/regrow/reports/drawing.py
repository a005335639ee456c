"""Figures as inline SVG that follows the page's colours: matplotlib draws each for wide and for narrow screens.

Placeholder colours are replaced by CSS variables, text stays text in the page's own font, and ids start with the name
of the figure.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from regrow.reports.reading import ReportError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE, FAINT, ACCENT, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"
COOL, WARM = "#0a0b07", "#0a0b08"
_VARIABLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    FAINT: "var(--faint)",
    ACCENT: "var(--accent)",
    PAPER: "var(--paper)",
    COOL: "var(--cool)",
    WARM: "var(--warm)",
}
WIDE, NARROW = 760, 350
_PIXELS = 72
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "text.color": INK,
    "axes.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.08,
    "axes.edgecolor": LINE,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 12.5,
    "axes.labelsize": 11.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "legend.fontsize": 11.5,
    "lines.markeredgecolor": PAPER,
    "lines.markersize": 7,
}

Paint = Callable[["Figure", bool], None]
"""Draws on an empty figure, for a narrow screen or a wide one."""


@dataclass(frozen=True)
class Drawing:
    """A figure as two inline SVGs, one for wide and one for narrow screens.

    Args:
        name: Prefix of all its ids.
        wide: The drawing for 760 pixels.
        narrow: The drawing for 350 pixels.
    """

    name: str
    wide: str
    narrow: str


def draw(name: str, title: str, description: str, height: float, paint: Paint) -> Drawing:
    """Draw a figure in both widths, and return it as inline SVG."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("figures need matplotlib: pip install 'regrow[report]'") from None
    variants = {}
    for variant, width in (("wide", WIDE), ("narrow", NARROW)):
        buffer = io.StringIO()
        with mpl.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = Figure(figsize=(width / _PIXELS, height / _PIXELS), layout="constrained", facecolor="none")
            paint(figure, width < WIDE)
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        variants[variant] = _inline(buffer.getvalue(), f"{name}-{variant}", title, description)
    return Drawing(name, **variants)


def _inline(svg: str, prefix: str, title: str, description: str) -> str:
    """Return matplotlib's SVG in a form that can be embedded in a page: no metadata, fonts, or foreign ids."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {
            k.rpartition("}")[2]: _attribute(k.rpartition("}")[2], v, prefix) for k, v in node.attrib.items()
        }
        node.tail = None
        if node.tag != "text":
            node.text = None
        if node.tag in ("g", "svg"):  # matplotlib names every group; only what is referred to needs an id
            node.attrib.pop("id", None)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for index, (tag, words) in enumerate((("title", title), ("desc", description))):
        note = ElementTree.Element(tag, {"id": f"{prefix}-{tag}"})
        note.text = words
        root.insert(index, note)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title {prefix}-desc")
    return ElementTree.tostring(root, encoding="unicode")


def _attribute(name: str, value: str, prefix: str) -> str:
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
