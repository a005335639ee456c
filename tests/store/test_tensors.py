"""Named tensors with a header: they come back bit for bit, or the file is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from regrow.store.errors import StoreError
from regrow.store.tensors import read_header, read_tensors, write_tensors

TENSORS = {
    "weights of/any name ü": torch.arange(6.0).view(2, 3).T,
    "mask": torch.tensor([True, False]),
    "one": torch.tensor(3, dtype=torch.int64),
    "none": torch.empty(0, 4, dtype=torch.bfloat16),
    "one of a row": torch.ones(1, 2)[:, 0],
}


def test_tensors_and_header_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"step": 3, "values": {"loss": [0.5, None]}}, "regrow-test/1")
    header, tensors = read_tensors(path, "regrow-test/1")
    assert list(tensors) == list(TENSORS) and header["step"] == 3 and header["values"] == {"loss": [0.5, None]}
    for name, value in TENSORS.items():
        assert torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype
    assert read_header(path, "regrow-test/1")["step"] == 3
    assert [one.name for one in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_same_tensors_make_the_same_file(tmp_path):
    for name in "abcdefgh":
        write_tensors(tmp_path / name, TENSORS, {"step": 3}, "regrow-test/1")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_tensors_that_share_storage_are_written(tmp_path):
    base = torch.arange(4.0)
    write_tensors(tmp_path / "x", {"all": base, "half": base[:2], "again": base}, {}, "f/1")
    assert read_tensors(tmp_path / "x", "f/1")[1]["half"].tolist() == [0, 1]


def rewritten(path, **changes):
    """The file with another header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as content:
        header = json.loads(content.metadata()["regrow"]) | changes
    save_file(load_file(path), path, {"regrow": json.dumps(header)})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": "f/2"}, "has the format f/2, this version of regrow reads f/1; restore it, or run it again"),
        ({"format": "g/1"}, "has the format g/1, this version of regrow reads f/1"),
        ({"format": None}, "has the format None, this version of regrow reads f/1"),
        ({"names": ["a"]}, "names 1 tensors and holds 2"),
        ({"names": ["a", "a"]}, "names of tensors are damaged"),
        ({"names": [1, 2]}, "names of tensors are damaged"),
        ({"names": "ab"}, "names of tensors are damaged"),
        ({"sha256": None}, "no SHA-256"),
        ({"sha256": "0" * 64}, "do not have the recorded SHA-256"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path, changes, why):
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.ones(2), "b": torch.zeros(3)}, {}, "f/1")
    rewritten(path, **changes)
    with pytest.raises(StoreError, match=why) as caught:
        read_tensors(path, "f/1")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x"
    write_tensors(path, {"a": torch.ones(200)}, {"step": 1}, "f/1")
    whole = path.read_bytes()
    for data in (b"", b"rubbish" * 9, whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(data)
        with pytest.raises(StoreError, match="restore it"):
            read_tensors(path, "f/1")
    with pytest.raises(StoreError, match="restore it"):
        read_tensors(tmp_path / "absent", "f/1")
