"""Digests are those of the tensors, in whatever order they are written."""

import hashlib
from itertools import permutations

import pytest
import torch

from regrow.store.tensors import TensorFile, as_bytes
from regrow.store.weights import TensorWriter

TENSORS = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(5, dtype=torch.bfloat16), "none": torch.empty(0, 4)}


@pytest.mark.parametrize("ahead", [1, 2**20])
def test_digests_are_those_of_the_tensors(tmp_path, ahead, monkeypatch):
    monkeypatch.setattr("regrow.store.weights.FLUSH_BYTES", 20)
    for order in permutations([*TENSORS, "other"]):
        tensors = {**TENSORS, "other": torch.tensor(2)}
        places = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
        entries = {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}
        with (
            TensorFile(places[0], {name: entries[name] for name in TENSORS}, {}) as one,
            TensorFile(places[1], {"other": entries["other"]}, {}) as two,
            TensorWriter({**dict.fromkeys(TENSORS, one), "other": two}, ahead) as writer,
        ):
            for name in order:
                writer.write(name, tensors[name])
            digests = writer.finish()
        for name, tensor in tensors.items():
            assert digests[name] == hashlib.sha256(as_bytes(tensor).numpy().data).hexdigest()


def test_an_error_of_the_disk_is_raised(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    entries = {"a": (torch.float32, (4,))}
    with TensorFile(tmp_path / "x", entries, {}) as file, TensorWriter({"a": file}, 1) as writer:
        monkeypatch.setattr(TensorFile, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.write("a", torch.ones(4))
            writer.finish()


def test_the_queue_holds_one_larger_tensor_at_most(tmp_path):
    """A copy of a streamed network reads its tensors one by one: those that wait must not fill memory."""
    names = [f"t{i}" for i in range(6)]
    entries = dict.fromkeys(names, (torch.float32, (8,)))
    with TensorFile(tmp_path / "x", entries, {}) as file, TensorWriter(dict.fromkeys(names, file), 8) as writer:
        for name in names:
            writer.write(name, torch.ones(8))
            assert len(writer.waiting) == 1
        writer.finish()


def test_smaller_tensors_pass_a_larger_one(tmp_path):
    """An embedding is hashed while the first block is cut."""
    shapes = {"large": (8,), "a": (2,), "b": (2,), "c": (2,)}
    entries = {name: (torch.float32, shape) for name, shape in shapes.items()}
    with TensorFile(tmp_path / "x", entries, {}) as file, TensorWriter(dict.fromkeys(shapes, file), 16) as writer:
        lengths = []
        for name, shape in shapes.items():
            writer.write(name, torch.ones(shape))
            lengths.append(len(writer.waiting))
        writer.finish()
    assert lengths == [1, 2, 3, 2]
