"""Write safetensors files without the memory leak of ``safetensors.torch.save_file``.

``safetensors.torch.save_file`` makes two ctypes types for every size in bytes that it meets, and ctypes keeps them: a
process that saves a growing network again and again would leak 5 kB per tensor and step. ``safetensors.numpy`` has
no bfloat16, and the arguments of its ``serialize_file`` change from version to version.
"""

import json
import struct
from collections.abc import Mapping
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


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, byte for byte as ``safetensors.torch.save_file`` does.

    Args:
        tensors: Name → tensor on the CPU, of one of the dtypes in the format.
        path: The file.
        metadata: Text entries of the file's metadata; sorted in the file.

    Raises:
        OSError: If the disk is full or write permission is missing.
        ValueError: If the format has no name for a dtype.
    """
    if unknown := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPE_NAMES]:
        dtype = str(tensors[unknown[0]].dtype).removeprefix("torch.")
        raise ValueError(f"safetensors files do not hold {dtype}, the dtype of {unknown[0]}; convert it first")
    places = {dtype: i for i, dtype in enumerate(DTYPE_NAMES)}
    names, end = sorted(tensors, key=lambda name: (places[tensors[name].dtype], name)), 0
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            if tensors[name].numel():
                file.write(as_bytes(tensors[name]).numpy().data)


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
