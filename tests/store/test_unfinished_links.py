"""Unfinished work that leads out of its folder, by links: nothing outside changes."""

import json
import os
from pathlib import Path

import pytest

from regrow.store.errors import StoreError
from regrow.store.metrics import Metrics
from regrow.store.run_folder import RunFolder

SETTINGS = {"keep": 0.5}


def begun(out: Path) -> Path:
    """An unfinished run, as a killed process leaves it; its working area."""
    with RunFolder.create(out, verb="prune", settings=SETTINGS) as folder:
        folder.log("note", text="begun")
    return out / ".work"


def go_on(out: Path) -> None:
    with RunFolder.create(out, verb="prune", settings=SETTINGS) as folder:
        assert folder.resumed
        folder.log("note", text="gone on")


def test_measurements_that_link_to_another_file(tmp_path):
    text, outside, work = '{"what": "note"}\n', tmp_path / "outside", begun(tmp_path / "run")
    outside.write_text(text)
    (work / "metrics.jsonl").unlink()
    (work / "metrics.jsonl").symlink_to(outside)
    with pytest.raises(StoreError, match=r"metrics\.jsonl is a symbolic link") as caught:
        go_on(tmp_path / "run")
    assert "\n" not in str(caught.value) and outside.read_text() == text
    (work / "metrics.jsonl").unlink()
    (work / "metrics.jsonl").hardlink_to(outside)
    go_on(tmp_path / "run")
    assert outside.read_text() == text, "another name of a file: a copy is changed"
    assert json.loads((work / "metrics.jsonl").read_text().splitlines()[-1])["text"] == "gone on"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_a_journal_that_is_no_regular_file(tmp_path, make):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(StoreError, match=r"metrics\.jsonl"):
        Metrics(tmp_path / "metrics.jsonl").add({"what": "a"})


@pytest.mark.parametrize("name", ["", "statistics", "found/deeper"])
def test_folders_of_unfinished_work_that_link_elsewhere(tmp_path, name):
    outside, work = tmp_path / "outside", begun(tmp_path / "run")
    outside.mkdir()
    link = work / name
    if name:
        link.parent.mkdir(exist_ok=True)
    else:
        work.rename(tmp_path / "moved")
        for file in (tmp_path / "moved").iterdir():
            (outside / file.name).write_bytes(file.read_bytes())
    link.symlink_to(outside, target_is_directory=True)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    for call in (go_on, RunFolder.reopen, RunFolder.open_unfinished):
        with pytest.raises(StoreError, match="is not a folder of its own") as caught:
            call(tmp_path / "run")
        assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_a_tokenizer_is_not_written_through_links(tmp_path):
    from regrow.store.portable import write_tokenizer

    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokenizer.json").write_text("new")
            (Path(folder) / "tokenizer_config.json").write_text('{"name_or_path": "/home/me", "model_max_length": 9}')
            (Path(folder) / "templates").mkdir()
            (Path(folder) / "templates" / "tools.jinja").write_text("new")

    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("old")
    (folder / "tokenizer.json").symlink_to(outside)
    (folder / "tokenizer_config.json").hardlink_to(outside)
    for _ in range(2):
        write_tokenizer(Tokenizer(), folder)
        assert outside.read_text() == "old" and (folder / "tokenizer.json").read_text() == "new"
        assert json.loads((folder / "tokenizer_config.json").read_text()) == {"model_max_length": 9}
    assert {path.name for path in folder.rglob("*")} == {
        "tokenizer.json", "tokenizer_config.json", "templates", "tools.jinja"
    }  # fmt: skip
