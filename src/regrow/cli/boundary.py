"""The boundary of the command line: every failure becomes one line and an exit code."""

import contextlib
import dis
import errno
import os
import re
import signal
import sysconfig
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import click

from regrow.cli import INTERRUPTED
from regrow.core.errors import RefusedError, ResourceError, install_command

USAGE, REFUSED, ENVIRONMENT, BUG = 2, 3, 4, 70
# Exit code → its meaning.
EXIT_CODES = {
    0: "success",
    USAGE: "an option, a file or a setting cannot be used",
    REFUSED: "a check of the result failed, so it was not kept",
    ENVIRONMENT: "the machine lacks something: disk space, memory, a permission, a device, a package",
    BUG: "a bug in regrow; its traceback is printed, too",
    INTERRUPTED: "stopped by Ctrl-C",
}

# Package → the extra of regrow that installs it.
EXTRAS = {
    **dict.fromkeys(("transformers", "tokenizers", "gguf", "accelerate", "huggingface_hub"), "llm"),
    **dict.fromkeys(("torchvision", "PIL"), "vision"),
    **dict.fromkeys(("jinja2", "matplotlib", "markupsafe"), "report"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    "datasets": "data",
    "peft": "recover",
    "yaml": "text",
}

PACKAGE = Path(__file__).parents[1]
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_MACHINE = _NO_ROOM | {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.EAGAIN
}  # fmt: skip
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory|not enough memory|cannot allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """The exit code and the line to print for a failure."""

    code: int  # one of EXIT_CODES
    line: str  # the problem and the remedy, without `regrow: `
    traced: bool = False  # whether the traceback is printed, too


def classify_failure(error: BaseException) -> Failure:
    """Classify an error by who can fix it (the user, the machine, regrow), and return what is printed about it.

    Errors that regrow raises on purpose, and those of the command line, keep their own words. Lack of memory, of disk
    space or of a package is reported as such. Errors in the user's own code are reported with file and line. Everything
    else is a bug of regrow.
    """
    if isinstance(error, click.ClickException):
        return _classify_usage(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return Failure(ENVIRONMENT, "there is not enough memory for this; take a smaller model, batch or --seq-len")
    if isinstance(error, OSError):
        return _classify_os_error(error)
    package, _, _ = str(getattr(error, "name", None) or "").partition(".")
    if isinstance(error, ImportError) and package in EXTRAS:
        line = f"this needs {package}, which cannot be imported: {install_command(EXTRAS[package])}"
        return Failure(ENVIRONMENT, line)
    if isinstance(error, ValueError) and _is_raised_by_regrow(error):
        return Failure(_choose_exit_code(error), str(error))
    if where := _find_user_line(error.__traceback__):
        return Failure(
            USAGE, f"{where} failed: {describe_error(error)}; it is not part of regrow: fix it there", traced=True
        )
    return Failure(
        BUG, f"this is a bug in regrow: {describe_error(error)}; please report it with the traceback", traced=True
    )


def _classify_usage(error: click.ClickException) -> Failure:
    """Return what is printed about an error that click raised, with ``--help`` as remedy if its text names none."""
    line = error.format_message()
    if isinstance(error, click.UsageError) and error.ctx and "; " not in line:  # Click names no remedy
        hint = "an option takes one value (several seeds are several runs), " * ("unexpected extra" in line)
        line = f"{line.rstrip('.')}; {hint}see `{error.ctx.command_path} --help`"
    return Failure(INTERRUPTED if isinstance(error, Stopped) else USAGE, line)


def _choose_exit_code(error: ValueError) -> int:
    """Return the code of an error that regrow raised: REFUSED, ENVIRONMENT if the machine is the cause, else USAGE."""
    if isinstance(error, RefusedError):
        return REFUSED
    if isinstance(error, ResourceError):
        return ENVIRONMENT
    for cause in _walk_causes(error):
        if isinstance(cause, ImportError | MemoryError) or (isinstance(cause, OSError) and cause.errno in _MACHINE):
            return ENVIRONMENT
    return USAGE


@contextlib.contextmanager
def record_interrupts() -> Iterator[list[int]]:
    """Context manager: yield a list that gets the signal number at every Ctrl-C, which raises KeyboardInterrupt, too.

    Compiled code may turn that into another error, so the list tells whether there was one. If the handler of Ctrl-C
    is not Python's own, it is left in place, and the list stays empty.
    """
    signals: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield signals
        return
    signal.signal(signal.SIGINT, record)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def _walk_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then those that led to it (``__cause__``, else ``__context__``), the nearest first."""
    visited: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in visited:
        yield cause
        visited.add(id(cause))
        cause = cause.__cause__ or cause.__context__


def _classify_os_error(error: OSError) -> Failure:
    """Return what is printed about an error of the operating system: the file, the reason, and a remedy."""
    number = error.errno or 0
    name = error.filename if isinstance(error.filename, str) else os.fsdecode(error.filename or b"")
    where = f"{name}: " if name else ""
    what = (os.strerror(number) if number else describe_error(error)).rstrip(".")
    remedy = "free some space, or choose another disk" if number in _NO_ROOM else "check the path and its permissions"
    return Failure(ENVIRONMENT if number in _MACHINE else USAGE, f"{where}{what[:1].lower()}{what[1:]}; {remedy}")


def _is_raised_by_regrow(error: ValueError) -> bool:
    """Whether an error comes from a ``raise`` statement of regrow, not from within a call such as ``int("x")``."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    return Path(code.co_filename).is_relative_to(PACKAGE) and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _find_user_line(tb: TracebackType | None) -> str:
    """Return the innermost line of the user's own code in a traceback, as ``file:line in function``; empty: none.

    Code of regrow, of Python and of installed packages is not the user's.
    """
    paths = sysconfig.get_paths()
    roots = (PACKAGE, *(Path(path) for name, path in paths.items() if name not in ("scripts", "data")))
    where = ""
    for frame, line in traceback.walk_tb(tb):
        path = Path(name := frame.f_code.co_filename)
        if not name.startswith("<") and not any(path.is_relative_to(root) for root in roots):
            where = f"{path.name}:{line} in {frame.f_code.co_name}"
    return where


def describe_error(error: BaseException) -> str:
    """Return an error as ``KeyError: 'x'``, on one line, its text cut to 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")


NOTHING_YET = "stopped; nothing was written"


class Stopped(click.ClickException):
    """Raised when Ctrl-C has stopped a command; its message says what remains, and whether it can be resumed."""

    exit_code = INTERRUPTED
