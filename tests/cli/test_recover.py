"""What ``regrow recover`` says of a run whose measurements are not whole."""

import json
import shutil
from pathlib import Path

import pytest

from regrow.cli.recover import tell
from regrow.jobs import recover as recovery_run
from regrow.jobs.recording import Invocation
from regrow.settings.recover import Settings
from regrow.store import StoreError
from regrow.store.run_folder import RunFolder

FIXTURE = Path(__file__).parents[1] / "fixtures" / "runs" / "prune"


def row(model, source, **more):
    return {"what": "perplexity", "model": model, "source": source, "seen": True, "ppl": 9.5, "nll": 2.0} | more


def folder_with(path, rows):
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return RunFolder(path)


def test_figures_that_are_missing_are_named(capsys, tmp_path):
    rows = [
        row("recovered", "mail"),
        row("dense", "code"), row("pruned", "code", nll=2.5, ppl=12.0), row("recovered", "code"),
        {"what": "choice", "model": "recovered", "task": "piqa", "acc": 0.5, "n": 10},
    ]  # fmt: skip
    tell(folder_with(tmp_path, rows))
    said = capsys.readouterr().out
    assert said.count("note:") == 1 and "accuracy on piqa: 0.500 (n = 10)" in said
    note = " ".join(said[said.index("note:") :].split())
    assert "the dense and the pruned model on mail, the dense and the pruned model on piqa" in note
    assert "restore the file of the pruning run" in note and "– –" not in said


def test_nothing_is_missing(capsys, tmp_path):
    rows = [row("dense", "code"), row("pruned", "code", nll=None, ppl=None), row("recovered", "code")]
    tell(folder_with(tmp_path, rows))
    assert "note" not in capsys.readouterr().out


def test_damaged_measurements_are_refused_before_a_folder_is_made(tmp_path):
    run = Path(shutil.copytree(FIXTURE, tmp_path / "run"))
    (run / "metrics.jsonl").write_text("{]\n" + (run / "metrics.jsonl").read_text())
    with pytest.raises(StoreError, match="line 1 is not a measurement"):
        recovery_run.run(Settings(str(run), "bias"), Invocation(tmp_path / "out", code="toys:classifier"))
    assert not (tmp_path / "out").exists()
