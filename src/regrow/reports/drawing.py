"""Figures as inline SVG that follows the page's colours: matplotlib draws each for wide and for narrow screens.

Placeholder colours are replaced by CSS variables, text stays text in the page's own font, and ids start with the name
of the figure.
"""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from regrow.reports.reading import ReportError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE, FAINT, ACCENT, PAPER, COOL, WARM = (f"#0a0b{i:02}" for i in range(1, 9))
_NAMES = {MUTED: "muted", LINE: "line", FAINT: "faint", ACCENT: "accent", PAPER: "paper", COOL: "cool", WARM: "warm"}
_VARIABLES = {INK: "currentColor"} | {colour: f"var(--{name})" for colour, name in _NAMES.items()}
WIDE, NARROW = 760, 350
_PIXELS = 72
_STYLE = Path(__file__).parent / "templates" / "figures.mplstyle"

Paint = Callable[["Figure", bool], None]
"""Draws on an empty figure, for a narrow screen or a wide one."""


@dataclass(frozen=True)
class Drawing:
    """A figure as two inline SVGs, one for wide and one for narrow screens."""

    name: str  # prefix of all its ids
    wide: str
    narrow: str


def draw(name: str, title: str, description: str, height: float, paint: Paint) -> Drawing:
    """Draw a figure in both widths, and return it as inline SVG."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("figures need matplotlib: pip install 'regrow[report]'") from None
    style = mpl.rc_params_from_file(_STYLE, use_default_template=False)

    def draw_at(variant: str, width: int) -> str:
        buffer = io.StringIO()
        with mpl.rc_context({**style, "svg.hashsalt": name}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = Figure(figsize=(width / _PIXELS, height / _PIXELS), layout="constrained", facecolor="none")
            paint(figure, width < WIDE)
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        return _inline(buffer.getvalue(), f"{name}-{variant}", title, description)

    return Drawing(name, draw_at("wide", WIDE), draw_at("narrow", NARROW))


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
