"""What people see in the terminal: tables, progress with the time left, errors in one line. Only this file prints."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from regrow.progress import Progress as Told

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def failure(text: str, code: int) -> int:
    """Say in one line what went wrong; give back the exit code."""
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    err.print(f"regrow: {line}", markup=False)
    return code


def say(text: str) -> None:
    """A line of result."""
    out.print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> None:
    """A table; columns named in ``numbers`` are aligned right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    out.print(made)


@contextmanager
def working() -> Iterator[Told]:
    """A progress line with the time left, on the error stream; plain lines where that is not a terminal."""
    if not err.is_terminal:
        yield _plain()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("starting", total=1)
        shown = ""

        def tell(done: int, total: int, what: str) -> None:
            nonlocal shown
            if what.split(",")[0] != shown.split(",")[0]:
                progress.reset(task)
            shown = what
            progress.update(task, description=what, completed=done, total=max(total, 1))

        yield tell


def _plain() -> Told:
    last, began, shown = 0.0, time.monotonic(), ""

    def tell(done: int, total: int, what: str) -> None:
        nonlocal last, began, shown
        now = time.monotonic()
        if what.split(",")[0] != shown.split(",")[0]:
            began, shown = now, what
        elif now - last < 10 and done < total:
            return
        last = now
        left = (
            f", about {(now - began) / done * (total - done):.0f} s left"
            if 0 < done < total and now - began > 1
            else ""
        )
        sys.stderr.write(f"{what}: {done}/{total}{left}\n")
        sys.stderr.flush()

    return tell


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: thousands apart, no more digits than it has."""
    if value is None:
        return "–"
    if isinstance(value, int) or (abs(value) >= 10**digits and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
