"""What people see in the terminal: tables, progress with the time left, errors in one line. Only this file prints."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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


class _Line(Progress):
    """A bar behind what is being done, and below it how it goes, in as many lines as the terminal needs for it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if how := task.fields.get("how"):
                yield Text(how, no_wrap=False, overflow="fold")


@contextmanager
def working() -> Iterator[Told]:
    """A progress line with the time left, on the error stream; plain lines where that is not a terminal.

    What stands behind the first comma of what is being done is how it goes; a bar begins anew with what stands before.
    """
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
    with _Line(*columns, console=err, transient=True) as progress:
        task = progress.add_task("starting", total=1)
        shown = ""

        def tell(done: int, total: int, what: str) -> None:
            nonlocal shown
            what, _, how = what.partition(", ")
            if what != shown:
                progress.reset(task)
            shown = what
            progress.update(task, description=what, completed=done, total=max(total, 1), how=how)

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


def _printable(text: str) -> str:
    """A text without what would steer a terminal."""
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")


def beside(titles: Sequence[str], streams: Sequence[Iterator[str]]) -> list[str]:
    """Show texts as they come, in columns side by side; one after the other where this is not a terminal.

    Args:
        titles: What each is called.
        streams: Their pieces; each stream in turn gives one.

    Returns:
        The whole texts.
    """
    texts, streams = [""] * len(streams), [map(_printable, stream) for stream in streams]
    if not out.is_terminal:
        for i, (title, stream) in enumerate(zip(titles, streams, strict=True)):
            texts[i] = "".join(stream)
            say(f"{title}: {texts[i].strip()}")
        return texts
    with Live(console=out, refresh_per_second=12, vertical_overflow="visible") as live:
        going = dict(enumerate(streams))
        while going:
            for i, stream in list(going.items()):
                piece = next(stream, None)
                if piece is None:
                    del going[i]
                else:
                    texts[i] += piece
            panels = [
                Panel(Text(text.strip()), title=Text(_printable(title)))
                for title, text in zip(titles, texts, strict=True)
            ]
            shown = Table.grid(expand=True)
            for _ in panels:
                shown.add_column(ratio=1)
            shown.add_row(*panels)
            live.update(shown)
    return texts


def number(value: float | None, digits: int = 4) -> str:
    """A number for people: thousands apart, no more digits than it has."""
    if value is None:
        return "–"
    if isinstance(value, int) or (abs(value) >= 10**digits and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"
