"""The progress bar of a command, in a module of its own that is imported only when it is needed."""

from collections.abc import Iterator

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Bar(Progress):
    """A progress bar with the name of the present work, and below it a line or more on its state, such as the loss."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """Yield the table with the bar, and the lines below it."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if how := task.fields.get("how"):
                yield Text(how, no_wrap=False, overflow="fold")


def columns() -> tuple[ProgressColumn, ...]:
    """Return the columns of a bar: the present work, the amount done, the time so far, and the time left."""
    description = TextColumn("{task.description}", markup=False)
    return description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
