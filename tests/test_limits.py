"""What is not even opened, and what is read only so far."""

import gzip
import os
import socket
from pathlib import Path

import pytest
import torch

from regrow.cli.boundary import ENVIRONMENT, classify_failure
from regrow.core import limits
from regrow.core.change import Change
from regrow.core.errors import InputError, ResourceError
from regrow.core.plan import Plan, PlanError
from regrow.data import SourceError, streams, text
from regrow.data.streams import read_images
from regrow.data.vision import image_tensor, images, open_image
from regrow.evaluation import items_in
from regrow.nets.files import check_safetensors, parsed_gguf
from regrow.store import metrics
from regrow.store.ledger import Ledger
from regrow.store.run_record import read_run


@pytest.fixture(params=["fifo", "socket", "device", "folder", "loop", "missing"])
def strange(request, tmp_path):
    """A path that is no regular file."""
    path = tmp_path / "strange"
    match request.param:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            server = socket.socket(socket.AF_UNIX)
            server.bind(str(path))
            request.addfinalizer(server.close)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
    return path


def test_only_regular_files_are_opened(strange):
    for read in (limits.read_bytes, limits.read_json, lambda path: limits.read_head(path, 10), items_in):
        with pytest.raises(InputError, match="strange"):
            read(strange)
    if not strange.is_dir():
        with pytest.raises(SourceError, match="strange"):
            text(f"mail={strange}")
    with pytest.raises(InputError, match="strange"):
        open_image(strange)


def test_long_files_are_not_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[1, 2, 3]")
    with pytest.raises(InputError, match="has 9 bytes, and at most 8 are read"):
        limits.read_bytes(path, 8)
    assert limits.read_json(path, 9) == [1, 2, 3]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("[" * 100_000, "nested deeper than 100 levels"),
        ("[" * 500 + "]" * 500, "nested deeper than 100 levels"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested deeper than 100 levels"),
        ("1" * 5000, "is not JSON"),
        ("{]", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_no_one_writes_is_refused_in_one_line(data, says):
    with pytest.raises(InputError, match=says) as caught:
        limits.parse_json(data, "x.json")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("x.json")


def test_a_plan_for_billions_of_units_is_refused_at_once():
    for size in (0, 2**31, 2**62):
        with pytest.raises(PlanError, match="an axis has 1 to 67,108,864 units"):
            Plan({"a": Change(size, (2,), ())})


def test_a_damaged_or_swelling_gz_is_refused(tmp_path):
    whole = gzip.compress(os.urandom(1000) + b"word " * 10_000)
    for name, data in (
        ("cut", whole[: len(whole) // 2]),
        ("flipped", whole[:50] + bytes([whole[50] ^ 255]) + whole[51:]),
        ("none", b"none"),
        ("bomb", gzip.compress(bytes(2**26))),
    ):
        path = tmp_path / f"{name}.txt.gz"
        path.write_bytes(data)
        with pytest.raises(SourceError, match=f"{name}.txt.gz (unpacks|is not a whole gzip file|is not text)"):
            text(f"mail={path}")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole gzip file"):
        streams.load_idx(tmp_path)


def test_images_beyond_the_limits_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    from PIL import Image

    for size, says in (
        ((60_000, 60_000), "more than the 67,108,864 pixels"),
        ((9_000, 9_000), "9,000 × 9,000 pixels, at most"),
    ):
        path = tmp_path / "large.png"
        Image.new("1", (8, 8)).save(path)
        data = bytearray(path.read_bytes())
        data[16:24] = b"".join(side.to_bytes(4, "big") for side in size)  # the header alone says so
        path.write_bytes(_with_checksum(data))
        with pytest.raises(SourceError, match=says):
            open_image(path)
    thin = tmp_path / "thin.png"
    Image.new("L", (1, 60_000)).save(thin)
    with pytest.raises(SourceError, match="at most 67,108,864 are read"):
        image_tensor(open_image(thin), 224, "thin", normalised=True)
    dot = tmp_path / "dot.png"
    Image.new("L", (1, 1)).save(dot)
    assert image_tensor(open_image(dot), 8, "dot", normalised=True).shape == (3, 8, 8)
    monkeypatch.setattr(limits, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"needs .* of memory, and .* bytes are free"):
        read_images([thin] * 3)


def _with_checksum(png):
    import zlib

    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


def test_image_data_that_do_not_belong_together_are_refused(tmp_path):
    def write(name, *shape, fill=0):
        head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        (tmp_path / name).write_bytes(head + bytes([fill]) * int(torch.tensor(shape).prod()))

    def written(train=3, labels=3, side=4, label=0):
        write("train-images-idx3-ubyte", train, 4, 4)
        write("train-labels-idx1-ubyte", labels)
        write("t10k-images-idx3-ubyte", 2, side, side)
        write("t10k-labels-idx1-ubyte", 2, fill=label)

    for more, says in (
        ({"labels": 2}, "3 train images have 2 labels"),
        ({"side": 5}, "not of one size and classes"),
        ({"label": 7}, "not of one size and classes"),
        ({"side": 0}, "not a whole file"),
    ):
        written(**more)
        with pytest.raises(SourceError, match=says):
            streams.load_idx(tmp_path)


def test_a_home_folder_of_nobody_is_told(tmp_path):
    for read in (lambda p: text(f"a={p}"), lambda p: images("a", Path(p)), streams.load_task):
        with pytest.raises(SourceError, match="no such user"):
            read("~nobody-of-this-name/x")


def test_free_memory_is_known_and_compared():
    there = limits.available_memory()
    assert there is None or 0 < there < 2**50
    limits.check_memory(1, "nothing", "go on")
    if there is not None:
        with pytest.raises(ResourceError, match=r"a network needs [\d.]+ TiB of memory"):
            limits.check_memory(2**50, "a network", "take a smaller one")


def test_a_file_that_may_not_be_read_is_told_as_such(tmp_path, monkeypatch):
    """By every reader, before it takes the file for a damaged one; root may read all, so the system is asked alone."""
    for name in ("a.txt", "a.txt.gz", "run.json", "metrics.jsonl", "ledger.json", "m.gguf", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    monkeypatch.setattr("regrow.core.limits.os.access", lambda path, mode: False)
    readers = {
        "a.txt": limits.read_text,
        "a.txt.gz": lambda path: limits.read_head(path, 9),
        "run.json": lambda path: read_run(path.parent),
        "metrics.jsonl": lambda path: metrics.Metrics(path).rows(),
        "ledger.json": lambda path: Ledger(path).plans(),
        "m.gguf": lambda path: parsed_gguf(path, "m").__enter__(),
        "model.safetensors": check_safetensors,
    }
    for name, read in readers.items():
        with pytest.raises(ValueError, match=rf"{name} may not be read; check its permissions") as caught:
            read(tmp_path / name)
        assert classify_failure(caught.value).code == ENVIRONMENT, name
