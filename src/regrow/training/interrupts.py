"""Deferral of Ctrl-C during changes that must not be interrupted."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class Deferral:
    """A context manager, entered any number of times, that holds back Ctrl-C inside its ``with`` blocks.

    ``KeyboardInterrupt`` is raised at the end of a block; outside of the blocks Ctrl-C acts at once.
    """

    def __init__(self) -> None:
        self.inside = self.pressed = False

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inside = False
        if self.pressed:
            self.pressed = False
            if kind is None:
                raise KeyboardInterrupt


@contextmanager
def defer_interrupts() -> Iterator[Deferral]:
    """Handle Ctrl-C for a while by the :class:`Deferral` that is returned, so that each of its blocks costs little.

    Nothing changes in threads other than the main one, and where SIGINT is ignored, as in background jobs of a shell.

    >>> with defer_interrupts() as deferral:
    ...     for step in range(3):
    ...         with deferral:
    ...             pass  # Ctrl-C waits for the end of this block
    """
    deferral = Deferral()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield deferral
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if deferral.inside:
            deferral.pressed = True
        elif callable(before):
            before(number, frame)
        else:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield deferral
    finally:
        signal.signal(signal.SIGINT, before)
