"""Read stored weights in a thread while the network computes with others."""

from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from regrow.streaming.buffer_pool import BufferPool
from regrow.streaming.weights import StoredWeights


class ReadAhead:
    """Stored weights of which the next are read in a thread, into the memory of those that were released.

    Args:
        weights: The stored weights.
    """

    def __init__(self, weights: StoredWeights) -> None:
        self.weights, self.buffers = weights, BufferPool()
        self.pool = ThreadPoolExecutor(1, "regrow-read")
        self.started: dict[str, Future[Tensor]] = {}

    def start(self, names: Collection[str]) -> None:
        """Start to read tensors that are taken next; forget others that were started."""
        for name in [name for name in self.started if name not in names]:
            self.started.pop(name).cancel()
        for name in names:
            if name not in self.started:
                self.started[name] = self.pool.submit(self.weights.read, name, self.buffers)

    def take(self, name: str) -> Tensor:
        """Return a tensor: one that was started, or one that is read now."""
        started = self.started.pop(name, None)
        return self.weights.read(name, self.buffers) if started is None else started.result()

    def release(self) -> None:
        """Give the memory of released tensors back to the system, unless the next ones are read into it."""
        if not self.started:
            self.buffers.clear()
