"""Read single tensors of safetensors files by name and byte range, into memory of their own.

Files are read, not memory-mapped: mapped pages count as resident memory, and nothing says when they are given back.
"""

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regrow.core.errors import InputError
from regrow.core.limits import check_regular, parse_json
from regrow.nets.files import is_possible, read_shards
from regrow.nets.loaded import WeightFile
from regrow.store.errors import StoreError
from regrow.store.tensors import DTYPE_NAMES

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"  # names of weight files in a folder
_MAX_HEADER_BYTES = 10**8  # the longest header in bytes that is read, as in the format's own reader
_CACHE_LINE = 64  # the bytes of a cache line
_DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class BufferPool:
    """Memory of tensors that were garbage-collected, which the next ones are read into.

    Fresh memory costs several times what reading into it does: the system fills each of its pages with zeros first.
    Buffers in use and free ones together take no more memory than were in use at some time.
    """

    def __init__(self) -> None:
        self.free: list[np.ndarray] = []
        self.lock = Lock()

    def allocate(self, size: int) -> Tensor:
        """Return memory with any contents, ``[size]`` uint8; it becomes free once no tensor uses it any more."""
        with self.lock:  # others add to the list meanwhile, but take nothing
            fitting = [i for i, buffer in enumerate(self.free) if size <= len(buffer) <= size + size // 4]
            if fitting:
                memory = self.free.pop(min(fitting, key=lambda i: len(self.free[i])))
            else:
                missing = size
                while missing > 0 and self.free:  # the system gets back as much as it gives, the largest first
                    largest = max(range(len(self.free)), key=lambda i: len(self.free[i]))
                    missing -= len(self.free.pop(largest))
                memory = torch.empty(size, dtype=torch.uint8).numpy()  # numpy's own asks for huge pages
        buffer = memory[:size]
        # The tensor keeps this view alive: when it is collected, its memory is free again.
        weakref.finalize(buffer, self.free.append, memory).atexit = False
        return torch.from_numpy(buffer)

    def clear(self) -> None:
        """Give the free memory back to the system; memory in use still becomes free when its tensor is collected."""
        with self.lock:
            self.free.clear()


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a file, and its form."""

    file: Path
    dtype: torch.dtype  # in the file
    shape: tuple[int, ...]
    start: int  # the position in the file of its first byte
    bytes: int  # how many it takes there
    opened: WeightFile | None = None  # the file as it was when its header was read


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of safetensors files by name; those in ``aligned`` begin at a cache line in memory."""

    places: Mapping[str, TensorPlace]
    aligned: Collection[str] = frozenset()

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """The files as they were when they were opened, each once."""
        return tuple({id(place.opened): place.opened for place in self.places.values() if place.opened}.values())

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Return the checkpoint in a model folder, a file or shards with an index; StoreError if missing or damaged."""
        if (folder / INDEX).exists() and not (folder / SINGLE).is_file():
            return cls(_read_shards(folder))
        return cls(read_places(folder / SINGLE))

    def read(self, name: str, pool: BufferPool | None = None, first: int | None = None) -> Tensor:
        """Return a tensor on the CPU by its name; the rest is as in :func:`read_tensor`."""
        return read_tensor(self.places[name], first, aligned=first is None and name in self.aligned, pool=pool)


def read_tensor(
    place: TensorPlace, first: int | None = None, *, aligned: bool = False, pool: BufferPool | None = None
) -> Tensor:
    """Return a tensor read into memory of its own, or its ``first`` entries in row-major order, at most ``[first]``.

    Unless ``aligned``, it lies at the same place within a cache line as in the file, as a memory-mapped tensor does: at
    another one, kernels may sum in another order. ``pool``: gives the memory; ``None``: it is new. Raises StoreError if
    the file cannot be read, and InputError if it was changed since its header was read.
    """
    length = place.bytes if first is None else min(place.bytes, first * place.dtype.itemsize)
    size = length + _CACHE_LINE  # so that the tensor may begin anywhere in the first line
    memory = torch.empty(size, dtype=torch.uint8) if pool is None else pool.allocate(size)
    offset = ((0 if aligned else place.start) - memory.data_ptr()) % _CACHE_LINE
    offset -= offset % place.dtype.itemsize  # an unpadded header puts tensors where torch reads none
    content = memory[offset : offset + length]
    view = memoryview(content.numpy().data)
    try:
        with place.file.open("rb", buffering=0) as file:
            _read_into(view, place, file)
    except OSError as error:
        raise StoreError(f"{place.file} cannot be read ({error.strerror}); copy it again") from None
    flat = content.view(place.dtype) if length else torch.empty(0, dtype=place.dtype)
    return flat if first is not None else flat.view(place.shape)


def _read_into(view: memoryview, place: TensorPlace, file: FileIO) -> None:
    """Fill ``view`` from where a tensor lies in its open file; errors as of :func:`read_tensor`."""
    if place.opened:
        place.opened.check(file.fileno())
    done = 0
    file.seek(place.start)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise StoreError(f"{place.file} has become shorter while it was read; copy it again")
        done += count
    if place.opened:
        place.opened.check(file.fileno())


def read_places(path: Path) -> dict[str, TensorPlace]:
    """Return name → place of every tensor of a safetensors file, from its header; StoreError if it is damaged."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            opened = WeightFile(path, file.fileno())
            with safe_open(path, framework="np"):  # refuses what is no complete file of the format
                pass
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= _MAX_HEADER_BYTES:
                raise InputError(f"its header has {length} bytes")
            header = parse_json(file.read(length).decode(), "its header")
            opened.check()
        assert isinstance(header, dict)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _parse_entry(opened, name, entry, 8 + length) for name, entry in entries.items()}
    except (InputError, OSError, UnicodeDecodeError, SafetensorError) as error:
        why = " ".join(str(error).split("; ")[0].split())[:120]
        raise StoreError(f"{path} is no complete safetensors file ({why}); copy or download it again") from None


def _parse_entry(file: WeightFile, name: str, entry: Any, begin: int) -> TensorPlace:
    """Return the place of a tensor by its header entry; InputError if sizes disagree. ``begin``: behind the header."""
    dtype, shape, (start, stop) = _DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
    if dtype is None or prod(shape) * dtype.itemsize != stop - start or not is_possible(shape):
        raise InputError(f"{name!r:.60} has {stop - start} bytes, and is {entry['dtype']!s:.20} {shape!s:.60}")
    return TensorPlace(file.path, dtype, tuple(shape), begin + start, stop - start, file)


def _read_shards(folder: Path) -> dict[str, TensorPlace]:
    """Return name → place of every tensor of a sharded checkpoint; StoreError unless index and files agree."""
    path = folder / INDEX
    try:
        file_of = read_shards(path)
    except InputError as error:
        raise StoreError(str(error)) from None
    result: dict[str, TensorPlace] = {}
    for file in sorted(set(file_of.values())):
        places = read_places(folder / file)
        expected = {name for name, holder in file_of.items() if holder == file}
        if disputed := min(expected ^ places.keys(), default=None):
            raise StoreError(f"{path} and {file} disagree about the tensor {disputed!r:.60}; download both again")
        result |= places
    return result
