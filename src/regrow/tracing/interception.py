"""Context for recording a run: which module is running, and calls that bypass torch's dispatcher."""

import gc
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

# A file name and a line number.
Line = tuple[str, int]

# Key in a node's metadata under which a recording notes the line that ran the operation.
LINE = "line"


def current_line() -> Line | None:
    """Return file and number of the innermost running line of a network's own code; ``None``: there is none."""
    return _first_own_line(traceback.walk_stack(sys._getframe(1)))


def describe_line(line: Line | None) -> str:
    """Return a clause that names a line of code, and quotes it if its file can be read; empty if there is none.

    >>> describe_line(("net.py", 12))
    '; it is the code at net.py:12'
    """
    if line is None:
        return ""
    file, number = line
    text = linecache.getline(file, number).strip()
    return f"; it is the code at {Path(file).name}:{number}" + (f": {text}" if text else "")


def describe_raising(error: BaseException) -> str:
    """Return a clause that names the innermost line of a network's own code in an error's traceback; empty if none."""
    return describe_line(_first_own_line(reversed([*traceback.walk_tb(error.__traceback__)])))


def _first_own_line(frames: Iterable[tuple[FrameType, int]]) -> Line | None:
    """Return the first (frame, line number) of a network's own code as (file, number); ``None`` if there is none."""
    lines = ((frame.f_code.co_filename, number) for frame, number in frames)
    return next((line for line in lines if _is_own_code(line[0])), None)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Context manager without cyclic garbage collection, which would search all objects of torch again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@lru_cache(maxsize=20_000)
def _is_own_code(name: str) -> bool:
    """Whether file ``name`` may hold a network's own code: not generated, nor of torch, regrow's tracing or surgery."""
    return not name.startswith(("<", *_FOREIGN))


_HERE = Path(__file__).parents[1]
_FOREIGN = tuple(f"{path}{os.sep}" for path in (_HERE / "tracing", _HERE / "surgery", Path(torch.__file__).parent))


class RecordableCalls(TorchFunctionMode):
    """Torch function mode that replaces calls that bypass the dispatcher by recordable ones.

    These are ``tolist``, reading ``data``, and ``x[index] = y`` by a tensor of one dimension.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and all(isinstance(x, Tensor) for x in args):
            x, index, value = args
            if index.dim() == 1 and value.dim() <= x.dim() and value.dtype == x.dtype:
                x.index_put_((index,), value)
                return None
        if func is Tensor.tolist:
            return _to_list(args[0])
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def _to_list(x: Tensor) -> Any:
    """Return a tensor as ``tolist`` does, by operations that are recorded."""
    return x.item() if x.dim() == 0 else list(map(_to_list, x.unbind()))


@contextmanager
def follow_modules(model: nn.Module) -> Iterator[Callable[[], dict[str, tuple[str, type]]]]:
    """Context manager that yields a function returning path → (path, class) of the running modules, innermost last.

    This is the form of ``nn_module_stack`` in a node's metadata. Path ``""`` is the model itself.
    """
    paths = {module: path for path, module in model.named_modules()}
    stacks: list[dict[str, tuple[str, type]]] = [{}]

    def push(module: nn.Module, inputs: Any) -> None:
        """Add a module that begins to run; one outside the model leaves its caller's stack."""
        path = paths.get(module)
        stacks.append(stacks[-1] if path is None else {**stacks[-1], path: (path, type(module))})

    def pop(module: nn.Module, inputs: Any, result: Any) -> None:
        """Remove the module that has run last."""
        stacks.pop()

    hooks = [register_module_forward_pre_hook(push), register_module_forward_hook(pop, always_call=True)]
    try:
        yield lambda: stacks[-1]
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def as_exporting() -> Iterator[None]:
    """Context manager in which ``torch.compiler.is_compiling`` and ``is_exporting`` are true, as when exporting."""
    flags = torch.compiler
    before = flags._is_compiling_flag, flags._is_exporting_flag
    flags._is_compiling_flag = flags._is_exporting_flag = True
    try:
        yield
    finally:
        flags._is_compiling_flag, flags._is_exporting_flag = before


# The most operations that a recording may have.
most_calls: ContextVar[float] = ContextVar("most_calls", default=inf)


@contextmanager
def limit_calls(limit: int) -> Iterator[None]:
    """Context manager in which a :class:`.record.Recorder` raises RuntimeError at more than ``limit`` operations."""
    token = most_calls.set(limit)
    try:
        yield
    finally:
        most_calls.reset(token)
