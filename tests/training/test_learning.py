"""The loop over tasks and its run folder: resuming, further tasks, and the account of what is known."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import regrow
from regrow.core.objectives import CLASSIFICATION
from regrow.data import SourceError
from regrow.data.streams import load_digits, permuted_tasks, split_by_classes
from regrow.evaluation.continual import Matrix, mean_score
from regrow.jobs import learn as learning_run
from regrow.jobs.learn import Settings, extend, learn_named
from regrow.jobs.recording import Invocation
from regrow.jobs.starting import TaskSpecs, read_tasks
from regrow.methods import LEARNERS, MethodKind, find_method
from regrow.nets.vision import small
from regrow.reports import write_page
from regrow.store.errors import StoreError
from regrow.tracing import trace
from regrow.training.continual import TaskSchedule, accuracy_matrix, learn
from regrow.training.learner import Context
from regrow.training.state import write_checkpoint

SETTINGS = Settings(
    ("permuted:digits:2",),
    model="mlp:16-16",
    method="sparsegrow",
    epochs=4,
    train=300,
    test=100,
    method_settings={"grow": "always"},
)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_method_learns_and_tells(name: str) -> None:
    """Each learns the first of two tasks far better than chance, and its matrix is that of the network it leaves."""
    tasks = permuted_tasks(load_digits(), 2)
    model, _ = small("mlp:48-32", (1, 8, 8), 10)
    axes = trace(model, tasks[0].train.inputs[:2])
    learner = find_method(MethodKind.CONTINUAL, name).build(find_method(MethodKind.CONTINUAL, name).settings())
    state = learn(model, axes, tasks, learner, TaskSchedule(epochs=4, batch_size=32, lr=0.05)).state
    assert state.rows[0][0] > 0.6 > 0.3 > state.before[0]
    if name != "wsn":  # which answers through its masks
        again = tuple(mean_score(model, task.test, CLASSIFICATION) for task in tasks)
        assert again == state.rows[-1]


GROWING = {"grow": "always", "late_phase": 0.6}


@pytest.mark.parametrize(
    ("name", "model", "given"),
    [
        *((name, "mlp:16-16", GROWING if name == "sparsegrow" else {}) for name in LEARNERS),
        ("sparsegrow", "mlp:16-16", GROWING | {"gate": "hard", "threshold": "adaptcl", "cap": 9.0}),
        ("sparsegrow", "resnet:8-2", GROWING),
        ("sparsegrow", "resnet-gn:8-2", GROWING | {"multiple": 1}),
    ],
)
def test_killed_and_resumed_is_never_stopped(
    name: str, model: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the second task, after growth where there is any: the same numbers, bit for bit."""
    own: Any = {"model": model, "method": name, "method_settings": given}
    settings = Settings(("permuted:digits:2",), epochs=4, train=200, test=80, **own)
    whole = regrow.load(learn_named(settings, Invocation(tmp_path / "whole")).path)
    write, seen = learning_run.write_checkpoint, []

    def stopping(path: Path, model: Any, state: Any, **more: Any) -> None:
        write(path, model, state, **more)
        seen.append((state.number, state.epoch, [event["task"] for event in state.events]))
        if len(seen) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(learning_run, "write_checkpoint", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn_named(settings, Invocation(tmp_path / "killed"))
    assert seen[-1][:2] == (1, 3) and (1 in seen[-1][2]) == bool(given), "in the middle of a task, past its growth"
    monkeypatch.undo()
    if model == "mlp:16-16":
        learn_named(settings, Invocation(tmp_path / "killed"))
    else:  # a fresh process
        out = str(tmp_path / "killed")
        imports = "from regrow.jobs.learn import Settings, learn_named; from regrow.jobs.recording import Invocation"
        call = f"{imports}; learn_named({settings!r}, Invocation({out!r}))"
        subprocess.run([sys.executable, "-c", call], check=True, timeout=300)
    again = regrow.load(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    told = [[r for r in regrow_rows(tmp_path / one) if r["what"] == "matrix"][-1] for one in ("whole", "killed")]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("replay", {"memory": 60}),
        ("replay", {"memory": 60, "logit_weight": 0.5, "asymmetric_loss": True}),
        ("sparsegrow", {"memory": 60}),
        ("naive", {"keep": "data"}),
    ],
)
def test_what_is_remembered_is_chosen_among_the_classes_of_its_own_task(method: str, given: dict[str, Any]) -> None:
    tasks = split_by_classes(load_digits(), 5)
    model, _ = small("mlp:32", (1, 8, 8), 10)
    axes = trace(model, tasks[0].train.inputs[:2])
    learner = find_method(MethodKind.CONTINUAL, method).create(method, given)
    fitted = learn(model, axes, tasks, learner, TaskSchedule(scenario="task", epochs=3, batch_size=32, lr=0.05))
    matrix = accuracy_matrix(fitted.state)
    assert matrix.average > 0.9 and matrix.forgetting < 0.08
    context = Context(
        model, fitted.axes, tasks[2], 2, past=tuple(tasks[:2]), classes=torch.tensor([0, 0, 0, 0, 1, 1]).bool()
    )
    told = context.replay_logits(tasks[0].train.inputs[:3], torch.tensor([1, 2, 5])).isfinite()
    assert [row.nonzero()[:, 0].tolist() for row in told] == [[0, 1], [2, 3], [4, 5]]


