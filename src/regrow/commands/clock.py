"""Timing of the stages of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from regrow.commands.recording import Record


@dataclass
class Clock:
    """Seconds spent in each stage of a run, written to the run folder after every stage.

    Args:
        folder: The run folder; ``None``: nothing is written.
        seconds: Stage → seconds so far.
    """

    folder: Record | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside the ``with`` block, and add it to the seconds of the stage.

        Args:
            name: The stage.
        """
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)
        if self.folder:
            self.folder.update(seconds=self.seconds)
