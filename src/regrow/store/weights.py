"""A network's tensors in safetensors files: written in shards, validated against the record when read."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from regrow.nets.load import count_nonfinite
from regrow.store.atomic import atomic_write, write_text
from regrow.store.errors import StoreError, check_readable, explain_os_errors
from regrow.store.shapes import DTYPES, File, Kind, Shapes, Stored
from regrow.store.tensors import TensorFile, as_bytes

SHARD = 5 * 10**9
"""The most bytes of tensors in one file; more are split into several files."""
AHEAD = 2**26
"""The most bytes of tensors that wait to be written, besides one tensor that is larger than this."""
FLUSHED = 2**27
"""After how many bytes the disk is waited for: what the system keeps in memory until then counts for a limit."""
_LONGEST = 2**28


@dataclass(frozen=True)
class OutsideTensors:
    """The tensors of a network that is larger than memory: it has their shapes, but not their numbers."""

    each: Callable[[Shapes], Iterable[tuple[str, Tensor]]]
    running: Callable[[Path], AbstractContextManager[nn.Module]]
    aligned: bool = False  # whether they would all begin at a cache line if the network were in memory
    ahead: int = AHEAD  # the most bytes of tensors that wait to be written while the next ones are made


def write_weights(tensors: Iterable[tuple[str, Tensor]], shapes: Shapes, folder: Path, *, ahead: int = AHEAD) -> Shapes:
    """Write every recorded tensor, given in any order, and return the record with the digests of tensors and headers.

    A model's own go to ``model.safetensors``, others to ``buffers.safetensors``. Parameters that would hold NaN or
    infinity are refused.
    """
    files = _files(shapes)
    places: dict[str, TensorFile] = {}
    with ExitStack() as stack:
        for name, part in files.items():
            entries = {key: (DTYPES[stored.dtype], stored.shape) for key, stored in part.items()}
            temporary = stack.enter_context(atomic_write(folder / name))
            file = stack.enter_context(TensorFile(temporary, entries, {"format": "pt"}))
            places |= dict.fromkeys(part, file)
        with TensorWriter(places, ahead) as writer:
            for key, tensor in tensors:
                stored = shapes.tensors[key]
                tensor = tensor.detach().to("cpu", DTYPES[stored.dtype]).contiguous()
                if stored.kind is Kind.PARAMETER and (bad := count_nonfinite(tensor)):
                    raise StoreError(f"{bad} entries of {key!r} are NaN or infinite; use another dtype or model")
                writer.write(key, tensor)
            digests = writer.finish()
    shards = {key: name for name, part in files.items() for key, stored in part.items() if stored.kind.carried}
    if len({*shards.values()}) > 1:
        size = sum(shapes.tensors[key].bytes for key in shards)
        index = {"metadata": {"total_size": size}, "weight_map": shards}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    records = {name: msgspec.structs.replace(stored, sha256=digests[name]) for name, stored in shapes.tensors.items()}
    return replace(shapes, tensors=records, files={name: measure(folder / name) for name in files})


def _files(shapes: Shapes) -> dict[str, dict[str, Stored]]:
    """Return file name → the tensors that it holds."""
    parts: list[dict[str, Stored]] = [{}]
    rest: dict[str, Stored] = {}
    size = 0
    for name, stored in shapes.tensors.items():
        if not stored.kind.carried:
            rest[name] = stored
            continue
        if parts[-1] and size + stored.bytes > SHARD:
            parts.append({})
            size = 0
        parts[-1][name] = stored
        size += stored.bytes
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    files = {"model.safetensors": parts[0]} if len(parts) == 1 else dict(zip(names, parts, strict=True))
    return {**files, **({"buffers.safetensors": rest} if rest else {})}


def read_weights(
    folder: Path, shapes: Shapes, *, check: bool = True, kinds: Collection[Kind] = tuple(Kind)
) -> dict[str, Tensor]:
    """Read every recorded tensor and validate it against the record.

    Each tensor is copied to its own storage: the alignment of a memory-mapped one could change results.
    """
    result: dict[str, Tensor] = {}
    there: set[str] = set()
    for name, expected in shapes.files.items():
        path = inside(folder, name)
        check_file(path, expected, digests=check)
        try:
            with safe_open(path, framework="pt") as content:
                for key in content.keys():  # noqa: SIM118 (it is no dictionary)
                    if key in there or key not in shapes.tensors:
                        raise StoreError(f"{path} holds the tensor {key!r}, which is not recorded; restore the file")
                    there.add(key)
                    if shapes.tensors[key].kind in kinds:
                        result[key] = _check(path, key, content.get_tensor(key), shapes.tensors[key], check)
        except (SafetensorError, OSError, AttributeError, RuntimeError) as error:
            raise StoreError(f"{path} is damaged ({' '.join(str(error).split())[:120]}); copy it again") from None
    if missing := [name for name in shapes.tensors if name not in there]:
        raise StoreError(f"{folder}: {len(missing)} tensors are missing, {missing[0]!r} first; restore its files")
    return result


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, or raise StoreError if it is missing or leads elsewhere."""
    path = folder / name
    if not path.is_file():
        raise StoreError(f"{path} is missing; copy the folder again")
    if path.resolve().parent != folder.resolve():
        raise StoreError(f"{path} leads out of the folder; put the file itself there")
    check_readable(path)
    return path


