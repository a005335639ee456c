"""What is done to a file or to an option: each function damages a file in place, drawn by a generator."""

import gzip
import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrow.store.shapes import content_digest

VALUES = (
    "", " ", "-1", "0", "1.5", "nan", "inf", "-inf", "1e999", "1e-400", "9" * 30, "9" * 5000, "0x10", "1_000", "½",
    "٣", "abc", "true", "null", "{}", "[]", "[" * 2000, "[/x]", "[red]x[/red]", "\x1b[31mred", "a\u202eb", "a\nb",
    "x" * 5000, "=", "a=b", "a=", "=b", "a==b", "../..", "/", ".", "~nobody-of-this-name", "/dev/null", "%s%n",
    "/proc/self/mem", "cuda", "cuda:99", "cpu:5", "meta", "int3", "bfloat16", "-", "--", "params=1e99", "macs=-1M",
    "bytes=", "ms=0", "kv_cache=1M@0", "kv_cache=1M@99999999999999999999", "params=NaN", "params=1Ki", "0.0000001",
    "0.999999999999", "mlp:0", "mlp:99999-99999-99999", "resnet:99999-9", "resnet:16-0", "cells:999-99-99",
    "mobile:999-99", "bench201:0-0", "permuted:digits:0", "permuted:digits:999", "split:digits:3", "rotated::2",
    "os:abort", "os:getcwd", "no.module:f", "a.b:c:d", "toys:nothing", "a/b", "a/b/c", "surrogate\udcff",
    "name\x07bell", "ﬁle", "\u2028",
)  # fmt: skip
"""What options are given."""

JSON_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**40, 1e308, float("nan"), float("inf"), "", "text", "\x1b[31m", "[/x]",
    [], {}, [[]], [None], {"a": 1}, ["a", 1], "9" * 5000, -0.0,
)  # fmt: skip

Mutation = Callable[[Path, random.Random], None]


def bit_flips(path: Path, draw: random.Random) -> None:
    """One to eight bits are turned over, most of them near the beginning."""
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 2, 8))):
        if data:
            data[draw.randrange(draw.choice((16, 256, len(data)))) % len(data)] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data))


def truncation(path: Path, draw: random.Random) -> None:
    """The file ends early."""
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data)) if data else 0])


def empty(path: Path, draw: random.Random) -> None:
    """Nothing is left."""
    path.write_bytes(b"")


def noise(path: Path, draw: random.Random) -> None:
    """Random bytes."""
    path.write_bytes(draw.randbytes(draw.choice((1, 100, 10_000))))


def doubled(path: Path, draw: random.Random) -> None:
    """The content twice."""
    path.write_bytes(path.read_bytes() * 2)


def encoded(path: Path, draw: random.Random) -> None:
    """Another encoding than UTF-8."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    path.write_bytes(text.encode(draw.choice(("utf-16", "utf-32-le", "utf-8-sig"))) + b"\xff\xfe")


def deep(path: Path, draw: random.Random) -> None:
    """JSON nested beyond reason."""
    n = draw.choice((150, 5000, 200_000))
    path.write_text(draw.choice(("[" * n + "]" * n, '{"a":' * n + "1" + "}" * n, "[" * n)))


def json_value(path: Path, draw: random.Random) -> None:
    """One value of a JSON file becomes another; in a file of lines, of one of them."""
    text = path.read_text("utf-8", errors="replace")
    lines = path.suffix == ".jsonl"
    parts = text.splitlines() if lines else [text]
    at = draw.randrange(len(parts)) if parts else 0
    try:
        data = json.loads(parts[at])
    except (ValueError, IndexError):
        path.write_text("{}")
        return
    places: list[tuple[Any, Any]] = []
    level = [data]
    while level:
        one = level.pop()
        items = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, value in items:
            places.append((one, key))
            level.append(value)
    if places and draw.random() < 0.9:
        # Few entries of long lists, which are all of one kind.
        holder, key = draw.choice([(h, k) for h, k in places if not isinstance(k, int) or k < 3])
        if draw.random() < 0.2:
            del holder[key]
        else:
            holder[key] = draw.choice(JSON_VALUES)
    else:
        data = draw.choice(JSON_VALUES)
    if isinstance(data, dict) and "sha256" in data and draw.random() < 0.9:
        data["sha256"] = content_digest(data)  # the digest of what it was would hide everything behind it
    parts[at] = json.dumps(data)
    path.write_text("\n".join(parts) + "\n" * lines, "utf-8", errors="replace")


def packed(path: Path, draw: random.Random) -> None:
    """A gzip file that is damaged, or swells a thousandfold."""
    content = bytes(2**26) if draw.random() < 0.3 else path.read_bytes()
    data = bytearray(gzip.compress(content))
    if len(content) < 2**26:
        data[draw.randrange(2, len(data))] ^= 255
    path.write_bytes(bytes(data))


def header(path: Path, draw: random.Random) -> None:
    """A count near the beginning becomes huge."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(4, min(64, max(5, len(data))))
    huge = draw.choice((b"\xff" * 8, (2**40).to_bytes(8, "little"), b"\x7f\xff\xff\xff", bytes(8)))
    path.write_bytes(bytes(data[:at] + huge + data[at + len(huge) :]))


def fifo(path: Path, draw: random.Random) -> None:
    """A named pipe that nobody writes to."""
    _gone(path)
    os.mkfifo(path)


def listening(path: Path, draw: random.Random) -> None:
    """A socket."""
    _gone(path)
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def device(path: Path, draw: random.Random) -> None:
    """A device that never ends, or is empty."""
    _gone(path)
    path.symlink_to(draw.choice(("/dev/zero", "/dev/null")))


def folder(path: Path, draw: random.Random) -> None:
    """A folder of that name."""
    _gone(path)
    path.mkdir()


def loop(path: Path, draw: random.Random) -> None:
    """A link to itself."""
    _gone(path)
    path.symlink_to(path.name)


def dangling(path: Path, draw: random.Random) -> None:
    """A link to nothing."""
    _gone(path)
    path.symlink_to("nowhere")


def missing(path: Path, draw: random.Random) -> None:
    """It is not there."""
    _gone(path)


def unreadable(path: Path, draw: random.Random) -> None:
    """A file, or a folder with all that is in it, that the user may not read."""
    path.chmod(0)


def unwritable(path: Path, draw: random.Random) -> None:
    """A folder that the user may read, and not write."""
    path.chmod(0o555)


def large_image(path: Path, draw: random.Random) -> None:
    """A PNG whose header tells of any size, or that is very small or thin."""
    import zlib

    from PIL import Image

    width, height = draw.choice(((60_000, 60_000), (9_000, 9_000), (1, 1), (1, 50_000), (2**31 - 1, 1), (0, 5)))
    Image.new("L", (max(1, min(width, 50_000)), 1 if width > 1 else max(1, min(height, 50_000)))).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(bytes(data))


def _gone(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


KINDS: tuple[Mutation, ...] = (fifo, listening, device, folder, loop, dangling, missing)
"""What a file may be instead of a file."""
DENIED: tuple[Mutation, ...] = (unreadable, unwritable)
"""What makes sense to a user without privileges alone."""
BYTES: tuple[Mutation, ...] = (bit_flips, truncation, empty, noise, doubled)
TEXTS: tuple[Mutation, ...] = (json_value, json_value, json_value, json_value, deep, encoded)
