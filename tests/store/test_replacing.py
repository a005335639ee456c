"""A finished folder is never changed in place: the new one takes its name as a whole, or nothing changes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from regrow import load
from regrow.store import StoreError, replacing, save
from regrow.store.replacing import clear_leftovers, read_whole, replace_folder, settle


class Killed(BaseException):
    """A process ends here."""


@pytest.fixture(params=["exchange", "two renames"])
def system(request, monkeypatch):
    """Both ways in which a folder takes the place of another one."""
    if request.param == "two renames":
        monkeypatch.setattr(replacing, "_exchange_atomically", lambda one, other: False)
    return request.param


def filled(folder, text):
    with replace_folder(folder) as new:
        (new / "a").write_text(text)
        (new / "in").mkdir()
        (new / "in" / "b").write_text(text)


def held(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_replaced_as_a_whole(tmp_path, system):
    for text in ("first", "second"):
        filled(tmp_path / "out", text)
        assert held(tmp_path / "out") == {"a": text, "in/b": text}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_changes_if_the_block_fails(tmp_path, system):
    filled(tmp_path / "out", "first")
    with pytest.raises(ZeroDivisionError), replace_folder(tmp_path / "out") as new:
        (new / "a").write_text("second")
        raise ZeroDivisionError
    assert held(tmp_path / "out") == {"a": "first", "in/b": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("killed", range(40))
def test_a_kill_at_any_rename_leaves_the_old_or_the_new_folder_and_nothing_else(tmp_path, killed, system):
    """In a child process that ends at its Nth file operation; the next command clears up."""
    filled(tmp_path / "out", "first")
    done = os.fork()
    if not done:
        count = 0

        def count_down(event, _):
            nonlocal count
            if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "ctypes.call_function"):
                count += 1
                if count > killed:
                    os._exit(9)

        sys.addaudithook(count_down)
        filled(tmp_path / "out", "second")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(done, 0)[1])
    settle(tmp_path / "out")
    found = held(tmp_path / "out")
    assert found in ({"a": text, "in/b": text} for text in ("first", "second"))
    clear_leftovers(tmp_path / "out")
    assert held(tmp_path / "out") == found and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert code in (0, 9)
    if not code:
        assert found["a"] == "second"


def test_a_reader_completes_two_renames_of_a_killed_process(tmp_path, monkeypatch):
    save(nn.Linear(3, 3), tmp_path / "net")
    old = load(tmp_path / "net", model=nn.Linear(3, 3)).weight.detach().clone()
    monkeypatch.setattr(replacing, "_exchange_atomically", lambda one, other: False)
    real, calls = Path.rename, []

    def killed(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr("regrow.store.atomic.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            save(nn.Linear(3, 3), tmp_path / "net")
    assert not (tmp_path / "net").exists()
    new = load(tmp_path / "net", model=nn.Linear(3, 3)).weight
    assert new.shape == old.shape and not torch.equal(new, old), "the new one was complete"
    save(nn.Linear(3, 3), tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_readers_never_fail_while_a_model_is_saved_over_another(tmp_path):
    torch.manual_seed(0)
    save(nn.Sequential(nn.Linear(3, 3)), tmp_path / "net")
    code = (
        "import sys; from torch import nn; from regrow.store import save\n"
        "for _ in range(8): save(nn.Sequential(nn.Linear(3, 3)), sys.argv[1])"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "net")])
    seen = set()
    while writer.poll() is None or not seen:
        seen.add(load(tmp_path / "net", model=lambda: nn.Sequential(nn.Linear(3, 3)))[0].weight.sum().item())
    assert not writer.returncode and len(seen) > 1


def test_what_was_read_of_two_folders_is_read_again(tmp_path):
    filled(tmp_path / "out", "first")
    tries = []

    def read():
        one = (tmp_path / "out" / "a").read_text()
        if not tries:
            filled(tmp_path / "out", "second")
        tries.append(one)
        return one, (tmp_path / "out" / "in" / "b").read_text()

    assert read_whole(tmp_path / "out", read) == ("second", "second") and len(tries) == 2
    with pytest.raises(FileNotFoundError):
        read_whole(tmp_path / "none", lambda: (tmp_path / "none").read_text())


def test_other_files_stay_and_those_of_the_old_model_go(tmp_path):
    save(nn.Linear(3, 3), tmp_path / "net")
    (tmp_path / "net" / "notes.txt").write_text("mine")
    (tmp_path / "net" / "model-00001-of-00002.safetensors").write_text("of the old one")
    (tmp_path / "net" / "in").mkdir()
    (tmp_path / "net" / "in" / "more.txt").write_text("mine")
    save(nn.Linear(4, 4), tmp_path / "net")
    names = {path.name for path in (tmp_path / "net").iterdir()}
    assert {"notes.txt", "in"} < names and "model-00001-of-00002.safetensors" not in names
    assert load(tmp_path / "net", model=nn.Linear(4, 4)).in_features == 4


def test_places_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place, words in (
        (tmp_path / "file", "is a file"),
        (Path(), "is the current folder"),
        (tmp_path, "is the current folder or around it"),
        (Path("/proc"), "is a mount point"),
    ):
        with pytest.raises(StoreError, match=words) as caught:
            save(nn.Linear(2, 2), place)
        assert "\n" not in str(caught.value) and "name a folder" in str(caught.value)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    filled(tmp_path / "real", "first")
    (tmp_path / "link").symlink_to("real", target_is_directory=True)
    filled(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink() and held(tmp_path / "real")["a"] == "second"


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("regrow.store.replacing.os.link", refused)
    save(nn.Linear(3, 3), tmp_path / "net")
    (tmp_path / "net" / "notes.txt").write_text("mine")
    save(nn.Linear(4, 4), tmp_path / "net")
    assert (tmp_path / "net" / "notes.txt").read_text() == "mine"


def test_a_result_that_may_not_be_written_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    filled(tmp_path / "out", "old")
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "out" and may(path, mode))
    with pytest.raises(StoreError, match="out may not be written; choose a folder that is yours"):
        filled(tmp_path / "out", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "a").read_text() == "old"
