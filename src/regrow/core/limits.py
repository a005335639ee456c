"""Limits on untrusted input, checked before it is read: file type and size, JSON depth, decompression, memory."""

import errno
import gzip
import json
import os
import stat
import zlib
from pathlib import Path

from regrow.core.amounts import format_bytes
from regrow.core.errors import InputError, ResourceError

# The largest JSON file that is read; a ledger has its own, larger limit
MAX_JSON_BYTES = 2**28
# How deep lists and objects may be nested in JSON
MAX_JSON_DEPTH = 100
# How much of a text file or folder is read; the rest is ignored
MAX_TEXT_BYTES = 64_000_000
# Most decompressed bytes per byte of a `.gz` above a mebibyte; text has 3 to 20, a bomb about 1,000
MAX_GZIP_RATIO = 200
# Most pixels of one image, as stored and as scaled: 8,192 × 8,192
MAX_PIXELS = 2**26
# Most layers of a network that a configuration file describes
MAX_LAYERS = 1024
# The largest size in a configuration file: hidden units, vocabulary, positions
MAX_WIDTH = 2**24

_MIB = 2**20
_DENIED = PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_regular(path: Path) -> None:
    """Raise ``InputError`` unless a path is a readable regular file; opening a pipe or device may never return."""
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 (Path.stat fails alike; this takes any name)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); check the path") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is no regular file but a folder, pipe, socket or device; give a regular file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; check its permissions") from _DENIED


def read_bytes(path: Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Read a whole regular file; raise ``InputError`` if it cannot be read or is longer than ``most`` bytes."""
    check_regular(path)
    try:
        size = path.stat().st_size
        if size > most:
            raise InputError(f"{path} has {size:,} bytes, and at most {most:,} are read; give the right file")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); check its permissions") from error


def read_text(path: Path, most: int = MAX_JSON_BYTES) -> str:
    """Read a whole regular file of at most ``most`` bytes as UTF-8 text, or raise ``InputError``."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8; fetch it again, or convert it") from None


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> object:
    """Read and parse a JSON file; raise ``InputError`` if it is invalid, too long or too deeply nested."""
    return parse_json(read_text(path, most), str(path))


def parse_json(text: str | bytes, name: str = "the text") -> object:
    """Parse JSON that may be hostile; ``InputError``, which calls it ``name``, if it is invalid or deeply nested.

    >>> parse_json("[1, [2]]")
    [1, [2]]
    >>> parse_json("[" * 200 + "]" * 200)
    Traceback (most recent call last):
    regrow.core.errors.InputError: the text is JSON nested deeper than 100 levels; restore it
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(f"{name} is JSON nested deeper than {MAX_JSON_DEPTH} levels; restore it") from None
    except ValueError as error:
        raise InputError(f"{name} is not JSON ({reason(error)}); restore it or fetch it again") from None
    level, depth = [value], 0
    while level := [node for node in level if isinstance(node, dict | list)]:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise InputError(f"{name} is JSON nested deeper than {MAX_JSON_DEPTH} levels; restore it")
        level = [part for node in level for part in (node.values() if isinstance(node, dict) else node)]
    return value


def read_head(path: Path, most: int) -> bytes:
    """Return the first ``most + 1`` bytes of a regular file, decompressed if its name ends in ``.gz``.

    The byte beyond ``most`` shows that the file is longer. A damaged ``.gz`` and a decompression bomb raise InputError.
    """
    check_regular(path)
    packed_size = path.stat().st_size if path.suffix == ".gz" else 0  # 0: not packed, or nothing to decompress
    allowed = max(_MIB, MAX_GZIP_RATIO * packed_size)  # a short file of one repeated line is no bomb
    parts, total = [], 0
    try:
        with gzip.open(path) if packed_size else path.open("rb") as file:
            while total <= most and (part := file.read(min(_MIB, most + 1 - total))):
                parts.append(part)
                total += len(part)
                if packed_size and total > allowed:
                    raise InputError(
                        f"{path} unpacks to more than {MAX_GZIP_RATIO} times its size, unlike any text or image data; "
                        "unpack it yourself if you trust it"
                    )
    except (OSError, EOFError, zlib.error) as error:
        problem = "is not a whole gzip file" if packed_size else "cannot be read"
        remedy = "fetch or pack it again" if packed_size else "check its permissions"
        raise InputError(f"{path} {problem} ({reason(error)}); {remedy}") from error
    return b"".join(parts)


def expanded(path: Path) -> Path:
    """Return a path with a leading ``~`` or ``~user`` replaced by the home folder; raise ``InputError`` if none."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no such user's home folder; write the path out") from None


def available_memory() -> int | None:
    """Return the bytes of memory that this process can still allocate (system and control group); ``None``: unknown."""
    free = [1024 * value for value in _read_numbers("/proc/meminfo", "MemAvailable:")]
    for group, limit, used, cached in (  # control groups, versions 2 and 1
        ("/sys/fs/cgroup", "memory.max", "memory.current", "file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ):
        limits, taken = _read_numbers(f"{group}/{limit}"), _read_numbers(f"{group}/{used}")
        # Memory used as file cache is released when processes allocate more.
        returned = _read_numbers(f"{group}/memory.stat", cached)
        free += [max(0, most - now + sum(returned)) for most, now in zip(limits, taken, strict=False)]
    return min(free, default=None)


def _read_numbers(path: str, name: str = "") -> list[int]:
    """Return the first number of each line of a file, or that behind ``name``, the first word; empty if unreadable."""
    try:
        lines = [line.split() for line in Path(path).read_text("ascii").splitlines()]
        return [int(words[bool(name)]) for words in lines if not name or words[0] == name]
    except (OSError, ValueError, IndexError):
        return []


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raise ``ResourceError`` if fewer than ``needed`` bytes of memory are available; unknown memory is enough.

    Its message: "``what`` needs 3 GiB of memory, and 2 GiB are free; ``remedy``".
    """
    free = available_memory()
    if free is not None and needed > free:
        raise ResourceError(
            f"{what} needs {format_bytes(needed)} of memory, and {format_bytes(free)} are free; {remedy}"
        )


def reason(error: BaseException) -> str:
    """Return an exception's message, or its type if it has none, on one line of at most 100 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:100]
