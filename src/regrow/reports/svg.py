"""Inline SVG: matplotlib's files without metadata and fonts, with the page's colours and ids of their own."""

import re
from xml.etree import ElementTree

from regrow.reports import palette


def inline_svg(svg: str, prefix: str, title: str, description: str) -> str:
    """Return matplotlib's SVG in a form that can be embedded in a page.

    Args:
        svg: The text of matplotlib's SVG file.
        prefix: Prefix of all its ids.
        title: The title of the figure.
        description: The content in words.
    """
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
        for stand_in, variable in palette.VARIABLES.items():
            value = value.replace(stand_in, variable)
    return re.sub(r"\s+", " ", value).replace("rotate(-0 ", "rotate(0 ")
