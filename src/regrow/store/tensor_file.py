"""Write safetensors files without the memory leak of ``safetensors.torch.save_file``.

``safetensors.torch.save_file`` makes two ctypes types for every size in bytes that it meets, and ctypes keeps them: a
process that saves a growing network again and again would leak 5 kB per tensor and step. ``safetensors.numpy`` has
no bfloat16, and the arguments of its ``serialize_file`` change from version to version.

A :class:`TensorWriter` writes beside the work that makes the tensors. Every byte is hashed on its way to the disk: a
file is read again only where its tensors come in another order than they have in it.
"""

import hashlib
import json
import os
import struct
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from regrow.store.shapes import File

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in the file; tensors are sorted in this order, then by name."""
FLUSHED = 2**27
"""After how many bytes the disk is waited for: what the system keeps in memory until then counts for a limit."""
_READ = 2**24


class TensorFile:
    """A safetensors file that is being written, its tensors one by one in any order.

    Args:
        path: The file.
        entries: Name → dtype and shape of every tensor that it will hold.
        metadata: Text entries of the file's metadata; sorted in the file.

    Raises:
        OSError: If the disk is full or write permission is missing.
        ValueError: If the format has no name for a dtype.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        if unknown := [name for name, (dtype, _) in entries.items() if dtype not in DTYPE_NAMES]:
            kind = str(entries[unknown[0]][0]).removeprefix("torch.")
            raise ValueError(f"safetensors files do not hold {kind}, the dtype of {unknown[0]}; convert it first")
        order = {dtype: i for i, dtype in enumerate(DTYPE_NAMES)}
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        self.places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(entries, key=lambda name: (order[entries[name][0]], name)):
            dtype, shape = entries[name]
            begin, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self.places[name] = begin, end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.path, self.header = path, struct.pack("<Q", len(text)) + text
        self.file = path.open("wb", buffering=0)
        self._write(0, memoryview(self.header))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor in its place."""
        begin, end = self.places[name]
        if tensor.nbytes != end - begin:
            raise ValueError(f"{name} has {tensor.nbytes} bytes, not the {end - begin} in the header")
        if end > begin:
            self._write(len(self.header) + begin, memoryview(as_bytes(tensor).numpy().data))

    def _write(self, start: int, view: memoryview) -> None:
        self.file.seek(start)
        while view:
            view = view[self.file.write(view) :]

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's entries in row-major order, as a one-dimensional CPU tensor.

    >>> as_bytes(torch.ones(1, 2)[:, 0])
    tensor([  0,   0, 128,  63], dtype=torch.uint8)
    """
    # A single entry is contiguous whatever its stride, and only a stride of 1 can be read as bytes.
    plain = tensor.detach().cpu().contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


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
        """Add a tensor that was written to the file."""
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
        """Write a tensor; it must not change any more."""
        size = tensor.nbytes if tensor.nbytes <= self.ahead else 0
        while self.waiting and size + sum(other for other, _ in self.waiting) > self.ahead:
            self._wait()
        data = as_bytes(tensor)
        work = self.pools[0].submit(self._write, name, tensor, data), self.pools[1].submit(self._digest, name, data)
        self.waiting.append((size, work))

    def finish(self) -> tuple[Mapping[str, str], Mapping[Path, File]]:
        """Wait until all is written; return the SHA-256 of each tensor, and the size and digests of each file."""
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
