"""A command that is killed and run again ends as one that was not: rows, page, files, and nothing beside them."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from regrow import export, load
from regrow.cli import run_command
from regrow.jobs.prune import Settings, prune_named
from regrow.jobs.recording import ActiveRun, FolderRecorder, Invocation, RunStart
from regrow.store import save
from regrow.store.errors import explain_os_errors
from regrow.store.run_folder import RunFolder

CLOCK = {"seconds", "started", "finished"}
PRUNE = "prune toys:classifier --method magnitude --keep 0.6 --source digits --tokens 128 --eval-tokens 64"
RECOVER = "recover pruned --by refit --tokens 96 --code toys:classifier"
LEARN = "learn split:digits:2 --model mlp:8 --method naive --epochs 1 --train 60 --test 30"
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "cli"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain(value):
    """JSON data without the time."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if name not in CLOCK}
    return [plain(one) for one in value] if isinstance(value, list) else value


def told(folder):
    """Everything that a finished run says: its rows in order, and its other files but for page and weights."""
    found = {"rows": plain(RunFolder.open(folder).metrics())}
    for path in Path(folder).rglob("*.json"):
        if ".work" not in path.parts:
            found[path.relative_to(folder).as_posix()] = plain(json.loads(path.read_text()))
    return found


def killed(words, patch, after):
    """Run a command that ends right after it has added so many rows to its measurements."""
    real, left = RunFolder.log, after

    def counted(folder, what, *row, **values):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        real(folder, what, *row, **values)

    with patch.context() as one, pytest.raises(Killed):
        one.setattr(RunFolder, "log", counted)
        run_command(words.split())


@pytest.mark.parametrize(
    ("command", "kills"),
    [(PRUNE, (1, 3)), (RECOVER, (0, 3, 5))],
    ids=["prune", "recover"],
)
def test_no_row_is_lost_or_repeated(here, monkeypatch, command, kills):
    if command == RECOVER:
        assert run_command([*PRUNE.split(), "--out", "pruned"]) == 0
    assert run_command([*command.split(), "--out", "whole"]) == 0
    whole = told("whole")
    for after in kills:
        killed(f"{command} --out killed-{after}", monkeypatch, after)
        assert run_command([*command.split(), "--out", f"killed-{after}"]) == 0
        wanted = json.dumps(whole)
        for place in ("--out {}", '"name": "{}"'):
            wanted = wanted.replace(place.format("whole"), place.format(f"killed-{after}"))
        assert told(f"killed-{after}") == json.loads(wanted)
        assert (here / f"killed-{after}" / "report.html").is_file()


