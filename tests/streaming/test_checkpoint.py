"""Tensors are read by byte range; files are not believed."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from regrow.core.errors import InputError
from regrow.nets.files import check_safetensors
from regrow.nets.loaded import ModelError
from regrow.store.errors import StoreError
from regrow.streaming.checkpoint import Checkpoint, read_places
from regrow.streaming.opening import open_network
from regrow.streaming.weights import StoredWeights


def test_tensors_of_every_dtype_and_shape_are_read(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.arange(4),
        "d": torch.tensor(True),
        "e": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.places.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read("a", first=4), tensors["a"].flatten()[:4])


def header(**entries):
    """A safetensors file of 16 bytes of data with the given entries."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


def encoded(name):
    """A safetensors file with a header in another encoding."""
    text = json.dumps({"a": ROW}).encode(name)
    return struct.pack("<Q", len(text)) + text + bytes(16)


ROW = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DAMAGED = {
    "empty": b"",
    "no header": struct.pack("<Q", 2**40),
    "not JSON": struct.pack("<Q", 2) + b"{]" + bytes(16),
    "deep": struct.pack("<Q", 400) + b"[" * 400,
    "a list": struct.pack("<Q", 2) + b"[]",
    "behind the end": header(a={**ROW, "data_offsets": [0, 4000], "shape": [1000]}),
    "negative": header(a={**ROW, "data_offsets": [-16, 0]}),
    "too short": header(a={**ROW, "shape": [5]}),
    "unknown dtype": header(a={**ROW, "dtype": "F31"}),
    "huge": header(a={**ROW, "shape": [2**62, 2**62]}),
    "overlap": header(a=ROW, b=ROW),
    "a gap": header(a={"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}),
    "a text": header(a="F32"),
    "a fraction": header(a={**ROW, "shape": [4.0]}),
    "bytes left": header(a={"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}),
    "empty and huge": header(a=ROW, b={"dtype": "F32", "shape": [2**59, 2**59, 0], "data_offsets": [16, 16]}),
    "empty, huge and possible": header(a=ROW, b={"dtype": "F32", "shape": [0, 2**59, 2**9], "data_offsets": [16, 16]}),
    "a byte order mark": encoded("utf-8-sig"),
    "UTF-16": encoded("utf-16-le"),
    "UTF-32": encoded("utf-32"),
    "metadata of numbers": header(a=ROW, __metadata__={"step": 1}),
    "metadata of objects": header(a=ROW, __metadata__={"step": {}}),
    "a list of metadata": header(a=ROW, __metadata__=["format"]),
    "a text of metadata": header(a=ROW, __metadata__="pt"),
    "no number": header(a={**ROW, "more": float("nan")}),
    "half a character": header(a=ROW, **{"\ud800": {**ROW, "shape": [0], "data_offsets": [16, 16]}}),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_refused(what, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(StoreError, match="no complete safetensors file"):
        read_places(path)
    if what not in ("a gap", "overlap"):  # which the library finds when it reads the tensors
        with pytest.raises(ModelError):
            check_safetensors(path)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {"a": "../other.safetensors"}}, {"weight_map": {"b": "one.safetensors"}}, [1]]
)
def test_an_index_that_does_not_fit_is_refused(index, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError):
        Checkpoint.open(tmp_path)


def test_a_single_file_counts_before_an_index_as_in_transformers(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), torch.zeros(2))
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), torch.ones(2))


def test_a_configuration_that_names_other_weights_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "other.safetensors"}))
    with pytest.raises(InputError, match=r"other\.safetensors.*load it in memory"):
        open_network(str(tmp_path))


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        ({"0.weight": torch.ones(2, 3)}, "lacks '0.bias'"),
        ({"0.weight": torch.ones(2, 3), "0.bias": torch.ones(2), "gamma": torch.ones(1)}, "holds 'gamma'"),
        ({"0.weight": torch.ones(3, 2), "0.bias": torch.ones(2)}, "holds '0.weight' as"),
    ],
)
def test_a_checkpoint_with_other_names_or_shapes_is_refused(stored, match, tmp_path):
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=match):
        StoredWeights(Checkpoint.open(tmp_path), torch.nn.Sequential(torch.nn.Linear(3, 2)), "net")


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    save_file({"weight": torch.full((2, 3), float("nan")), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    weights = StoredWeights(Checkpoint.open(tmp_path), torch.nn.Linear(3, 2), "net")
    with pytest.raises(InputError, match="6 entries of 'weight' are NaN"):
        weights["weight"]
