"""What ``regrow recover`` says of a run whose measurements are not whole."""

import json
import shutil
from pathlib import Path

import pytest

from regrow.cli.runs import say_run
from regrow.jobs import recover as recovery_run
from regrow.jobs.recording import Invocation
from regrow.settings.recover import Settings
from regrow.store import StoreError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "runs" / "prune"


def said(tmp_path, capsys, *rows):
    run = Path(shutil.copytree(FIXTURE, tmp_path / "run"))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    say_run(run)
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def row(model, source, **more):
    return {"what": "perplexity", "model": model, "source": source, "seen": True, "ppl": 9.5, "nll": 2.0} | more


def test_figures_that_are_missing_are_dashes(tmp_path, capsys):
    lines = said(
        tmp_path,
        capsys,
        row("recovered", "mail"),
        row("dense", "code"), row("pruned", "code", nll=2.5, ppl=12.0), row("recovered", "code", ppl=10.0),
        {"what": "choice", "model": "recovered", "task": "piqa", "acc": 0.5, "n": 10},
    )  # fmt: skip
    assert ["mail", "(seen)", "–", "–", "9.50", "–", "–"] in lines
    assert ["code", "(seen)", "9.50", "12.0", "10.0", "×1.05", "78.0", "%"] in lines
    assert ["piqa", "–", "–", "50.0", "%", "–", "–"] in lines


def test_a_perplexity_beyond_all_numbers_is_a_dash(tmp_path, capsys):
    lines = said(
        tmp_path, capsys, row("dense", "code"), row("pruned", "code", nll=None, ppl=None), row("recovered", "code")
    )
    assert ["code", "(seen)", "9.50", "9.50", "×1.00"] in lines


def test_damaged_measurements_are_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    run = Path(shutil.copytree(FIXTURE, tmp_path / "run"))
    (run / "metrics.jsonl").write_text("{]\n" + (run / "metrics.jsonl").read_text())
    with pytest.raises(StoreError, match="line 1 is not a measurement"):
        recovery_run.recover_named(Settings(str(run), "refit"), Invocation(tmp_path / "out", code="toys:classifier"))
    assert not (tmp_path / "out").exists()