def test_a_run_killed_while_its_page_is_written_is_not_finished(here, monkeypatch):
    def dies(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("regrow.reports.page.write_page", dies)
        run_command([*LEARN.split(), "--out", "run"])
    assert [path.name for path in (here / "run").iterdir()] == [".work"]
    assert run_command([*LEARN.split(), "--out", "run"]) == 0
    assert "</html>" in (here / "run" / "report.html").read_text() and not (here / "run" / ".work").exists()
    assert [path.name for path in here.iterdir()] == ["run"]


def test_a_page_that_fails_keeps_no_run_from_its_end(here, monkeypatch, capsys):
    def fails(*_):
        from regrow.reports import ReportError

        raise ReportError("a page needs jinja2: pip install 'jinja2>=3.1'")

    monkeypatch.setattr("regrow.reports.page.write_page", fails)
    assert run_command([*LEARN.split(), "--out", "run"]) == 0
    assert "no page was written: a page needs jinja2" in " ".join(capsys.readouterr().err.split())
    assert load("run") is not None and RunFolder.open("run").read_record()["finished"]


def test_a_run_whose_page_fills_the_disk_fails_and_goes_on_from_there(here, monkeypatch, capsys):
    def fills(*_):
        with explain_os_errors(here / "run"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("regrow.reports.page.write_text", fills)
        assert run_command([*LEARN.split(), "--out", "run"]) == 4
    assert "disk is full" in " ".join(capsys.readouterr().err.split())
    assert run_command([*LEARN.split(), "--out", "run"]) == 0
    assert "</html>" in (here / "run" / "report.html").read_text() and not (here / "run" / ".work").exists()


def test_a_result_is_readable_while_it_takes_further_tasks(here, monkeypatch):
    assert run_command([*LEARN.split(), "--classes", "10", "--out", "run"]) == 0
    before, more = told("run"), ["learn", "--resume", "run", "--task", "permuted:digits:1"]
    weights = load("run").state_dict()
    killed(" ".join(more), monkeypatch, 0)
    assert told("run") == before and (here / "run" / ".work").is_dir()
    assert all(torch.equal(value, load("run").state_dict()[name]) for name, value in weights.items())
    assert run_command(more) == 0
    once = told("run")
    assert len(once["run.json"]["settings"]["tasks"]) == 2
    assert [row["what"] for row in once["rows"]] == ["task", "task", "matrix", "task", "matrix"]
    assert run_command(more[:3]) == 0 and told("run") == once, "nothing to learn, nothing changes"


def test_a_completed_command_that_runs_again_learns_nothing(here, capsys):
    """A command that was killed when all was done and runs again must not learn once more."""
    assert run_command([*LEARN.split(), "--classes", "10", "--out", "run"]) == 0
    more = ["learn", "--resume", "run", "--task", "permuted:digits:1"]
    assert run_command(more) == 0
    once = told("run")
    capsys.readouterr()
    assert run_command(more) == 0 and told("run") == once
    assert "run has learned permuted:digits:1: nothing is left to do" in capsys.readouterr().out
    assert run_command(["learn", "--resume", "run", "--task", "permuted:digits:2"]) == 0 == run_command(more)
    assert len(told("run")["run.json"]["settings"]["tasks"]) == 4


def ends_at(number, work):
    """Do something in a child process that is killed at its Nth change of a folder; whether it came to its end."""
    child = os.fork()
    if not child:
        count = 0

        def hook(event, _):
            nonlocal count
            if event in CHANGES:
                count += 1
                if count > number:
                    os._exit(9)

        sys.addaudithook(hook)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_save_over_a_save_leaves_the_old_or_the_new_model_wherever_it_is_killed(here):
    def network(seed, width):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))

    def loaded():
        for width in (4, 5):
            try:
                return load("net", model=network(0, width))[0].weight
            except ValueError:
                continue
        raise AssertionError("neither the old nor the new model loads")

    expected = [network(0, 4)[0].weight, network(1, 5)[0].weight]
    number, done = 0, False
    while not done:
        save(network(0, 4), "net")
        done = ends_at(number, lambda: save(network(1, 5), "net"))
        now = loaded()
        assert any(now.shape == one.shape and torch.equal(now, one) for one in expected)
        save(network(1, 5), "net")
        assert torch.equal(loaded(), expected[1]) and [path.name for path in here.iterdir()] == ["net"], number
        number += 1
    assert number > 5


def test_an_export_that_was_killed_can_be_made_again(here):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    save(LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval(), "model")
    number, done = 0, False
    export("model", "net", format="transformers")
    whole = {path.name: path.read_bytes() for path in Path("net").iterdir()}
    while not done:
        done = ends_at(number, lambda: export("model", "net", format="transformers"))
        assert load("net") is not None
        export("model", "net", format="transformers")
        assert {path.name: path.read_bytes() for path in Path("net").iterdir()} == whole
        assert {path.name for path in here.iterdir()} == {"model", "net"}
        number += 3
    assert number > 5


def test_two_runs_in_one_folder(here):
    settings = Settings("toys:classifier", method="magnitude", sources=("digits",), tokens=64, eval_tokens=32)

    def second(_done, _total, what):
        if what.startswith(("loading", "tracing", "timing", "preparing")):  # nothing is written before
            return
        with pytest.raises(ValueError, match="being written by another process"):
            prune_named(settings, Invocation("run"))

    assert prune_named(settings, Invocation("run", progress=second)).read_record()["finished"]


def test_an_error_before_the_first_measurement_leaves_nothing(tmp_path):
    for name, is_kept in (("run.json", False), ("statistics/sums.safetensors", True)):
        run = ActiveRun(FolderRecorder(tmp_path / "out", "m", "regrow prune m"))
        start = RunStart({"verb": "prune", "settings": {"data": name}, "defaults": {}}, None)
        with pytest.raises(IndexError), run.begin(start) as folder:
            (folder.path / name).parent.mkdir(exist_ok=True)
            (folder.path / name).touch()
            raise IndexError
        assert (tmp_path / "out" / ".work" / name).exists() == is_kept == (tmp_path / "out").exists()
