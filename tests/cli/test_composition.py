"""A finished run is a model for the next command, with one ledger and the model before each run at hand."""

import json
from pathlib import Path

import pytest
import torch

from cli.conftest import Run, RunOnce
from regrow.nets import load as load_by_name
from regrow.reports.quantities import significant
from regrow.store import load
from regrow.store.ledger import Ledger, replay
from regrow.store.run_folder import RunFolder
from regrow.tracing import trace

CODE = ("--code", "toys:classifier")
PRUNE = ("--method", "magnitude", "--source", "digits", "--eval-tokens", "64")


@pytest.fixture
def chain(regrow: Run, run_once: RunOnce) -> Run:
    """The command line, after a prune, a growth and another prune of one network."""
    run_once("prune", "toys:classifier", "--keep", "0.7", *PRUNE, out="one")
    run_once("grow", "one", "--channels", "+25%", *CODE, out="two")
    run_once("prune", "two", "--keep", "0.9", *PRUNE, *CODE, out="three")
    return regrow


def test_runs_chain_and_their_ledger_is_replayed_from_the_start(chain: Run) -> None:
    import toys

    run = json.loads(Path("three/run.json").read_text())
    assert run["parent"]["name"] == "two" and run["parent"]["plans"] == 2
    assert [stage["verb"] for stage in run["stages"]] == ["prune", "grow"]
    assert [stage["parameters"] for stage in run["stages"]][1:] == [run["parent"]["parameters"]]
    ours = load("three", model=toys.classifier).state_dict()
    for device in ("cpu", "meta"):  # with random weights, and without weights
        with torch.device(device):
            fresh, x = toys.classifier()
        again, _ = replay(fresh, trace(fresh.eval(), x), Ledger(Path("three/ledger.json")).plans())
        assert {name: t.shape for name, t in again.state_dict().items()} == {name: t.shape for name, t in ours.items()}
        assert {t.device.type for t in again.state_dict().values()} == {device}
    before = load("three/before/before/before", model=toys.classifier).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in toys.classifier()[0].state_dict().items())


def test_every_run_can_be_undone_down_to_the_first_weights(chain: Run) -> None:
    import toys

    code, out, err = chain("show", "three", "--code", "toys:classifier")
    assert code == 0, err
    assert "three/before/before/before" in out and "units added" in out
    assert "History of the network" in Path("three/report.html").read_text()
    before = {path.name: path.read_bytes() for path in Path("two").iterdir() if path.is_file()}
    for _ in range(2):
        assert chain("undo", "three")[0] == 0
        if _ == 0:
            assert {path.name: path.read_bytes() for path in Path("three").iterdir() if path.is_file()} == before
    code, out, err = chain("undo", "three", "--out", "start")
    assert code == 0 and "start holds the model before it" in out, err
    first, start = toys.classifier()[0].state_dict(), load("start", model=toys.classifier).state_dict()
    assert first.keys() == start.keys() and all(torch.equal(value, start[name]) for name, value in first.items())
    assert Path("three/run.json").is_file()
    code, _, err = chain("undo", "start")
    assert code == 2 and "not a run folder" in err
    code, _, err = chain("grow", "one", "--channels", "+1", *CODE, "--no-undo", "--out", "four")
    assert code == 0 and not Path("four/before").exists(), err
    code, _, err = chain("undo", "four")
    assert code == 2 and "--no-undo" in err


def test_a_recovery_makes_up_for_the_last_cut_or_is_refused(chain: Run) -> None:
    code, _, err = chain("recover", "three", "--by", "refit", "--tokens", "128", *CODE, "--out", "four")
    assert code == 0, err
    code, _, err = chain("recover", "two", "--by", "refit", *CODE, "--out", "five")
    assert code == 2 and "the last change of shape is by `regrow grow`" in err and err.count("regrow: ") == 1
    code, _, err = chain("show", "four")
    assert code == 2 and "add --code toys:classifier" in err


