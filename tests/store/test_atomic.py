"""Files are there whole or not at all."""

import errno
import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from regrow.store.atomic import LEFTOVER, atomic_write, stage_folder, write_bytes, write_text
from regrow.store.errors import StoreError


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "first, with ü")
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second" and len(list(tmp_path.iterdir())) == 1


def test_others_may_read_what_their_umask_allows(tmp_path):
    with atomic_write(tmp_path / "a.safetensors") as temporary:
        save_file({"x": torch.ones(2)}, temporary)
    write_text(tmp_path / "b", "")
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_the_old_file_stands_when_the_disk_does_not_take_the_new_one(tmp_path, monkeypatch, number):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="choose") as caught:
        patch.setattr("regrow.store.atomic.os.fsync", fail)
        write_text(path, "new")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_what_a_library_writes_is_kept_to_the_same_rules(tmp_path):
    path = tmp_path / "x.safetensors"
    with atomic_write(path) as temporary:
        save_file({"x": torch.ones(2)}, temporary)
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        save_file({"x": torch.zeros(2)}, temporary)
        raise ZeroDivisionError
    assert load_file(path)["x"].tolist() == [1, 1] and len(list(tmp_path.iterdir())) == 1


def test_the_error_of_a_library_that_met_a_full_disk(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(StoreError, match="disk is full"), atomic_write(tmp_path / "x"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(StoreError, match="create it first"):
        write_text(tmp_path / "no" / "such", "")


def test_names_of_unfinished_files(tmp_path):
    with stage_folder(tmp_path / "a.json") as stage:
        assert LEFTOVER.fullmatch(stage.name)
    assert not LEFTOVER.fullmatch("a.json") and not LEFTOVER.fullmatch(".hidden")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount")
def test_a_disk_that_is_really_full(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this machine does not let us mount")
    code = (
        "import sys, torch; from torch import nn; from regrow.store.run_folder import RunFolder\n"
        "from regrow.store import save, StoreError\n"
        "try: save(nn.Linear(400, 400), sys.argv[1])\n"
        "except StoreError as error: sys.exit(str(error))"
    )
    try:
        run = subprocess.run([sys.executable, "-c", code, small / "net"], capture_output=True, text=True, check=False)
        assert run.returncode == 1 and "the disk is full" in run.stderr and run.stderr.count("\n") == 1, run.stderr
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)
