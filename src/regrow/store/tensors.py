"""Named tensors with a JSON header in one safetensors file: written atomically, checked by digest."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regrow.core.sources import to_host
from regrow.store.atomic import atomic_write
from regrow.store.convert import check_format
from regrow.store.errors import StoreError, explain_os_errors

# The names of dtypes in a safetensors file; tensors are sorted in this order, then by name, as its own writer does.
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


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in records, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


class TensorFile:
    """A safetensors file that is being written, its tensors one by one in any order; to be closed by ``with``.

    ``entries``: name → dtype and shape of every tensor; ``metadata``: the strings in its header. The constructor opens
    the file and writes the header; it raises ValueError for a dtype that the format lacks.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        if unknown := [name for name, (dtype, _) in entries.items() if dtype not in DTYPE_NAMES]:
            name = dtype_name(entries[unknown[0]][0])
            raise ValueError(f"safetensors files do not hold {name}, the dtype of {unknown[0]}; convert it first")
        order = {dtype: i for i, dtype in enumerate(DTYPE_NAMES)}
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
        self.places: dict[str, tuple[int, int]] = {}  # begin and end, behind the header
        end = 0
        for name in sorted(entries, key=lambda name: (order[entries[name][0]], name)):
            dtype, shape = entries[name]
            begin, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
            self.places[name] = begin, end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8, as the format's own writer has it
        self.path, self.header = path, struct.pack("<Q", len(text)) + text
        self.file = path.open("wb", buffering=0)
        self._write(0, memoryview(self.header))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor in its place in the file; ValueError unless it has as many bytes as its entry says."""
        begin, end = self.places[name]
        if tensor.nbytes != end - begin:
            raise ValueError(f"{name} has {tensor.nbytes} bytes, not the {end - begin} in the header")
        if end > begin:
            self._write(len(self.header) + begin, memoryview(as_bytes(tensor).numpy().data))

    def _write(self, start: int, view: memoryview) -> None:
        """Write bytes at a position in the file, in bytes from its begin."""
        self.file.seek(start)
        while view:  # an unbuffered file may write a part of them
            view = view[self.file.write(view) :]

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's entries in row-major order, as a one-dimensional uint8 tensor on the CPU.

    >>> as_bytes(torch.ones(1, 2)[:, 0])
    tensor([  0,   0, 128,  63], dtype=torch.uint8)
    """
    # A single entry is contiguous whatever its stride, and only a stride of 1 can be read as bytes.
    plain = tensor.detach().cpu().contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, object], format_name: str) -> None:
    """Write named tensors and a JSON header to one safetensors file, atomically; raises StoreError.

    The header gets the entries ``format`` (``format_name``, such as ``regrow-probe/1``), ``names`` and ``sha256``.
    """
    names = list(tensors)
    # The file format restricts names: tensors are numbered.
    numbered = {f"t{i}": tensor.detach() for i, tensor in enumerate(to_host(list(tensors.values())))}
    record = {"format": format_name, **header, "names": names, "sha256": digest_tensors(numbered)}
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in numbered.items()}
    with atomic_write(path) as temporary, TensorFile(temporary, entries, {"regrow": json.dumps(record)}) as file:
        for name, tensor in numbered.items():
            file.write(name, tensor)


def read_header(path: Path, *formats: str) -> dict[str, Any]:
    """Return the header of a file by :func:`write_tensors`; StoreError if damaged, missing or not of ``formats``."""
    with _explain_read_errors(path), safe_open(path, framework="pt") as content:
        return _parse_header(content, formats)


def open_checkpoint(path: Path, key: str, *formats: str) -> dict[str, Any]:
    """Return the header of a checkpoint by :func:`write_tensors`; ``{}`` if it was not made for ``key``: it is deleted.

    ``key``: a digest of all that the interrupted work depends on, in the header as ``key``; ``formats``: those allowed.
    The file's folder is made if it is missing.
    """
    with explain_os_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    try:
        header = read_header(path, *formats)
    except StoreError:
        header = {}
    if header.get("key") == key:
        return header
    path.unlink(missing_ok=True)
    return {}


def read_tensors(path: Path, format_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (header, name → tensor) of a file of :func:`write_tensors`; StoreError unless format and digest fit."""
    with _explain_read_errors(path):
        with safe_open(path, framework="pt") as content:
            header = _parse_header(content, (format_name,))
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
        if digest_tensors(tensors) != header["sha256"]:
            raise ValueError("its numbers do not have the recorded SHA-256")
        names = header["names"]
        if len(names) != len(tensors):
            raise ValueError(f"it names {len(names)} tensors and holds {len(tensors)}")
        return header, {name: tensors[f"t{i}"] for i, name in enumerate(names)}


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of names, dtypes, shapes and numbers of tensors, whatever their order."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        add_to_digest(hasher, (name, tensors[name]))
    return hasher.hexdigest()


def add_to_digest(hasher: Any, value: Any) -> None:
    """Feed a value into ``hasher``, an object of hashlib, unambiguously: with its type, shape or length.

    Takes tensors, strings, numbers, and mappings and iterables of these; of other objects, their ``repr``.
    """
    match value:
        case Tensor():
            hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
            hasher.update(as_bytes(value).numpy().data)
        case Mapping():
            add_to_digest(hasher, sorted(value.items()))
        case str() | bytes():
            hasher.update(repr(value).encode())
        case Iterable():
            parts = list(value)
            hasher.update(f"{len(parts)}(".encode())
            for part in parts:
                add_to_digest(hasher, part)
        case _:
            hasher.update(f"{value!r};".encode())


def _parse_header(file: Any, formats: Sequence[str]) -> dict[str, Any]:
    """Return the JSON header in an open safetensors file; ValueError if it is damaged or of none of ``formats``."""
    header = json.loads((file.metadata() or {}).get("regrow", "null"))
    if not isinstance(header, dict) or header.get("format") not in formats:
        check_format(header, formats[0], "it")
    names = header.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) != len(names):
        raise ValueError("its names of tensors are damaged")
    if not isinstance(header.get("sha256"), str):
        raise ValueError("it has no SHA-256")
    return header


@contextmanager
def _explain_read_errors(path: Path) -> Iterator[None]:
    """Context manager: turns every error of reading the file ``path`` into a StoreError of one line with a remedy."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise StoreError(f"{path} cannot be used ({' '.join(str(error).split())[:200]}); restore it") from None
