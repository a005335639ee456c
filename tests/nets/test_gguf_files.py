"""Damaged GGUF files are refused before transformers reads them, and quickly whatever sizes they state."""

import struct
from pathlib import Path

import pytest

from regrow.nets.files import parsed_gguf
from regrow.nets.loaded import ModelError

gguf = pytest.importorskip("gguf", reason="needs regrow[llm]")

HUGE = 2**60
NAME = struct.pack("<Q", 1) + b"a"
ARRAY, STRING, BYTE = 9, 8, 0


def header(tensors: int, entries: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


DAMAGED = {
    "empty": b"",
    "other": b"{}",
    "version": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "many tensors": header(HUGE, 0, NAME),
    "many entries": header(0, HUGE, b""),
    "long text": header(0, 1, NAME + struct.pack("<IQ", STRING, HUGE)),
    "long array": header(0, 1, NAME + struct.pack("<IIQ", ARRAY, BYTE, HUGE)),
    "arrays of arrays": header(0, 1, NAME + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000),
    "unknown kind": header(0, 1, NAME + struct.pack("<I", 77)),
    "large tensor": header(1, 0, NAME + struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0)),
    "large and empty": header(1, 0, NAME + struct.pack("<IQQIQ", 2, 0, 2**59, 0, 0) + bytes(64)),
    "behind the end": header(1, 0, NAME + struct.pack("<IQIQ", 1, 4, 0, 2**40)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_in_a_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="m: no whole GGUF file") as caught, parsed_gguf(path, "m"):
        pass
    assert "\n" not in str(caught.value)