def test_a_run_is_not_resumed_from_another_model(chain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("grow", "one", "--channels", "+1", *CODE, "--out", "six")
    with monkeypatch.context() as patch:
        patch.setattr("regrow.jobs.grow.compute_outputs", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert chain(*words)[0] != 0
    Path("one").rename("old")
    Path("three").rename("one")
    code, _, err = chain(*words)
    assert code == 2 and "one was changed since this run was started" in err


def test_learning_starts_from_a_run_and_is_added_to(chain: Run) -> None:
    words = ("learn", "digits", "--method", "naive", "--epochs", "1", "--train", "64", "--test", "16")
    code, _, err = chain(*words, "--model", "one", *CODE, "--out", "learned")
    assert code == 0, err
    code, _, err = chain("learn", "--resume", "learned", "--task", "rotated:digits:2", *CODE)
    assert code == 0, err
    run = json.loads(Path("learned/run.json").read_text())
    assert run["parent"]["name"] == "one" and len(run["sequence"]) == 2
    import toys

    one, two = (load(name, model=toys.classifier).state_dict() for name in ("one", "learned/before"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not torch.equal(load("learned", model=toys.classifier).head.weight, one["head.weight"])
    code, _, err = chain("recover", "learned", "--by", "refit", "--tokens", "128", *CODE, "--out", "recovered")
    assert code == 0, err
    code, _, err = chain(*words, "--model", "one", *CODE, "--classes", "12", "--out", "more")
    assert code == 2 and "one has 10 outputs, and the tasks have 12 classes" in err
    code, _, err = chain(*words, "--model", "learned", "--out", "more")
    assert code == 2 and "add --code toys:classifier" in err


@pytest.mark.parametrize(
    ("method", "given", "lr"), [("laplace", (), 0.05), ("naive", (), 0.01), ("laplace", (0.03,), 0.03)]
)
def test_a_new_network_learns_at_the_rate_that_suits_the_method(
    regrow: Run, tmp_path: Path, method: str, given: tuple[float, ...], lr: float
) -> None:
    options = [part for rate in given for part in ("--lr", str(rate))]
    regrow(
        "learn",
        "digits",
        "--model",
        "mlp:4",
        "--method",
        method,
        "--train",
        "64",
        *options,
        "--out",
        str(tmp_path / "a"),
    )
    assert RunFolder(tmp_path / "a").read_record()["settings"]["lr"] == lr


def test_a_language_model_learns_text(regrow: Run, tiny_language_model: Path) -> None:
    words = ("--method", "naive", "--epochs", "1", "--train", "4", "--test", "2", "--seq-len", "16")
    code, out, err = regrow("learn", "news", "manual", "--model", str(tiny_language_model), *words, "--out", "run")
    assert code == 0, err
    assert "news" in out and "manual" in out
    code, _, err = regrow("prune", "run", "--keep", "0.9", "--method", "magnitude", "--out", "pruned")
    assert code == 0, err
    code, _, err = regrow("undo", "pruned")
    assert code == 0 and Path("pruned/course.safetensors").read_bytes() == Path("run/course.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["ewc", "laplace", "gpm", "lwf", "replay", "sparsegrow"])
def test_methods_that_need_probabilities_learn_text(regrow: Run, tiny_language_model: Path, method: str) -> None:
    """At a high rate they forget less of the first text than plain training, in which a token takes its own loss."""
    words = ("--epochs", "4", "--train", "16", "--test", "4", "--seq-len", "16", "--batch-size", "4", "--lr", "0.1")
    lost = {}
    for name in ("naive", method):
        given = ("--set", "samples=16") if name in ("ewc", "laplace", "gpm", "sparsegrow") else ()
        given += ("--set", "grow=start") if name == "laplace" else ()
        command = ("learn", "news", "code", "--model", str(tiny_language_model), "--method", name, *words, *given)
        code, out, err = regrow(*command, "--out", name)
        assert code == 0, err
        rows = RunFolder(Path(name)).metrics()
        matrix = next(row for row in rows if row["what"] == "matrix")["matrix"]
        first, last = (row for row in rows if row["what"] == "task")
        assert (first["parameters"] < last["parameters"]) == (name in ("laplace", "sparsegrow"))  # a gated MLP grows
        losses = last["nats"]
        assert f"news {significant(losses[0])}, code {significant(losses[1])}" in out
        lost[name] = matrix[0][0] - matrix[1][0]
    assert lost[method] <= lost["naive"]


def test_a_run_is_searched_from_its_weights(chain: Run) -> None:
    import toys

    options = ("--data", "digits", "--epochs", "3", "--retrain", "0", "--train", "64", "--test", "16")
    code, _, err = chain("search", "one", "--target", "params=80%", *options, *CODE, "--out", "searched")
    assert code == 0, err
    ledger = Ledger(Path("searched/ledger.json")).plans()
    fresh, x = toys.classifier()
    again, _ = replay(fresh, trace(fresh.eval(), x), ledger)
    ours = load("searched", model=toys.classifier).state_dict()
    assert {name: value.shape for name, value in again.state_dict().items()} == {n: v.shape for n, v in ours.items()}
    code, _, err = chain("grow", "searched", "--channels", "+1", *CODE, "--out", "wider")
    assert code == 0, err


def test_a_language_model_is_searched_on_text(regrow: Run, tiny_language_model: Path) -> None:
    data = ("--data", "news", "--train", "10", "--test", "2", "--seq-len", "16", "--batch-size", "4")
    words = (str(tiny_language_model), *data, "--target", "params=99.85%", "--epochs", "3")
    code, out, err = regrow("search", *words, "--retrain", "1", "--out", "run")
    assert code == 0, err
    assert "on 2 examples" in out
    first, found = load_by_name(str(tiny_language_model)).model, load("run")
    assert sum(p.numel() for p in found.parameters()) <= 0.9985 * sum(p.numel() for p in first.parameters())
    assert found.tokenizer is not None
    code, _, err = regrow("prune", "run", "--keep", "0.9", "--method", "magnitude", "--out", "pruned")
    assert code == 0, err
    code, _, err = regrow("search", *words, "--retrain", "1", "--cutout", "2", "--out", "no")
    assert code == 2 and "--cutout 2 is of images" in err and not Path("no").exists()