def measure(path: Path) -> File:
    """Return the size of a safetensors file, and the SHA-256 of its header."""
    with explain_os_errors(path), path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), _LONGEST))
        return File(path.stat().st_size, hashlib.sha256(length + header).hexdigest())


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order.

    >>> digest(torch.zeros(2))[:8]
    'af5570f5'
    """
    return hashlib.sha256(as_bytes(tensor).numpy().data).hexdigest()


def check_file(path: Path, expected: File, *, digests: bool = True) -> None:
    """Raise StoreError unless a file has the recorded size and header digest."""
    length = path.stat().st_size
    if length != expected.bytes:
        what = f"{length} bytes, not the recorded {expected.bytes}: it is truncated or was changed"
        raise StoreError(f"{path} has {what}; copy it again")
    if digests and measure(path).header != expected.header:
        raise StoreError(f"{path} does not have the recorded SHA-256: it is damaged or was changed; copy it again")


def _check(path: Path, name: str, tensor: Tensor, stored: Stored, check: bool) -> Tensor:
    if tuple(tensor.shape) != stored.shape or tensor.dtype != DTYPES[stored.dtype]:
        raise StoreError(
            f"{path}: {name!r} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}, "
            f"the record says {stored.dtype} {stored.shape}; restore the file"
        )
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if stored.kind is Kind.PARAMETER and (bad := count_nonfinite(tensor)):
        raise StoreError(f"{path}: {bad} entries of {name!r} are NaN or infinite; use an undamaged file")
    if check and digest(tensor) != stored.sha256:
        raise StoreError(
            f"{path}: {name!r} does not have the recorded SHA-256: it is damaged or was changed; copy it again"
        )
    return tensor


class TensorWriter:
    """Writes tensors to their files in threads, and takes their digests."""

    def __init__(self, files: Mapping[str, TensorFile], ahead: int) -> None:
        self.files, self.ahead = files, ahead
        self.digests: dict[str, str] = {}
        self.waiting: deque[tuple[int, tuple[Future[None], ...]]] = deque()
        self.unflushed = 0
        self.pools = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def write(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor, which must not change any more; waits for room in the queue, and raises earlier errors."""
        while self.waiting:
            sizes = sorted([tensor.nbytes, *(size for size, _ in self.waiting)])
            # One tensor larger than ``ahead`` is let through: the first block is cut while the embedding is written.
            if sum(sizes[:-1] if sizes[-1] > self.ahead else sizes) <= self.ahead:
                break
            self._wait()
        data = as_bytes(tensor)
        work = self.pools[0].submit(self._write, name, tensor), self.pools[1].submit(self._digest, name, data)
        self.waiting.append((tensor.nbytes, work))

    def finish(self) -> Mapping[str, str]:
        """Wait until all is written; return the SHA-256 of each tensor."""
        while self.waiting:
            self._wait()
        return self.digests

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self.pools:
            pool.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        for work in self.waiting.popleft()[1]:
            work.result()

    def _write(self, name: str, tensor: Tensor) -> None:
        file = self.files[name]
        file.write(name, tensor)
        self.unflushed += tensor.nbytes
        if self.unflushed > FLUSHED:
            os.fsync(file.file.fileno())
            self.unflushed = 0

    def _digest(self, name: str, data: Tensor) -> None:
        self.digests[name] = hashlib.sha256(data.numpy().data).hexdigest()
