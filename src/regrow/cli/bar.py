"""The progress bar of a command, which is imported once something takes long."""

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
    """A bar behind what is being done, and below it how it goes, in as many lines as the terminal needs for it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, and the lines below it."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if how := task.fields.get("how"):
                yield Text(how, no_wrap=False, overflow="fold")


def columns() -> tuple[ProgressColumn, ...]:
    """What a bar shows: what is being done, how much of it, the time so far and the time left."""
    description = TextColumn("{task.description}", markup=False)
    return description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