def regrow_rows(path: Path) -> list[dict[str, Any]]:
    from regrow.store.run_folder import RunFolder

    return RunFolder.open(path).metrics()


def accuracy_matrix_of(row: dict[str, Any]) -> Matrix:
    *rows, before = (tuple(math.nan if v is None else v for v in values) for values in (*row["matrix"], row["before"]))
    return Matrix(tuple(rows), before)


def test_a_run_takes_further_tasks(tmp_path: Path) -> None:
    """Learned in two calls, the first tasks end as they did, and the figures are those of the saved matrix."""
    folder = learn_named(SETTINGS, Invocation(tmp_path / "run"))
    first = [row for row in folder.metrics() if row["what"] == "matrix"][-1]
    folder = extend(Invocation(tmp_path / "run"), ("rotated:digits:2",))
    last = [row for row in folder.metrics() if row["what"] == "matrix"][-1]
    assert last["matrix"][:2] == first["matrix"] and len(last["matrix"]) == 4
    matrix = accuracy_matrix_of(last)
    past = [last["matrix"][-1][j] - last["matrix"][j][j] for j in range(3)]
    assert last["backward_transfer"] == pytest.approx(sum(past) / 3) == pytest.approx(matrix.backward_transfer)
    model = regrow.load(folder.path)
    told = [row for row in folder.metrics() if row["what"] == "task"][-1]
    layers = [one for one in model if isinstance(one, torch.nn.Linear)]
    assert told["macs"] == sum(one.weight.numel() for one in layers)
    flags = sum(-(-p.numel() // 8) for p in model.parameters())
    factors = 4 * sum((one.in_features + 1) * one.in_features + one.out_features**2 for one in layers)
    anchor = 4 * sum(p.numel() for p in model.parameters())
    assert told["remembered"] == flags + factors + anchor + 4 * sum(one.out_features for one in layers)
    tasks = read_tasks(TaskSpecs(("permuted:digits:2", "rotated:digits:2"), train=300, test=100))
    assert tuple(mean_score(model, task.test, CLASSIFICATION) for task in tasks) == tuple(last["matrix"][-1])
    assert model[1].out_features > 16


def test_further_tasks_are_learned_under_the_defaults_of_the_first(tmp_path: Path, monkeypatch: Any) -> None:
    """Another version may have others."""
    own = replace(SETTINGS, epochs=1, method="ewc", method_settings={"decay": 0.5})
    folder = learn_named(own, Invocation(tmp_path / "run"))
    began = folder.read_record()["defaults"]
    assert "decay" not in began and began["strength"] == find_method(MethodKind.CONTINUAL, "ewc").settings().strength
    folder.update(defaults=began | {"strength": 7.0})
    seen, build = [], learning_run.build_learner

    def watched(method: str, settings: Any, seed: int) -> Any:
        seen.append(settings)
        return build(method, settings, seed)

    monkeypatch.setattr(learning_run, "build_learner", watched)
    extend(Invocation(tmp_path / "run"), ("rotated:digits:2",))
    assert (seen[0]["strength"], seen[0]["decay"]) == (7.0, 0.5)
    assert folder.read_record()["defaults"] == began | {"strength": 7.0}


def test_classes_that_come_later_need_outputs(tmp_path: Path) -> None:
    """Refused before anything is written; with outputs from the start they are learned."""
    few = replace(SETTINGS, tasks=("split:digits:5",), epochs=1, method="naive", method_settings={})
    learn_named(few, Invocation(tmp_path / "few"))
    told = (tmp_path / "few" / "run.json").read_bytes()
    with pytest.raises(ValueError, match="outputs for 2: begin a run with --classes 10"):
        extend(Invocation(tmp_path / "few"), ("digits",))
    assert (tmp_path / "few" / "run.json").read_bytes() == told
    learn_named(replace(few, classes=10), Invocation(tmp_path / "many"))
    matrix = [row for row in extend(Invocation(tmp_path / "many"), ("digits",)).metrics() if row["what"] == "matrix"][
        -1
    ]
    assert len(matrix["matrix"]) == 6 and regrow.load(tmp_path / "many")[-1].out_features == 10


def test_batches_of_one_are_learned_from(tmp_path: Path) -> None:
    folder = learn_named(
        replace(SETTINGS, tasks=("digits",), train=60, epochs=4, batch_size=1, method="naive", method_settings={}),
        Invocation(tmp_path / "run"),
    )
    assert [row for row in folder.metrics() if row["what"] == "matrix"][-1]["learning"] > 0.2


def test_a_later_set_of_pictures_takes_the_form_of_the_first(tmp_path: Path) -> None:
    """A network takes one size: what comes later, even months later, is brought to it."""
    for half in ("train", "test"):
        for label in "0123456789":
            (tmp_path / "large" / half / label).mkdir(parents=True)
            Image.new("RGB", (12, 12), (int(label) * 25, 0, 90)).save(tmp_path / "large" / half / label / "one.png")
    learn_named(replace(SETTINGS, tasks=("digits",)), Invocation(tmp_path / "run"))
    matrix = [
        row
        for row in extend(Invocation(tmp_path / "run"), (str(tmp_path / "large"),)).metrics()
        if row["what"] == "matrix"
    ]
    assert matrix[-1]["tasks"] == ["digits", "large"] and [len(row) for row in matrix[-1]["matrix"]] == [1, 2]


def test_data_of_tasks_that_are_over_may_be_gone(tmp_path: Path) -> None:
    """Months later: what is there is learned and measured, what is gone is not, and nothing is made up for it."""
    old = dots(tmp_path / "old")
    folder = learn_named(replace(SETTINGS, tasks=(str(old),)), Invocation(tmp_path / "run"))
    first = [row for row in folder.metrics() if row["what"] == "matrix"][-1]
    shutil.rmtree(old)
    with pytest.raises(SourceError, match=r"no data .*old.*; with --without-old, tasks that are over need no data"):
        extend(Invocation(tmp_path / "run"), ("permuted:digits:2",))
    for more in ("permuted:digits:2", "rotated:digits:1"):
        folder = extend(Invocation(tmp_path / "run"), (more,), without_old=True)
    last = [row for row in folder.metrics() if row["what"] == "matrix"][-1]
    assert last["tasks"][0] == "old" and last["before"][0] == first["before"][0]
    assert [row[0] for row in last["matrix"]] == [first["matrix"][0][0], None, None, None]
    end = last["matrix"][-1]
    assert last["average"] == pytest.approx(sum(end[1:]) / 3) == pytest.approx(accuracy_matrix_of(last).average)
    best = [max(last["matrix"][i][j] for i in range(j, 3)) for j in (1, 2)]
    assert last["forgetting"] == pytest.approx(sum(a - b for a, b in zip(best, end[1:3], strict=True)) / 2)
    assert last["learning"] == pytest.approx(sum(last["matrix"][i][i] for i in range(4)) / 4)
    grown = [row for row in folder.metrics() if row["what"] == "growth"]
    asked = grown[-1]["accuracy_before"]
    assert asked[0] is None and None not in asked[1:] and len(asked) == grown[-1]["task"] + 1 > 1
    assert grown[-1]["shock"] is not None
    text = write_page([folder.path], tmp_path / "page.html").read_text().replace("\n", " ")
    assert "over the 3 tasks that could be evaluated" in text and "Data of old were missing" in text
    learn_named(replace(SETTINGS, tasks=("digits",)), Invocation(tmp_path / "other"))
    text = write_page([folder.path, tmp_path / "other"], tmp_path / "both.html").read_text()
    assert "quality cannot be compared" in text


def dots(folder: Path) -> Path:
    """Thirty pictures to learn from, and as many to test on."""
    for half in ("train", "test"):
        for label in "0123456789":
            (folder / half / label).mkdir(parents=True)
            for i in range(3):
                Image.new("L", (8, 8), int(label) * 25 + i).save(folder / half / label / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        (
            {"method": "naive", "method_settings": {"keep": "data"}},
            "digits",
            "naive learns from all examples, and those",
        ),
        ({}, "old", "no data '.*old'"),
        ({"stopped": True}, "digits", "old is not over, and its data are not there"),
        ({"sequence": None}, "digits", "this run did not note what its tasks were like"),
    ],
)
def test_what_cannot_go_on_without_data_is_refused_and_stays_as_it_was(
    given: dict[str, Any], more: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = dots(tmp_path / "old")
    settings = replace(
        SETTINGS, tasks=(str(old),), **{name: value for name, value in given.items() if name in SETTINGS.__dict__}
    )
    if "stopped" in given:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(learning_run, "write_checkpoint", stopping)
            learn_named(settings, Invocation(tmp_path / "run"))
    else:
        learn_named(settings, Invocation(tmp_path / "run"))
    told = next((tmp_path / "run").rglob("run.json"))  # of a stopped run it lies in its working area
    if "sequence" in given:
        told.write_text(json.dumps({n: v for n, v in json.loads(told.read_text()).items() if n != "sequence"}))
    before = told.read_bytes()
    shutil.rmtree(old)
    with pytest.raises(SourceError, match=message):
        extend(Invocation(tmp_path / "run"), (str(old) if more == "old" else more,), without_old=True)
    assert told.read_bytes() == before


def stopping(*given: Any, **more: Any) -> None:
    write_checkpoint(*given, **more)
    raise KeyboardInterrupt


ONE = {"name": "old", "inputs": [1, 8, 8], "classes": [0, 1]}


@pytest.mark.parametrize(
    "sequence",
    [
        *([one] for one in (5, [], [{}], [ONE, ONE], [ONE | {"inputs": [4096] * 3}], [ONE | {"inputs": [0, 8, 8]}])),
        *([[ONE | more]] for more in ({"classes": []}, {"classes": [0, "1"]}, {"classes": [-1]}, {"name": 3})),
    ],
)
def test_what_a_file_says_of_tasks_that_are_gone_is_checked(sequence: Any, tmp_path: Path) -> None:
    specs = TaskSpecs((str(tmp_path / "old"),))
    with pytest.raises(StoreError, match=r"run\.json tells of 1 tasks what cannot be"):
        read_tasks(specs, sequence)
    assert read_tasks(specs, [[ONE]])[0].gone


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data 'fashoin'"):
        learn_named(Settings(("permuted:fashoin:3",)), Invocation(tmp_path / "a"))
    with pytest.raises(ValueError, match="no small network 'mpl:3'"):
        learn_named(Settings(("digits",), model="mpl:3", epochs=1), Invocation(tmp_path / "b"))
    with pytest.raises(ValueError, match="did you mean 'sparsegrow'"):
        learn_named(Settings(("digits",), method="sparsgrow"), Invocation(tmp_path / "c"))
    with pytest.raises(StoreError, match="is not a run folder"):
        extend(Invocation(tmp_path), ("digits",))
