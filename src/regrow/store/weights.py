"""A network's weights in safetensors files: written in shards, validated against the record when read."""

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
from regrow.store.shapes import DTYPES, FileRecord, Shapes, StoredTensor, TensorKind
from regrow.store.tensors import TensorFile, as_bytes, dtype_name

SHARD_BYTES = 5 * 10**9  # the most bytes of tensors in one file; more are split into several files
# The most bytes of tensors that wait to be written, besides one tensor that is larger than this.
AHEAD = 2**26
# After how many bytes the disk is waited for: what the system keeps in memory until then counts for a limit.
FLUSH_BYTES = 2**27
_MAX_HEADER_BYTES = 2**28


@dataclass(frozen=True)
class OutsideTensors:
    """Functions that give the tensors of a network that is larger than memory, and run it once they are written."""

    read: Callable[[Shapes], Iterable[tuple[str, Tensor]]]  # gives (name, tensor) of each recorded one, in any order
    open_written: Callable[[Path], AbstractContextManager[nn.Module]]  # gives the network of a folder, ready to run
    aligned: bool = False  # whether each would begin at a cache line if the network were in memory
    ahead: int = AHEAD  # the most bytes of tensors that wait to be written while the next ones are made


def write_weights(tensors: Iterable[tuple[str, Tensor]], shapes: Shapes, folder: Path, *, ahead: int = AHEAD) -> Shapes:
    """Write every recorded tensor to files in a folder, and return the record with digests of tensors and files.

    ``tensors``: (name, tensor) of each in ``shapes.tensors``, in any order; they are cast to the recorded dtype.
    Parameters and buffers of the state dict go to ``model.safetensors`` (or shards with an index), others to
    ``buffers.safetensors``. ``ahead``: as for :class:`TensorWriter`. Raises StoreError for parameters that would hold
    NaN or infinity.
    """
    files = _assign_files(shapes)
    open_files: dict[str, TensorFile] = {}
    with ExitStack() as stack:
        for name, part in files.items():
            entries = {key: (DTYPES[stored.dtype], stored.shape) for key, stored in part.items()}
            temporary = stack.enter_context(atomic_write(folder / name))
            file = stack.enter_context(TensorFile(temporary, entries, {"format": "pt"}))
            open_files |= dict.fromkeys(part, file)
        with TensorWriter(open_files, ahead) as writer:
            for key, tensor in tensors:
                stored = shapes.tensors[key]
                tensor = tensor.detach().to("cpu", DTYPES[stored.dtype]).contiguous()
                if stored.kind is TensorKind.PARAMETER and (bad := count_nonfinite(tensor)):
                    raise StoreError(f"{bad} entries of {key!r} are NaN or infinite; use another dtype or model")
                writer.write(key, tensor)
            digests = writer.finish()
    shards = {key: name for name, part in files.items() for key, stored in part.items() if stored.kind.carried}
    if len({*shards.values()}) > 1:
        size = sum(shapes.tensors[key].bytes for key in shards)
        index = {"metadata": {"total_size": size}, "weight_map": shards}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    records = {name: msgspec.structs.replace(stored, sha256=digests[name]) for name, stored in shapes.tensors.items()}
    return replace(shapes, tensors=records, files={name: describe_file(folder / name) for name in files})


def _assign_files(shapes: Shapes) -> dict[str, dict[str, StoredTensor]]:
    """Divide the recorded tensors among files: shards of up to ``SHARD_BYTES``, and ``buffers.safetensors``.

    Returns file name → the tensors that it holds.
    """
    parts: list[dict[str, StoredTensor]] = [{}]
    rest: dict[str, StoredTensor] = {}
    size = 0
    for name, stored in shapes.tensors.items():
        if not stored.kind.carried:
            rest[name] = stored
            continue
        if parts[-1] and size + stored.bytes > SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = stored
        size += stored.bytes
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    files = {"model.safetensors": parts[0]} if len(parts) == 1 else dict(zip(names, parts, strict=True))
    return {**files, **({"buffers.safetensors": rest} if rest else {})}


def read_weights(
    folder: Path, shapes: Shapes, *, check: bool = True, kinds: Collection[TensorKind] = tuple(TensorKind)
) -> dict[str, Tensor]:
    """Return name → tensor, of every recorded one of some kinds; raise StoreError unless all files fit the record.

    ``check``: whether digests are compared, too. Each tensor is a copy with its own storage on the CPU, in the stored
    dtype: the alignment of a memory-mapped one could change results.
    """
    result: dict[str, Tensor] = {}
    stored: set[str] = set()
    for name, expected in shapes.files.items():
        path = require_file(folder, name)
        check_file(path, expected, digests=check)
        try:
            with safe_open(path, framework="pt") as content:
                for key in content.keys():  # noqa: SIM118 (it is no dictionary)
                    if key in stored or key not in shapes.tensors:
                        raise StoreError(f"{path} holds the tensor {key!r}, which is not recorded; restore the file")
                    stored.add(key)
                    if shapes.tensors[key].kind in kinds:
                        result[key] = _copy_checked(path, key, content.get_tensor(key), shapes.tensors[key], check)
        except (SafetensorError, OSError, AttributeError, RuntimeError) as error:
            raise StoreError(f"{path} is damaged ({' '.join(str(error).split())[:120]}); copy it again") from None
    if missing := [name for name in shapes.tensors if name not in stored]:
        raise StoreError(f"{folder}: {len(missing)} tensors are missing, {missing[0]!r} first; restore its files")
    return result


