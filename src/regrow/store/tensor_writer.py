"""Write tensors to safetensors files beside the work that makes them, and take the digests of tensors and files.

Every byte is hashed on its way to the disk: a file is read again only where its tensors come in another order than they
have in it.
"""

import hashlib
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from regrow.store.shapes import File
from regrow.store.tensor_file import TensorFile, as_bytes

FLUSHED = 2**27
"""After how many bytes the disk is waited for: what the system keeps in memory until then counts for a limit."""
_READ = 2**24


class FileDigest:
    """The SHA-256 of a file that is written tensor by tensor, in any order.

    Args:
        file: The file.
    """

    def __init__(self, file: TensorFile) -> None:
        self.path, self.start = file.path, len(file.header)
        self.header = hashlib.sha256(file.header).hexdigest()
        self.sha256 = hashlib.sha256(file.header)
        self.todo = deque(sorted((place, name) for name, place in file.places.items()))
        self.early: set[str] = set()

    def add(self, name: str, data: memoryview) -> None:
        """Add a tensor that was written to the file.

        Args:
            name: Its name.
            data: Its bytes.
        """
        if self.todo[0][1] != name:
            self.early.add(name)
            return
        self.todo.popleft()
        self.sha256.update(data)
        while self.todo and self.todo[0][1] in self.early:
            (begin, end), _ = self.todo.popleft()
            self._read(begin, end)

    def result(self) -> File:
        """Return the size and the digests of the file, once all tensors were added."""
        assert not self.todo
        return File(self.path.stat().st_size, self.sha256.hexdigest(), self.header)

    def _read(self, begin: int, end: int) -> None:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + begin)
            while begin < end and (part := file.read(min(_READ, end - begin))):
                self.sha256.update(part)
                begin += len(part)


class TensorWriter:
    """Writes tensors to their files in threads, and takes the digests of tensors and files.

    Args:
        files: The name of each tensor → the file to which it is written.
        ahead: The most bytes of tensors that wait to be written; a larger tensor does not count, since whoever has it
            keeps it in memory.
    """

    def __init__(self, files: Mapping[str, TensorFile], ahead: int) -> None:
        self.files, self.ahead = files, ahead
        self.digests: dict[Path, FileDigest] = {one.path: FileDigest(one) for one in files.values()}
        self.tensors: dict[str, str] = {}
        self.waiting: deque[tuple[int, tuple[Future[None], ...]]] = deque()
        self.unflushed = 0
        self.pools = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; it must not change any more.

        Args:
            name: Its name.
            tensor: The tensor, of the dtype and shape that its file announces.

        Raises:
            OSError: If an earlier tensor could not be written, as on a full disk.
        """
        size = tensor.nbytes if tensor.nbytes <= self.ahead else 0
        while self.waiting and size + sum(other for other, _ in self.waiting) > self.ahead:
            self._wait()
        data = as_bytes(tensor)
        work = self.pools[0].submit(self._write, name, tensor, data), self.pools[1].submit(self._digest, name, data)
        self.waiting.append((size, work))

    def finish(self) -> tuple[Mapping[str, str], Mapping[Path, File]]:
        """Wait until all is written; return the SHA-256 of each tensor, and the size and digests of each file.

        Raises:
            OSError: If a tensor could not be written, as on a full disk.
        """
        while self.waiting:
            self._wait()
        return self.tensors, {path: one.result() for path, one in self.digests.items()}

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self.pools:
            pool.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        for work in self.waiting.popleft()[1]:
            work.result()

    def _write(self, name: str, tensor: Tensor, data: Tensor) -> None:
        file = self.files[name]
        file.write(name, tensor)
        self.digests[file.path].add(name, memoryview(data.numpy().data))
        self.unflushed += tensor.nbytes
        if self.unflushed > FLUSHED:
            os.fsync(file.file.fileno())
            self.unflushed = 0

    def _digest(self, name: str, data: Tensor) -> None:
        self.tensors[name] = hashlib.sha256(data.numpy().data).hexdigest()
