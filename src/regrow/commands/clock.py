"""How long the stages of a run take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from regrow.commands.folder import RunFolder


@dataclass
class Clock:
    """Seconds per stage, kept in the run folder as they come."""

    folder: RunFolder | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)
        if self.folder:
            self.folder.update(seconds=self.seconds)
