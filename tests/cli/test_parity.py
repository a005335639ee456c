"""A command and the Python function of its name give the same plan, the same weights and the same measurements.

Three differences are inherent. Python takes data as they are: where the command splits a source into a calibration and
an evaluation half, the halves are given as ``data`` and ``validation``. The command ``search`` has test data, too, and
trains the network that it found. Times are times.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import regrow
from regrow.jobs import grow, learn, prune, search
from regrow.jobs.inputs import SourceHalves, SourceSpecs, read_sources
from regrow.jobs.learn import make_task_specs
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.recording import Invocation
from regrow.jobs.search_inputs import read_search_data
from regrow.jobs.starting import read_tasks
from regrow.nets import Loaded
from regrow.nets.vision import small
from regrow.settings.grow import Settings as GrowSettings
from regrow.settings.learn import Settings as LearnSettings
from regrow.settings.prune import Settings as PruneSettings
from regrow.settings.search import Settings as SearchSettings
from regrow.store.run_folder import RunFolder

TIMES = frozenset(("seconds", "ms", "whole", "found"))
DIGITS = SourceSpecs(128, 256, ("digits",), (), 256)
AMOUNTS = ({"channels": "+25%"}, {"mlp": "+4"}, {"blocks": "+2"}, {"blocks": "+1", "mlp": "+3"})
SIZES: Mapping[str, int] = {"tokens": 256, "eval_tokens": 128}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return tmp_path


def read(name: str) -> tuple[Loaded, SourceHalves]:
    loaded = load_model(ModelSpec(f"toys:{name}"))
    return loaded, read_sources(DIGITS, loaded)


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in folder.metrics()]


def assert_same_runs(command: RunFolder, python: RunFolder, model: torch.nn.Module, besides: str = "") -> None:
    assert python.own_ledger.plans() == command.own_ledger.plans()
    assert rows(python) == [row for row in rows(command) if row["what"] != besides]
    ours, theirs = (load_file(one.path / "model.safetensors") for one in (python, command))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = model.state_dict()
    assert all(torch.equal(state[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("method", ["flap", "magnitude", "fisher"])
@pytest.mark.parametrize("name", ["classifier", "residual"])
def test_prune(name: str, method: str, fit: bool) -> None:
    settings = PruneSettings(
        f"toys:{name}", method, target="macs=60%", keep=None, sources=("digits",), reconstruct=fit, **SIZES
    )
    command = prune.prune_named(settings, Invocation("command"))
    models = []
    for out in (None, "python"):
        loaded, halves = read(name)
        call: dict[str, Any] = {"validation": halves.evaluation} if out else {}
        model, plan = regrow.prune(
            loaded.model,
            halves.calibration,
            method=method,
            target="macs=60%",
            example=loaded.example,
            reconstruct=fit,
            out=out,
            **call,
        )
        assert [plan] == list(command.own_ledger.plans())
        models.append(model)
    whats = [row["what"] for row in command.metrics()]
    assert {"verify", "choice"} <= {*whats} and ("reconstruction" in whats) == fit
    assert_same_runs(command, RunFolder.open("python"), models[1])
    assert_same_runs(command, RunFolder.open("python"), models[0])


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    "amounts", [{"channels": "+25%"}, {"mlp": "+4"}, {"blocks": "+2"}, {"blocks": "+1", "mlp": "+3"}]
)
def test_grow(amounts: dict[str, str], steps: int) -> None:
    texts: dict[str, Any] = {**amounts}
    texts |= {"blocks": (f"*={amounts['blocks']}",)} if "blocks" in amounts else {}
    training = {"on": ("digits",), "steps": steps} if steps else {"sources": ("digits",)}
    command = grow.grow_named(GrowSettings("toys:residual", **texts, **training, **SIZES), Invocation("command"))
    models = []
    for out in (None, "python"):
        loaded, halves = read("residual")
        call: dict[str, Any] = {"data": halves.calibration, "steps": steps} if steps else {}
        call |= {"validation": halves.evaluation} if out else {}
        models.append(regrow.grow(loaded.model, **amounts, **call, example=loaded.example, out=out)[0])
    whats = [row["what"] for row in command.metrics()]
    assert {"verify", "choice"} <= {*whats} and ("training" in whats) == bool(steps)
    for model in models:
        assert_same_runs(command, RunFolder.open("python"), model)


@pytest.mark.parametrize("method", ["sparsegrow", "ewc", "replay", "packnet"])
@pytest.mark.parametrize("model", ["mlp:12-12", "toys:classifier"])
def test_learn(model: str, method: str) -> None:
    given = {"grow": "always", "width": 0.5, "multiple": 1, "cap": 3.0} if method == "sparsegrow" else {}
    tasks = ("permuted:digits:2",) if model.startswith("mlp") else ("digits", "rotated:digits:1")
    more: dict[str, Any] = {"method": method, "epochs": 2, "batch_size": 32, "lr": 0.05}
    settings = LearnSettings(tasks, model, method_settings=given, train=128, test=64, **more)
    command = learn.learn_named(settings, Invocation("command"))
    for out in (None, "python"):
        start = None if model.startswith("mlp") else load_model(ModelSpec(model))
        every = read_tasks(make_task_specs(settings, start))
        net = start.model if start else small(model, (1, 8, 8), 10)[0]
        learned = regrow.learn(net, every, settings=given, example=start and start.example, out=out, **more)
        assert [*learned.plans] == [*command.own_ledger.plans()] and bool(learned.plans) == bool(given)
        assert [*map(list, learned.scores.rows)] == command.last("matrix")["matrix"]
    assert {"task", "matrix"} <= {row["what"] for row in command.metrics()}
    assert_same_runs(command, RunFolder.open("python"), learned.model)
    same = ("method", "method_settings", "epochs", "batch_size", "lr", "seed", "scenario", "precision", "optimizer")
    recorded = [folder.read_record() for folder in (command, RunFolder.open("python"))]
    assert recorded[0]["defaults"] == recorded[1]["defaults"]
    assert all(recorded[0]["settings"].get(name) == recorded[1]["settings"].get(name) for name in same)


def test_prune_of_a_language_model(tiny_language_model: Path) -> None:
    given: dict[str, Any] = {"sources": ("news", "code"), "tokens": 512, "eval_tokens": 256, "seq_len": 64}
    command = prune.prune_named(
        PruneSettings(str(tiny_language_model), "flap", keep=0.7, **given), Invocation("command")
    )
    loaded = load_model(ModelSpec(str(tiny_language_model)))
    halves = read_sources(SourceSpecs(256, 64, ("news", "code"), (), 512), loaded)
    model, _ = regrow.prune(
        loaded.model,
        halves.calibration,
        validation=halves.evaluation,
        method="flap",
        keep=0.7,
        example=loaded.example,
        tokenizer=loaded.tokenizer,
        out="python",
    )
    assert {"verify", "perplexity", "paired"} <= {row["what"] for row in command.metrics()}
    assert_same_runs(command, RunFolder.open("python"), model)


@pytest.mark.parametrize("method", ["mgas", "blind"])
@pytest.mark.parametrize("target", ["macs=60%", "nonzero=60%"])
def test_search(target: str, method: str) -> None:
    import toys

    regrow.save(read("residual")[0], Path("saved"))
    steps: dict[str, Any] = {"method": method, "epochs": 3 if method == "mgas" else 0, "batch_size": 16}
    known = {"warm": 0, "every": 1, "augment": True} if method == "mgas" else {"what": "filters"}
    settings = SearchSettings("saved", "digits", target, method_settings=known, retrain=0, train=96, test=32, **steps)
    command = search.search_named(settings, Invocation("command", code="toys:residual"))
    parts = read_search_data(settings, load_model(ModelSpec("saved"), code="toys:residual")).search
    for out in (None, "python"):
        result = regrow.search(
            regrow.load("saved", model=toys.residual),
            (parts.train.inputs, parts.train.labels),
            validation=(parts.test.inputs, parts.test.labels),
            target=target,
            settings=known,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            out=out,
            **steps,
        )
        assert result.plans == command.own_ledger.plans()
        (found,) = (row for row in rows(command) if row["what"] == "found")
        assert result.score == found["accuracy"]
    python = RunFolder.open("python")
    assert "levels" in {row["what"] for row in rows(command)}
    assert_same_runs(command, python, result.model, besides="test")
    for path in sorted(command.path.rglob("*.safetensors")):
        assert path.read_bytes() == (python.path / path.relative_to(command.path)).read_bytes(), path
