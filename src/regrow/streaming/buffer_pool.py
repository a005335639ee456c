"""Reuse the memory of tensors that are read one after another."""

import weakref
from threading import Lock

import numpy as np
import torch
from torch import Tensor


class BufferPool:
    """Memory of released tensors, which the next ones are read into.

    Fresh memory costs several times what reading into it does: the system fills each of its pages with zeros first.
    Buffers in use and free ones together take no more memory than were in use at some time.
    """

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []
        self.lock = Lock()

    def allocate(self, size: int) -> Tensor:
        """Return memory with any contents, ``[size]`` uint8; it becomes free once no tensor uses it any more."""
        with self.lock:  # others add to the list meanwhile, but take nothing
            fitting = [i for i, one in enumerate(self.free) if size <= len(one) <= size + size // 4]
            if fitting:
                memory = self.free.pop(min(fitting, key=lambda i: len(self.free[i])))
            else:
                self._drop(size)
                memory = torch.empty(size, dtype=torch.uint8).numpy()  # numpy's own asks for huge pages
        lent = memory[:size]
        weakref.finalize(lent, self.free.append, memory).atexit = False
        return torch.from_numpy(lent)

    def clear(self) -> None:
        """Give free memory back to the system; memory in use is given back once it is released."""
        with self.lock:
            self.free.clear()

    def _drop(self, size: int) -> None:
        """Give free buffers of at least a size in all back to the system, if there are as many."""
        while size > 0 and self.free:
            size -= len(self.free.pop(max(range(len(self.free)), key=lambda i: len(self.free[i]))))
