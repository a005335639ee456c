"""Safetensors files: the same bytes as the library's, and nothing that stays in memory."""

import ctypes

import pytest
import torch
from safetensors.torch import load_file, save_file

from regrow.store.shapes import DTYPES
from regrow.store.tensors import TensorFile

TENSORS = {
    **{f"{name}.weight": torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()},
    **{f"u{bits}": torch.arange(3).to(getattr(torch, f"uint{bits}")) for bits in (16, 32, 64)},
    "none": torch.empty(0, 4),
    "one": torch.tensor(3.5),
    'ü "quoted" \\ \n\u2028\x7f': torch.ones(1),
}


def save_tensors(tensors, path, metadata):
    with TensorFile(path, {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}, metadata) as file:
        for name, one in tensors.items():
            file.write(name, one)


def test_it_is_the_file_that_the_library_writes(tmp_path):
    for metadata in ({"format": "pt"}, {"regrow": '{"loss": null, "é": "\\n"}'}):
        save_tensors(TENSORS, tmp_path / "ours", metadata)
        save_file(TENSORS, tmp_path / "theirs", metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = load_file(tmp_path / "ours")
    for name, value in TENSORS.items():
        # Bytes: there is no torch.equal of some dtypes.
        both = [one.reshape(-1).view(torch.uint8).tolist() for one in (found[name], value)]
        assert found[name].shape == value.shape and both[0] == both[1]


def test_views_are_written_as_they_read(tmp_path):
    save_tensors({"a": torch.arange(6.0).view(2, 3).T}, tmp_path / "x", {})
    assert load_file(tmp_path / "x")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="do not hold complex128, the dtype of a; convert it first"):
        save_tensors({"a": torch.ones(2, dtype=torch.complex128)}, tmp_path / "x", {})


def test_no_type_stays_for_every_size_that_was_written(tmp_path):
    before = len(ctypes.Array.__subclasses__())
    for size in range(1, 100):
        save_tensors({"a": torch.ones(size)}, tmp_path / "x", {})
    assert len(ctypes.Array.__subclasses__()) == before
