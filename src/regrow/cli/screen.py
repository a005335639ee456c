"""Terminal output: tables, progress with the time left, and errors in one line; no other module prints."""

import io
import logging
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from regrow.core.amounts import format_bytes
from regrow.core.progress import Progress

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


class _Notes(logging.Handler):
    """A handler of logging that prints the library's messages on the error stream, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one log message."""
        err.print(escape_controls(record.getMessage()), markup=False)


def set_up_terminal() -> None:
    """Print the library's log on the error stream from now on, and make streams escape what their encoding lacks."""
    logger = logging.getLogger("regrow")
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def escape_controls(text: str, keep: str = "") -> str:
    """Return a text with control, bidirectional and invisible characters escaped, except those in ``keep``.

    So the text cannot move the cursor or change the screen of a terminal.

    >>> print(escape_controls("a" + chr(27) + "[31mb" + chr(10) + "c"))
    a\\x1b[31mb\\nc
    """
    return "".join(
        char if char in keep or unicodedata.category(char) not in _STEERING else ascii(char)[1:-1] for char in text
    )


LINE_SECONDS = 10
# Characters that ordinary texts need: line ends, tabs, soft hyphens and zero-width joiners.
TEXT = "\n\t\u00ad\u200c\u200d"
_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def print_failure(text: str, code: int) -> int:
    """Print an error text, joined into one line, on the error stream; return ``code``, the exit code, as it is."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    sys.stderr.write(f"regrow: {escape_controls(line)}\n")  # an interrupted console may keep what it is given
    sys.stderr.flush()
    return code


def say(text: str, *, lines: bool = False) -> None:
    """Print a result on standard output, controls escaped; ``lines``: line ends and tabs are printed as they are."""
    out.print(escape_controls(text, keep=TEXT if lines else ""), markup=False)


def say_peak(row: Mapping[str, Any]) -> None:
    """Print the entries ``peak`` and ``predicted`` (bytes) of a memory record; nothing if ``peak`` is ``None``."""
    if row["peak"] is not None:
        say(f"memory: {format_bytes(row['peak'])} at the peak, {format_bytes(row['predicted'])} predicted")


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()
) -> None:
    """Print a table of cells as text; columns whose indices are in ``numbers`` are aligned right."""
    table = Table(title=_make_text(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(_make_text(column), justify="right" if i in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_make_text, row))
    out.print(table)


def _make_text(cell: object) -> Text:
    """Return a cell as rich text that is printed literally, whatever markup it contains; controls are escaped."""
    return Text(escape_controls(str(cell)))


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Context manager: show progress with the time left on the error stream, as a bar in a terminal, else plain lines.

    Yields a function (steps done, steps in all, what is being done). The part of the text behind its first comma is
    shown below the bar; a new part before the comma restarts the bar.
    """
    if not err.is_terminal:
        yield _plain_progress()
        return
    from regrow.jobs.progress_bar import progress_bar

    with progress_bar(err) as update:
        yield lambda done, total, what: update(done, total, escape_controls(what))


def _plain_progress() -> Progress:
    """Return a function that prints progress as lines: each new task, each tenth, and every ``LINE_SECONDS`` seconds.

    Texts with one first word and number of steps belong to one task. The time left counts the steps seen alone.
    """
    last, began, first, tenth, task = 0.0, time.monotonic(), 0, -1, ("", 0)

    def update(done: int, total: int, what: str) -> None:
        nonlocal last, began, first, tenth, task
        now = time.monotonic()
        if task != (what.split(" ")[0], total) or done < first:
            task, began, first, tenth = (what.split(" ")[0], total), now, done, -1
        if 10 * done // max(1, total) == tenth and now - last < LINE_SECONDS:
            return
        last, tenth = now, 10 * done // max(1, total)
        remaining = ""
        if first < done < total and now - began > 1:
            remaining = f", about {(now - began) / (done - first) * (total - done):.0f} s left"
        sys.stderr.write(f"{escape_controls(what)}: {done}/{total}{remaining}\n")
        sys.stderr.flush()

    return update


def say_pieces(title: str, pieces: Iterator[str]) -> str:
    """Print ``title: `` and a text as its pieces arrive, without its leading blanks; return the joined pieces."""
    out.print(f"{escape_controls(title)}: ", end="", markup=False)
    text = ""
    for piece in pieces:
        printed = escape_controls(piece, keep=TEXT)
        out.print(printed if text.strip() else printed.lstrip(), end="", markup=False)
        text += piece
    out.print()
    return text


def format_number(value: float | None, digits: int = 4) -> str:
    """Format a number: ``int`` and large ones as 1,234, others with ``digits`` significant digits, ``None`` as "–"."""
    if value is None:
        return "–"
    if isinstance(value, int) or (abs(value) >= 10**digits and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
