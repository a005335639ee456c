"""What a run needs to go on does not grow with its length, and may be stored one step behind what was logged."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import regrow
from regrow.jobs import learn as learning_run
from regrow.jobs.learn import Settings, learn_named
from regrow.jobs.recording import Invocation
from regrow.store.run_folder import RunFolder
from regrow.training.continual import MAX_PROBED_TASKS, select_probed_tasks

GROWING = {"width": 0.05, "multiple": 1, "cap": 100.0}


def settings(tasks: int) -> Settings:
    more: Any = {
        "method": "sparsegrow",
        "method_settings": GROWING,
        "epochs": 2,
        "train": 64,
        "test": 32,
        "batch_size": 32,
    }
    return Settings((f"permuted:digits:{tasks}",), "mlp:24-24", **more)


def header(path: Path) -> int:
    with path.open("rb") as file:
        return int(struct.unpack("<Q", file.read(8))[0])


def test_the_file_that_a_run_goes_on_from_does_not_grow_with_tasks(tmp_path: Path, monkeypatch: Any) -> None:
    write, sizes = learning_run.write_checkpoint, []

    def watched(path: Path, *given: Any, **more: Any) -> None:
        write(path, *given, **more)
        sizes.append(header(path))

    monkeypatch.setattr(learning_run, "write_checkpoint", watched)
    folder = learn_named(settings(24), Invocation(tmp_path / "run"))
    late, early = sizes[-2], sizes[8]  # both behind a first epoch
    assert late < 1.1 * early, (early, late)
    rows = folder.metrics()
    grown = [row for row in rows if row["what"] == "growth"]
    assert len(folder.ledger) == len(grown) >= 20
    assert max(len(row["accuracy_before"]) for row in grown) == MAX_PROBED_TASKS
    assert [row["asked"] for row in grown if row["task"] == 23] == [select_probed_tasks(23)]
    assert len([row for row in rows if row["what"] == "task"]) == 24


def test_killed_between_logging_and_storing_a_run_goes_on_as_if_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measurements and plans are then ahead of the file that a run goes on from."""
    whole = learn_named(settings(3), Invocation(tmp_path / "whole"))
    write, seen = learning_run.write_checkpoint, []

    def stopping(*given: Any, **more: Any) -> None:
        seen.append(given)
        if len(seen) == 4:
            raise KeyboardInterrupt
        write(*given, **more)

    monkeypatch.setattr(learning_run, "write_checkpoint", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn_named(settings(3), Invocation(tmp_path / "killed"))
    monkeypatch.undo()
    killed = learn_named(settings(3), Invocation(tmp_path / "killed"))
    assert (killed.path / "ledger.json").read_bytes() == (whole.path / "ledger.json").read_bytes()
    told = [[{k: v for k, v in row.items() if k != "seconds"} for row in one.metrics()] for one in (whole, killed)]
    assert told[0] == told[1]
    nets = [regrow.load(one.path).state_dict() for one in (whole, killed)]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


def test_a_ledger_that_lost_a_plan_is_told_as_damaged(tmp_path: Path) -> None:
    folder = learn_named(settings(2), Invocation(tmp_path / "run"))
    path = folder.path / "ledger.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps(text | {"plans": text["plans"][:-1]}))
    with pytest.raises(ValueError, match=r"ledger.json holds 0 of the 1 changes of shape"):
        learning_run.extend(Invocation(RunFolder.open(tmp_path / "run").path), ("permuted:digits:1",))
