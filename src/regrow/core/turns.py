"""Threads that run one at a time, and wait for one another at places that they agree on."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context

import torch

# Returns a context manager that gives a thread the state of another
State = Callable[[], AbstractContextManager[None]]


class StopRunError(BaseException):
    """Raised to end a run early; no ``except Exception`` of a network's code catches it."""


def capture_state() -> State:
    """Return a function whose context manager gives another thread this one's device, autocast and inference mode."""
    device, inference = torch.get_default_device(), torch.is_inference_mode_enabled()
    types = [device_type for device_type in ("cpu", "cuda") if torch.is_autocast_enabled(device_type)]
    casts = [(device_type, torch.get_autocast_dtype(device_type)) for device_type in types]

    @contextmanager
    def restored() -> Iterator[None]:
        with ExitStack() as stack:
            if device.type != "cpu":
                stack.enter_context(device)
            if inference:
                stack.enter_context(torch.inference_mode())
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype))
            yield

    return restored


class Turns:
    """Several runs of a function, each in a thread of its own, of which only one runs at a time.

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
        self._ended = threading.Semaphore(0)
        self._left: list[int] = []
        self._error: BaseException | None = None

    def wait(self, number: int) -> None:
        """Let the other runs go on; return once each has waited or ended. ``number``: that of the calling run.

        Raises ``StopRunError`` once another run has failed.
        """
        if self.count > 1:
            self._gates[self._following(number)].release()
            self._gates[number].acquire()
            if self._error is not None:
                raise StopRunError

    def run(self, work: Callable[[int], object]) -> None:
        """Run ``work(number)`` for numbers below ``count``, each in a thread if several; re-raise the first error."""
        if self.count == 1:
            work(0)
            return
        self._gates = [threading.Semaphore(0) for _ in range(self.count)]
        self._ended, self._left, self._error = threading.Semaphore(0), [], None
        state, begun, threads = capture_state(), False, list[threading.Thread]()
        try:
            for number in range(self.count):
                run = copy_context().run
                threads.append(threading.Thread(target=run, args=(self._run, work, number, state), daemon=True))
                threads[-1].start()
                self._left.append(number)
            begun = True
            self._gates[0].release()
            self._ended.acquire()
        except BaseException as error:  # the user's interrupt, or no thread is left
            self._error = self._error or error
            if self._left:
                if not begun:
                    self._gates[0].release()
                self._ended.acquire()
            self._error = None
            raise
        for thread in threads:
            thread.join()
        failure, self._error = self._error, None
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # its traceback holds this frame

    def _run(self, work: Callable[[int], object], number: int, state: State) -> None:
        """Do the work of one thread when its turn comes, and hand the turn on; an error stops the other runs."""
        self._gates[number].acquire()
        try:
            if self._error is None:
                with state():
                    work(number)
        except StopRunError:
            self._error = self._error or StopRunError()  # without the traceback, which holds tensors
        except BaseException as error:
            self._error = self._error or error
        finally:
            following = self._following(number)
            self._left.remove(number)
            (self._gates[following] if self._left else self._ended).release()

    def _following(self, number: int) -> int:
        """Return the number of the run whose turn follows."""
        return self._left[(self._left.index(number) + 1) % len(self._left)]
