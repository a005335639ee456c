"""What ``regrow recover`` says of a run whose measurements are not whole."""

import shutil
from pathlib import Path

import pytest

from regrow.cli.results import say_quality
from regrow.jobs import recover as recovery_run
from regrow.jobs.recording import Invocation
from regrow.settings.recover import Settings
from regrow.store import StoreError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "runs" / "prune"


def row(model, source, **more):
    return {"what": "perplexity", "model": model, "source": source, "seen": True, "ppl": 9.5, "nll": 2.0} | more


def test_figures_that_are_missing_are_dashes(capsys):
    rows = [
        row("recovered", "mail"),
        row("dense", "code"), row("pruned", "code", nll=2.5, ppl=12.0), row("recovered", "code", ppl=10.0),
        {"what": "choice", "model": "recovered", "task": "piqa", "acc": 0.5, "n": 10},
    ]  # fmt: skip
    say_quality(rows)
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mail", "–", "–", "9.5", "–", "–"] in said
    assert ["code", "9.5", "12", "10", "1.053", "78", "%"] in said
    assert ["accuracy", "on", "piqa:", "0.500", "(n", "=", "10)"] in said


def test_a_perplexity_beyond_all_numbers_is_a_dash(capsys):
    say_quality([row("dense", "code"), row("pruned", "code", nll=None, ppl=None), row("recovered", "code")])
    assert ["code", "9.5", "–", "9.5", "1.000", "–"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_damaged_measurements_are_refused_before_a_folder_is_made(tmp_path):
    run = Path(shutil.copytree(FIXTURE, tmp_path / "run"))
    (run / "metrics.jsonl").write_text("{]\n" + (run / "metrics.jsonl").read_text())
    with pytest.raises(StoreError, match="line 1 is not a measurement"):
        recovery_run.run(Settings(str(run), "bias"), Invocation(tmp_path / "out", code="toys:classifier"))
    assert not (tmp_path / "out").exists()
