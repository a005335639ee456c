"""The progress bar in a terminal or notebook, in a module of its own: the command line imports it to show one."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich import progress as rich
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from regrow.core.progress import Progress, silent


class ProgressBar(rich.Progress):
    """A progress bar with the name of the present work, and below it the text of the task's field ``state``, if any."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the table with the bar, and the lines below it."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if state := task.fields.get("state"):
                yield Text(state, no_wrap=False, overflow="fold")


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """Context manager: show a progress bar with the time left, which is gone after the block.

    Yields a function (steps done, steps in all, what is being done) that moves it. The part of the text behind its
    first comma is shown below the bar; a new part before the comma restarts the clock of the bar.
    """
    with ProgressBar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("starting", total=1)
        current = ""

        def update(done: int, total: int, what: str) -> None:
            nonlocal current
            what, _, state = what.partition(", ")
            if what != current:
                progress.reset(task, completed=done)  # those that a resumed run has done tell no speed
            current = what
            progress.update(task, description=what, completed=done, total=max(total, 1), state=state)

        yield update


@contextmanager
def ensure_progress(progress: Progress) -> Iterator[Progress]:
    """Context manager: yield ``progress``, or that of a bar on stderr if it is ``silent`` and a bar can be seen."""
    console = Console(stderr=True)
    shown = find_spec("ipywidgets") if console.is_jupyter else console.is_terminal  # without it, rich only warns
    if progress is not silent or not shown:
        yield progress
        return
    with progress_bar(console) as bar:
        yield bar
