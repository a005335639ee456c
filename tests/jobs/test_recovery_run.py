"""Recovery in run folders: after a cut and on its own, stopped and taken up, told by the command line and the page."""

from pathlib import Path

import pytest
import torch

from regrow.cli import run_command
from regrow.jobs import recover as recovery_run
from regrow.jobs.prune import Settings, prune_named
from regrow.jobs.recording import Invocation
from regrow.methods.recovery import FORMAT
from regrow.reports import read_runs, to_html
from regrow.settings import recover
from regrow.store import StoreError
from regrow.store.run_folder import RunFolder
from regrow.store.tensors import open_checkpoint, write_tensors

PRUNING = Settings("toys:classifier", method="magnitude", keep=0.5, sources=("digits",), tokens=256, eval_tokens=200)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "cli"))
        yield prune_named(PRUNING, Invocation(tmp_path_factory.mktemp("runs") / "pruned")).path


CODE = "toys:classifier"
"""What builds the networks of these runs, named anew by whoever recovers one."""


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_recovery_run_takes_over_what_was_measured_and_measures_the_rest(pruned, tmp_path, capfd):
    words = ["recover", str(pruned), "--by", "refit", "--tokens", "256", "--out", str(tmp_path / "out")]
    words += ["--code", CODE]
    code = run_command(words)
    said = " ".join(capfd.readouterr().out.split())
    assert not code and "Recovered by refit on 256 examples" in said and "Before Pruned Recovered" in said
    folder = RunFolder.open(tmp_path / "out")
    rows = folder.metrics()
    assert [row["model"] for row in rows if row["what"] == "choice"] == ["dense", "pruned", "recovered"]
    done = next(row for row in rows if row["what"] == "recovery")
    assert [layer["weight"] for layer in done["layers"]] == ["body.3.weight", "head.weight"]
    assert folder.read_record()["finished"] and not (folder.path / "statistics").exists() and len(folder.ledger) == 1
    (page,) = read_runs([folder.path])
    assert page.method == "magnitude+refit" and page.settings["keep"] == "0.5" and not page.problems
    more = recover.Settings(str(folder.path), "distil", tokens=256, recovery_settings={"mix": 0.2})
    again = recovery_run.recover_named(more, Invocation(tmp_path / "more", code=CODE))
    assert again.read_record()["settings"]["method"] == "magnitude+refit+distil"
    assert again.read_record()["settings"]["pruning"] == folder.read_record()["settings"]["pruning"]


@pytest.mark.parametrize("by", ["refit", "distil"])
def test_a_recovery_that_was_killed_ends_as_one_that_was_not(pruned, tmp_path, by):
    passes = {"passes": 4} if by == "distil" else {}
    settings = recover.Settings(str(pruned), by, tokens=256, seed=3, recovery_settings=passes)
    whole = recovery_run.recover_named(settings, Invocation(tmp_path / "whole", code=CODE))

    steps = []

    def stopping(done, total, what):
        if what.startswith(("refitting", "training")):
            steps.append(total)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovery_run.recover_named(settings, Invocation(tmp_path / "killed", code=CODE, progress=stopping))
    kept = "recovery/000000.safetensors" if by == "refit" else "recovery.safetensors"
    assert (tmp_path / "killed" / ".work" / "statistics" / kept).exists()
    told: list[str] = []
    killed = recovery_run.recover_named(
        settings, Invocation(tmp_path / "killed", code=CODE, progress=lambda done, total, what: told.append(what))
    )
    assert weights(killed.path) == weights(whole.path)
    assert (
        len([what for what in told if what.startswith(("refitting", "training"))]) == steps[0] - 1
    )  # the first is done
    models = [[row["model"] for row in one.metrics() if row["what"] == "choice"] for one in (killed, whole)]
    assert models[0] == models[1]


def test_what_cannot_be_recovered_is_said(pruned, tmp_path):
    with pytest.raises(StoreError, match="not a run folder"):
        recovery_run.recover_named(recover.Settings(str(tmp_path), "refit"), Invocation(tmp_path / "out"))
    with pytest.raises(ValueError, match="no recovery 'fit'"):
        recovery_run.recover_named(
            recover.Settings(str(pruned), "fit"), Invocation(tmp_path / "out", code="toys:classifier")
        )
    other = RunFolder.create(tmp_path / "other", verb="learn", settings={}).finish()
    with pytest.raises(StoreError, match=r"nothing was cut\); give the folder of a pruning run"):
        recovery_run.recover_named(recover.Settings(str(other.path), "refit"), Invocation(tmp_path / "out"))
    few = recover.Settings(str(pruned), "refit", tokens=32)
    with pytest.raises(ValueError, match="has 1 batches; one is held out"):
        recovery_run.recover_named(few, Invocation(tmp_path / "out", code="toys:classifier"))
    half = RunFolder.create(tmp_path / "half", verb="prune", settings={"model": "m"}, command="regrow prune m")
    with pytest.raises(StoreError, match="not finished; resume it first: regrow prune m"):
        recovery_run.recover_named(recover.Settings(str(half.out), "refit"), Invocation(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_page_tells_the_cut_from_what_came_back(tmp_path):
    folder = RunFolder.create(tmp_path / "run", verb="recover", settings={"model": "m", "by": "refit"})
    for model, ppl in (("dense", 10.0), ("pruned", 40.0), ("recovered", 20.0)):
        folder.log("perplexity", model=model, source="news", ppl=ppl, nll=1.0, se=0.1, tokens=8, seen=False)
    (run,) = read_runs([folder.path])
    (row,) = run.quality
    assert [row.value(model) for model in ("before", "changed", "recovered")] == [10.0, 40.0, 20.0]
    assert "Recovered</th>" in to_html([run]) and ">20.0" in to_html([run])


def test_a_checkpoint_of_something_else_is_removed(tmp_path):
    path = tmp_path / "in" / "s.safetensors"
    assert open_checkpoint(path, "key", FORMAT) == {} and path.parent.is_dir()
    write_tensors(path, {"w a": torch.randn(2, 3)}, {"key": "key", "step": 3}, FORMAT)
    assert open_checkpoint(path, "key", FORMAT)["step"] == 3
    assert open_checkpoint(path, "another", FORMAT) == {} and not path.exists()
