"""Threads that run one at a time, and wait for one another at places that they agree on."""

import threading
from collections.abc import Callable

from regrow.process_memory import share_freed_memory


class StopRunError(Exception):
    """Raised to end a run early: nothing more is needed of it, or another one has failed."""


class Turns:
    """Several runs of a function, each in a thread of its own, of which one goes on at a time.

    Args:
        count: How many runs.

    >>> turns, order = Turns(2), []
    >>> def run(number):
    ...     for step in "ab":
    ...         order.append(f"{step}{number}")
    ...         turns.wait(number)
    >>> turns.run(run)
    >>> order
    ['a0', 'a1', 'b0', 'b1']
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._gates: list[threading.Semaphore] = []
        self._left: list[int] = []
        self._error: BaseException | None = None

    def wait(self, number: int) -> None:
        """Return once all other runs have waited, or ended, since this one went on.

        Args:
            number: The number of the run that waits, from 0.

        Raises:
            StopRunError: If another run has failed meanwhile.
        """
        if self.count > 1:
            self._gates[self._following(number)].release()
            self._gates[number].acquire()
            if self._error is not None:
                raise StopRunError

    def run(self, work: Callable[[int], object]) -> None:
        """Run a function to its end in every thread; a single run needs no thread.

        Args:
            work: The function, of the number of the run.

        Raises:
            Exception: The first error of a run; the others are ended.
        """
        if self.count == 1:
            work(0)
            return
        share_freed_memory()
        self._gates = [threading.Semaphore(0) for _ in range(self.count)]
        self._left, self._error = [*range(self.count)], None
        threads = [threading.Thread(target=self._run, args=(work, i), daemon=True) for i in range(self.count)]
        for thread in threads:
            thread.start()
        self._gates[0].release()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # the user's interrupt
            self._error = self._error or error
            for thread in threads:
                thread.join()
            raise
        if self._error is not None:
            raise self._error

    def _run(self, work: Callable[[int], object], number: int) -> None:
        self._gates[number].acquire()
        try:
            if self._error is None:
                work(number)
        except BaseException as error:
            self._error = self._error or error
        finally:
            following = self._following(number)
            self._left.remove(number)
            self._gates[following].release()

    def _following(self, number: int) -> int:
        return self._left[(self._left.index(number) + 1) % len(self._left)]
