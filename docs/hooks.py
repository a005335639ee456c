"""Hooks of mkdocs: files outside docs/ that pages link to are part of the site, and links are changed to match.

Links are written for the repository, where README.md lies beside docs/; in the site README.md is the first page.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# Pages of the site that lie outside docs/: path in the repository → path in the site.
PAGES = {"README.md": "index.md", "examples/README.md": "examples.md"}
PAGES |= {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "REPRODUCTIONS.md")}
LINK = re.compile(r"""(?:(?<=\]\()|(?<=\ssrc="))(?!\w+:)([^)#\s"]+)""")
FOLDER_LINK = re.compile(r"\[([^][]*)\]\(([^):]+/)\)")
DOCTEST = re.compile(r"^>>> .*\n?(?:^\S.*\n?)*", re.M)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that lie outside docs/, and every other file outside it that a page links to."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text("utf-8")))
    for page in list(files.documentation_pages()):
        for target in {locate(page.src_uri, link) for link in LINK.findall(page.content_string)}:
            outside = target not in PAGES and not target.startswith(("docs/", ".."))
            if outside and (ROOT / target).is_file() and target not in files.src_uris:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Change the links of a page, which are relative to its place in the repository, to those of the site.

    A link to a folder without README.md becomes plain text.
    """
    here = page.file.src_uri

    def change(match: re.Match[str]) -> str:
        target = locate(here, match[1])
        uri = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(uri, posixpath.dirname(here) or ".")

    def drop(match: re.Match[str]) -> str:
        return match[1] if (ROOT / locate(here, match[2])).is_dir() else match[0]

    return LINK.sub(change, FOLDER_LINK.sub(drop, markdown))


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Make empty heads of tables plain cells, and change the links of a notebook, which mkdocs leaves as they are."""
    html = re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)
    return re.sub(r'(href="[^":]*)\.md(["#])', r"\1.html\2", html) if page.file.src_uri.endswith(".py") else html


def locate(uri: str, link: str) -> str:
    """Return the path in the repository of what a link on the page ``uri`` of the site leads to."""
    place = next((source for source, page in PAGES.items() if page == uri), f"docs/{uri}")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target


class Doctests(griffe.Extension):
    """Shows the doctests of docstrings as code."""

    def on_object(self, *, obj: Any, **others: Any) -> None:
        """Fence the doctests of an object's docstring."""
        if text := obj.docstring:
            text.value = DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text.value)
