"""Read stored weights in a thread while the network computes with others."""

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor


class ReadAhead:
    """Stored weights of which the next are read in a thread.

    Args:
        weights: The stored weights; each access reads a tensor.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.pool = ThreadPoolExecutor(1, "regrow-read")
        self.started: dict[str, Future[Tensor]] = {}

    def start(self, names: Collection[str]) -> None:
        """Start to read tensors that are taken next; forget others that were started.

        Args:
            names: Their names.
        """
        for name in [name for name in self.started if name not in names]:
            self.started.pop(name).cancel()
        for name in names:
            if name not in self.started:
                self.started[name] = self.pool.submit(self.weights.__getitem__, name)

    def take(self, name: str) -> Tensor:
        """Return a tensor: one that was started, or one that is read now.

        Args:
            name: Its name.

        Raises:
            InputError: If it holds NaN or infinity.
            StoreError: If it cannot be read.
        """
        started = self.started.pop(name, None)
        return self.weights[name] if started is None else started.result()
