"""Write safetensors files without the memory leak of ``safetensors.torch.save_file``.

``safetensors.torch.save_file`` makes two ctypes types for every size in bytes that it meets, and ctypes keeps them: a
process that saves a growing network again and again would leak 5 kB per tensor and step. ``safetensors.numpy`` has
no bfloat16, and the arguments of its ``serialize_file`` change from version to version.
"""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

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
        """Write a tensor in its place.

        Args:
            name: Its name.
            tensor: The tensor, of the announced dtype and shape.

        Raises:
            OSError: If the disk is full.
            ValueError: If it has another length than was announced.
        """
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

    Args:
        tensor: Any tensor.

    >>> as_bytes(torch.ones(1, 2)[:, 0])
    tensor([  0,   0, 128,  63], dtype=torch.uint8)
    """
    # A single entry is contiguous whatever its stride, and only a stride of 1 can be read as bytes.
    plain = tensor.detach().cpu().contiguous()
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)
