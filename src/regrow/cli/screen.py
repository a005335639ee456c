"""Terminal output: tables, help, progress with the time left, and errors in one line; no other module prints."""

import io
import logging
import sys
import threading
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
from rich.cells import cell_len
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
        logger.setLevel(logging.INFO)
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


LINE_SECONDS = 1.4
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
    texts = [[_make_text(cell) for cell in cells] for cells in (columns, *rows)]
    widths = _fit_widths([*zip(*texts, strict=True)], out.width - 2 * (len(columns) - 1))
    for i, (header, width) in enumerate(zip(texts[0], widths, strict=True)):
        table.add_column(header, justify="right" if i in numbers else "left", overflow="fold", width=width)
    for row in texts[1:]:
        table.add_row(*row)
    out.print(table)


def _fit_widths(columns: Sequence[Sequence[Text]], room: int) -> list[int]:
    """Return widths of columns, which start with their headers, that sum up to ``room`` at most, if possible.

    A column shrinks down to its longest word, then to that of its header, then further; the widest shrinks first.
    """
    words = [[max(map(cell_len, cell.plain.split()), default=1) for cell in column] for column in columns]
    widths = [max(cell.cell_len for cell in column) for column in columns]
    while sum(widths) > room and max(widths) > 1:
        order = [(width > max(of), width > of[0], width) for width, of in zip(widths, words, strict=True)]
        widths[order.index(max(order))] -= 1
    return widths


def _make_text(cell: object) -> Text:
    """Return a cell as rich text that is printed literally, whatever markup it contains; controls are escaped."""
    return Text(escape_controls(str(cell)))


class _HelpFormatter(click.HelpFormatter):
    """Writes help, with headings and first columns in colour where a terminal shows colours."""

    def write_heading(self, heading: str) -> None:
        """Write the heading of a section."""
        super().write_heading(_colour(heading, "yellow"))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write rows of an option or a command, and its help."""
        super().write_dl([(_colour(first, "cyan"), text) for first, text in rows], col_max, col_spacing)


def _colour(text: str, colour: str) -> str:
    """Return a text with the escape sequences of a colour, unless output is no terminal or ``NO_COLOR`` is set."""
    return text if out.color_system is None or out.no_color else click.style(text, fg=colour, bold=True)


class HelpContext(click.Context):
    """The context of a command whose help is in colour."""

    formatter_class = _HelpFormatter


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Context manager: show progress with the time left on the error stream, as a bar in a terminal, else plain lines.

    Yields a function (steps done, steps in all, what is being done). The part of the text behind its first comma is
    shown below the bar; a new part before the comma restarts the bar.
    """
    if not err.is_terminal:
        with show_lines() as update:
            yield update
        return
    from regrow.jobs.progress_bar import progress_bar

    with progress_bar(err) as update:
        yield lambda done, total, what: update(done, total, escape_controls(what))


@contextmanager
def show_lines(what: str = "starting") -> Iterator[Progress]:
    """Context manager: print progress on the error stream, after two times ``LINE_SECONDS`` of silence at the latest.

    ``what`` is done until the first report. Texts with one first word and number of steps belong to one task, which
    has a line once it is seen; short tasks have none. Later, a line follows a sixtieth of the time so far, so a long
    run has a short log. The time left counts the steps seen alone.
    """
    tasks: dict[tuple[str, int], _Task] = {}
    latest = (_Task(), 0, 1, what)
    stream, is_over = sys.stderr, threading.Event()  # loading and tracing redirect `sys.stderr`

    def update(done: int, total: int, what: str) -> None:
        nonlocal latest
        key = (what.split(" ")[0] if total > 1 else what, total)
        task = tasks.get(key)
        if task is None or done < task.done:
            task = tasks[key] = _Task(done)
        elif total <= 1 and task is not latest[0]:  # the same step again, later
            task.began = time.monotonic()
        if done != task.done:
            task.done, task.moved = done, time.monotonic()
        latest = (task, done, total, what)

    def print_lines() -> None:
        turn = printed = 0
        while not is_over.wait(LINE_SECONDS):
            turn += 1
            task, done, total, text = latest
            if task.is_new or turn - printed >= max(2, turn / 60):
                steps = f": {done}/{total}" if total > 1 else " …"
                stream.write(f"{escape_controls(text)}{steps}{task.describe_time(done, total)}\n")
                stream.flush()
                task.is_new, printed = False, turn

    thread = threading.Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield update
    finally:
        is_over.set()
        thread.join()


@dataclass
class _Task:
    """A task of which progress lines are printed."""

    first: int = 0  # the steps done when it was first reported, which tell no speed
    done: int = 0
    is_new: bool = True  # whether it has had no line
    began: float = field(default_factory=time.monotonic)
    moved: float = 0.0  # when the last step was done

    def describe_time(self, done: int, total: int) -> str:
        """Return the time left as text, or where it is not known the time so far; the first line leaves that out."""
        seconds = time.monotonic() - self.began
        if self.first < done < total:
            idle = time.monotonic() - self.moved
            left = (seconds - idle) / (done - self.first) * (total - done) - idle
            return f", about {left:.0f} s left" if left >= 0 else f", {idle:.0f} s since the last step"
        return "" if self.is_new else f", {seconds:.0f} s so far"


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
