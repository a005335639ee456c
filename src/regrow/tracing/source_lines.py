"""Find the line of a network's own code that ran an operation, or that behaved differently at another size."""

import gc
import linecache
import os
import sys
import sysconfig
import traceback
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from regrow.core.axes import Example

Line = tuple[str, int]
"""A file name and a line number."""

LINE = "line"
"""Key in a node's metadata under which a recording notes the line that ran the operation."""


def line_here() -> Line | None:
    """Return the innermost line of a network's own code that is running now; ``None`` if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_own(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno)


def line_of(node: Node | None) -> Line | None:
    """Return the line that ran an operation, in a recording that notes lines; ``None`` if it is unknown.

    Args:
        node: The operation; ``None``: there is none.
    """
    if node is None:
        return None
    if result := node.meta.get(LINE):
        return result
    stack = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    calls = [line.split('"') for line in stack if line.startswith('File "')]
    result = [(parts[1], int(parts[2].split(",")[1].split()[1])) for parts in calls if _is_own(parts[1])]
    return result[-1] if result else None


def line_raised(error: BaseException) -> Line | None:
    """Return the innermost line of a network's own code in an error's traceback; ``None`` if there is none.

    Args:
        error: The error.
    """
    frames = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    return next((line for line in reversed(frames) if _is_own(line[0])), None)


def parting_line(one: nn.Module, other: nn.Module, given: tuple[Example, Example]) -> Line | None:
    """Return the last common line of two runs of a network's code, behind which they differ; ``None`` if they never do.

    Args:
        one: The network.
        other: The same network with other sizes.
        given: The inputs of both.
    """
    last: Line | None = None
    for here, there in zip_longest(_lines_run(one, given[0]), _lines_run(other, given[1])):
        if here != there:
            return last
        last = here
    return None


def format_line(line: Line | None) -> str:
    """Format a line as ``net.py:12: h = h * 2``; empty for ``None``.

    Args:
        line: File name and line number.
    """
    if line is None:
        return ""
    name, number = line
    text = linecache.getline(name, number).strip()
    return f"{Path(name).name}:{number}" + (f": {text}" if text else "")


def _lines_run(model: nn.Module, example: Example) -> list[Line]:
    """Return each line of its own code that a network runs, in order, until it ends or fails."""
    lines: list[Line] = []

    def local(frame: FrameType, event: str, given: Any) -> Any:
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: FrameType, event: str, given: Any) -> Any:
        return local if _is_own(frame.f_code.co_filename) else None

    before, collecting = sys.gettrace(), gc.isenabled()
    gc.disable()  # what a collection calls runs in between, and is no line of the network
    sys.settrace(trace)
    try:
        with torch.no_grad():
            model(*example.args, **example.kwargs)
    except Exception:
        pass  # where it fails it may still have taken another path before
    finally:
        sys.settrace(before)
        if collecting:
            gc.enable()
    return lines


@lru_cache(maxsize=20_000)
def _is_own(name: str) -> bool:
    """Whether a file may hold a network's own code."""
    if name.startswith(("<", *_FOREIGN)):
        return False
    return not name.startswith(_PYTHON) or "site-packages" in name or "dist-packages" in name


_HERE = Path(__file__).parents[1]
_FOREIGN = tuple(f"{path}{os.sep}" for path in (_HERE / "tracing", _HERE / "surgery", Path(torch.__file__).parent))
"""Folders whose code is never a network's own: this package's and torch's."""

_PYTHON = tuple(path for name in ("stdlib", "platstdlib") if (path := sysconfig.get_path(name)))
"""Folders of Python's standard library, in which packages may be installed."""
