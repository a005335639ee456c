"""The report file about a bug, for the user to attach to an issue."""

import os
import platform
import re
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from regrow.cli.boundary import PACKAGE, describe

_SECRET = re.compile(r"(?i)(token|secret|passw|key|credential)[^=\s]*=?$|^(hf|sk|ghp|gho|pat)[_-]\w{8,}|://[^/\s]*@")


def write_report(error: BaseException, words: Sequence[str]) -> str:
    """Write a bug report to a file of its own, readable by its user only, and return the file's name.

    It has the traceback without the values of variables, versions, and the command line without anything that looks
    like a secret; of paths only the last part is written.

    Args:
        error: The error.
        words: The command line, without the program's name.
    """
    versions = {name: _version(name) for name in ("regrow", "torch", "transformers", "numpy", "click", "rich")}
    lines = [
        "Report of regrow; please read it before you attach it.",
        f"written   {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
        f"python    {platform.python_version()} on {platform.system()} {platform.machine()}",
        *(f"{name:9} {version}" for name, version in versions.items()),
        f"command   {' '.join(_harmless(words))}",
        "",
        *_traced(error),
    ]
    try:
        handle, name = tempfile.mkstemp(prefix="regrow-report-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as failed:
        return f"nowhere ({failed.strerror})"
    return name


def _traced(error: BaseException) -> Iterator[str]:
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    places = sorted({str(PACKAGE.parent), *sysconfig.get_paths().values()}, key=len, reverse=True)
    for one in reversed(chain):
        for frame in traceback.extract_tb(one.__traceback__):
            place = next((p for p in places if frame.filename.startswith(p)), None)
            # Of the user's own files only the name is written.
            file = frame.filename.removeprefix(place or "").lstrip("/\\") if place else Path(frame.filename).name
            yield f"  {file}:{frame.lineno} in {frame.name}" + (f"\n    {frame.line}" if place else "")
        yield describe(one)


def _harmless(words: Sequence[str]) -> Iterator[str]:
    hide = False
    for word in words:
        name, equals, value = word.partition("=")
        if hide or _SECRET.search(value or word):
            yield "***"
        elif equals:
            yield f"{name}=***" if _SECRET.search(f"{name}=") else f"{name}={Path(value).name or value}"
        else:
            yield word if word.startswith("-") else Path(word).name or word
        hide = word == "--prompt" or (word.startswith("--") and bool(_SECRET.search(word)))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