def require_file(folder: Path, name: str) -> Path:
    """Return the path of a regular file in a folder; StoreError if it is missing or a link to outside the folder."""
    path = folder / name
    if not path.is_file():
        raise StoreError(f"{path} is missing; copy the folder again")
    if path.resolve().parent != folder.resolve():
        raise StoreError(f"{path} leads out of the folder; put the file itself there")
    check_readable(path)
    return path


def describe_file(path: Path) -> FileRecord:
    """Return the record of a safetensors file, its size and its header's digest; raise StoreError if unreadable."""
    with explain_os_errors(path), path.open("rb") as file:
        length = file.read(8)
        header = file.read(min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES))
        return FileRecord(path.stat().st_size, hashlib.sha256(length + header).hexdigest())


def digest_tensor(tensor: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of a tensor's bytes in row-major order.

    >>> digest_tensor(torch.zeros(2))[:8]
    'af5570f5'
    """
    return hashlib.sha256(as_bytes(tensor).numpy().data).hexdigest()


def check_file(path: Path, expected: FileRecord, *, digests: bool = True) -> None:
    """Raise StoreError unless a file has the recorded size and, with ``digests``, the recorded digest of its header."""
    length = path.stat().st_size
    if length != expected.bytes:
        what = f"{length} bytes, not the recorded {expected.bytes}: it is truncated or was changed"
        raise StoreError(f"{path} has {what}; copy it again")
    if digests and describe_file(path).header != expected.header:
        raise StoreError(f"{path} does not have the recorded SHA-256: it is damaged or was changed; copy it again")


def _copy_checked(path: Path, name: str, tensor: Tensor, stored: StoredTensor, check: bool) -> Tensor:
    """Return a copy of a tensor; StoreError unless form, finiteness and, if ``check``, digest are those recorded."""
    if tuple(tensor.shape) != stored.shape or tensor.dtype != DTYPES[stored.dtype]:
        raise StoreError(
            f"{path}: {name!r} is {dtype_name(tensor.dtype)} {tuple(tensor.shape)}, "
            f"the record says {stored.dtype} {stored.shape}; restore the file"
        )
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if stored.kind is TensorKind.PARAMETER and (bad := count_nonfinite(tensor)):
        raise StoreError(f"{path}: {bad} entries of {name!r} are NaN or infinite; use an undamaged file")
    if check and digest_tensor(tensor) != stored.sha256:
        raise StoreError(
            f"{path}: {name!r} does not have the recorded SHA-256: it is damaged or was changed; copy it again"
        )
    return tensor


class TensorWriter:
    """Writes tensors to their files in a thread, and takes their digests in another one; a ``with`` block ends both.

    ``files``: name of a tensor → its open file; ``ahead``: how many bytes of tensors may wait to be written, besides
    one tensor that is larger.
    """

    def __init__(self, files: Mapping[str, TensorFile], ahead: int) -> None:
        self.files, self.ahead = files, ahead
        self.digests: dict[str, str] = {}
        self.waiting: deque[tuple[int, tuple[Future[None], ...]]] = deque()
        self.unflushed = 0
        self.pools = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def write(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor, which must not change any more; waits for room in the queue, and raises earlier errors.

        ``tensor``: on the CPU, contiguous, in the dtype of its entry in the file.
        """
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
        """Wait until all is written, raise its errors, and return name → SHA-256 of each tensor."""
        while self.waiting:
            self._wait()
        return self.digests

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self.pools:
            pool.shutdown(cancel_futures=True)

    def _wait(self) -> None:
        """Wait until the oldest tensor is written and hashed; raise the error of either."""
        for work in self.waiting.popleft()[1]:
            work.result()

    def _write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor to its file, and wait for the disk after every ``FLUSH_BYTES``."""
        file = self.files[name]
        file.write(name, tensor)
        self.unflushed += tensor.nbytes
        if self.unflushed > FLUSH_BYTES:
            os.fsync(file.file.fileno())
            self.unflushed = 0

    def _digest(self, name: str, data: Tensor) -> None:
        """Store the SHA-256 of a tensor's bytes (:func:`as_bytes`) in ``digests``."""
        self.digests[name] = hashlib.sha256(data.numpy().data).hexdigest()
