"""Context for recording a run: which module is running, and calls that bypass torch's dispatcher."""

import gc
import linecache
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import lru_cache
from itertools import zip_longest
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from regrow.core.axes import Example

Line = tuple[str, int]
"""A file name and a line number."""

LINE = "line"
"""Key in a node's metadata under which a recording notes the line that ran the operation."""


def line_here() -> Line | None:
    """Return the innermost line of a network's own code that is running now; ``None`` if there is none."""
    return _first_own(traceback.walk_stack(sys._getframe(1)))


def line_raised(error: BaseException) -> Line | None:
    """Return the innermost line of a network's own code in an error's traceback; ``None`` if there is none."""
    return _first_own(reversed([*traceback.walk_tb(error.__traceback__)]))


def _first_own(frames: Iterable[tuple[FrameType, int]]) -> Line | None:
    lines = ((frame.f_code.co_filename, number) for frame, number in frames)
    return next((line for line in lines if _is_own(line[0])), None)


def parting_line(runs: tuple[tuple[nn.Module, Example], tuple[nn.Module, Example]]) -> Line | None:
    """Return the last common line of two runs of a network's code, behind which they differ, if they do."""
    last: Line | None = None
    for line, other in zip_longest(*(_lines_run(model, example) for model, example in runs)):
        if line != other:
            return last
        last = line
    return None


def format_line(line: Line) -> str:
    """Format a line as ``net.py:12: h = h * 2``."""
    name, number = line
    text = linecache.getline(name, number).strip()
    return f"{Path(name).name}:{number}" + (f": {text}" if text else "")


def _lines_run(model: nn.Module, example: Example) -> list[Line]:
    """Return each line of its own code that a network runs, in order, until it ends or fails."""
    lines: list[Line] = []

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
        return local

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        return local if _is_own(frame.f_code.co_filename) else None

    before = sys.gettrace()
    # What a collection calls runs in between, and is no line of the network; where the network fails it may still have
    # taken another path before.
    with without_collection(), torch.no_grad(), suppress(Exception):
        sys.settrace(trace)
        try:
            model(*example.args, **example.kwargs)
        finally:
            sys.settrace(before)
    return lines


@contextmanager
def without_collection() -> Iterator[None]:
    """Context manager without cyclic garbage collection, which would search all objects of torch again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


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


class SpellOut(TorchFunctionMode):
    """Torch function mode that replaces calls that bypass the dispatcher (``tolist``, ``data``) by recordable ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and all(isinstance(x, Tensor) for x in args):
            x, index, value = args
            if index.dim() == 1 and value.dim() <= x.dim() and value.dtype == x.dtype:
                x.index_put_((index,), value)
                return None
        if func is Tensor.tolist:
            return _listed(args[0])
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def _listed(x: Tensor) -> Any:
    return x.item() if x.dim() == 0 else list(map(_listed, x.unbind()))


@contextmanager
def follow_modules(model: nn.Module) -> Iterator[Callable[[], dict[str, tuple[str, type]]]]:
    """Context manager that yields a function: path → (path, class) of the modules running now, innermost last."""
    paths = {module: path for path, module in model.named_modules()}
    stacks: list[dict[str, tuple[str, type]]] = [{}]

    def begins(module: nn.Module, inputs: Any) -> None:
        path = paths.get(module)
        stacks.append(stacks[-1] if path is None else {**stacks[-1], path: (path, type(module))})

    def ends(module: nn.Module, inputs: Any, result: Any) -> None:
        stacks.pop()

    hooks = [register_module_forward_pre_hook(begins), register_module_forward_hook(ends, always_call=True)]
    try:
        yield lambda: stacks[-1]
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def as_exporting() -> Iterator[None]:
    """Context manager in which ``torch.compiler.is_compiling`` and ``is_exporting`` return true."""
    flags = torch.compiler
    before = flags._is_compiling_flag, flags._is_exporting_flag
    flags._is_compiling_flag = flags._is_exporting_flag = True
    try:
        yield
    finally:
        flags._is_compiling_flag, flags._is_exporting_flag = before


most_calls: ContextVar[float] = ContextVar("most_calls", default=inf)
"""The most operations that a recording may have."""


@contextmanager
def limit_calls(limit: int) -> Iterator[None]:
    """Context manager in which a recording fails that has more than so many operations."""
    token = most_calls.set(limit)
    try:
        yield
    finally:
        most_calls.reset(token)
