"""``out=``: calls from Python write run folders that resume, and that every command takes."""

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regrow
from regrow.api.call import Call
from regrow.api.inputs import Inputs
from regrow.core.errors import InputError
from regrow.nets import Loaded, Origin
from regrow.store.errors import StoreError
from regrow.store.metrics import Metrics
from regrow.store.run_folder import RunFolder

INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
DATA = (INPUTS, torch.arange(64) % 3)
CODE = "import torch\nfrom torch import nn\n\n\ndef tiny():\n    return nn.Sequential({layers}), torch.ones(1, 6)\n"
LAYERS = "nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)"


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ownnets.py").write_text(CODE.format(layers=LAYERS))
    return tmp_path


def test_each_call_writes_a_run_that_commands_take(capsys: pytest.CaptureFixture[str]) -> None:
    model, dense = net(), net()
    plain, wanted = regrow.prune(net(), DATA, method="llm_pruner", keep=0.5)
    _, plan = regrow.prune(model, DATA, method="llm_pruner", keep=0.5, out="pruned")
    assert plan == wanted and all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))
    regrow.recover(model, dense, plan, INPUTS, by="refit", batch_size=16, out="recovered")
    regrow.grow(model, mlp="+4", data=DATA, steps=2, out="grown")
    regrow.learn(model, [(DATA, DATA)], method="naive", epochs=1, out="learned")
    widths = {"pruned": 8, "recovered": 8, "grown": 12, "learned": 12}
    for name, width in widths.items():
        folder = RunFolder.open(name)
        assert (
            folder.read_record()["verb"] in f"{name}|prune|grow|learn|recover"
            and (folder.path / "report.html").is_file()
        )
        loaded = regrow.load(name, model=net)
        assert loaded[0].out_features == width
    assert torch.equal(regrow.load("learned", model=net)(INPUTS), model(INPUTS))
    assert torch.equal(regrow.load("pruned/before", model=net)(INPUTS), dense(INPUTS))
    from regrow.cli import main

    for words, code in (
        (("show", "pruned", "--code", "ownnets:tiny"), 0),
        (("show", "grown", "--code", "ownnets:tiny"), 0),
        (("evaluate", "learned", "--code", "ownnets:tiny"), 0),
        (("prune", "grown", "--code", "ownnets:tiny", "--method", "magnitude", "--keep", "0.5", "--out", "again"), 0),
        (("recover", "pruned", "--by", "refit", "--code", "ownnets:tiny", "--out", "other"), 2),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr("sys.argv", ["regrow", *words])
            main()
        output = capsys.readouterr()
        assert (stop.value.code or 0) == code, output.err
    assert "call that again" in output.err


def test_a_killed_call_resumes_to_the_same_bits() -> None:
    tasks = [(DATA, DATA), ((INPUTS.flip(1), DATA[1]), DATA)]
    call = {"method": "ewc", "epochs": 2, "batch_size": 16}
    whole = regrow.learn(net(), tasks, **call)

    def stop(done: int, total: int, text: str) -> None:
        if done >= total * 0.8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regrow.learn(net(), tasks, **call, out="run", progress=stop)
    with pytest.raises(StoreError, match="is not finished"):
        RunFolder.open("run")
    with pytest.raises(StoreError, match="weights was"):
        regrow.learn(net(1), tasks, **call, out="run")
    steps: list[int] = []
    model = net()
    resumed = regrow.learn(
        model, tasks, **call, out="run", progress=lambda done, total, _: steps.extend([done] * (total > 1))
    )
    assert min(steps) > 2, "it began where it was killed"
    assert resumed.scores == whole.scores
    for one in (model, regrow.load("run", model=net)):
        assert all(map(torch.equal, one.state_dict().values(), whole.model.state_dict().values()))
    assert [row["task"] for row in RunFolder.open("run").metrics() if row["what"] == "task"] == [0, 1]
    with pytest.raises(StoreError, match="finished"):
        regrow.learn(net(), tasks, **call, out="run")


def test_a_killed_plan_goes_on_from_what_was_learned() -> None:
    data = {name: [(INPUTS.roll(i, 0), DATA[1])] * 4 for i, name in enumerate("abc")}
    call = {"method": "gprune", "keep": 0.7, "settings": {"steps": 6, "every": 2, "shards": 2}}
    _, whole = regrow.prune(net(), data, **call)

    def stop(done: int, total: int, text: str) -> None:
        if text.startswith("learning") and done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regrow.prune(net(), data, **call, out="run", progress=stop)
    steps: list[int] = []

    def note(done: int, total: int, text: str) -> None:
        if text.startswith("learning"):
            steps.append(done)

    _, plan = regrow.prune(net(), data, **call, out="run", progress=note)
    assert min(steps) > 1, "it began where it was killed"
    assert plan.changes == whole.changes


def test_what_cannot_be_resumed_is_refused_and_writes_nothing(here: Path) -> None:
    once = iter([DATA])
    for call in (
        lambda: regrow.prune(net(), once, out="run"),
        lambda: regrow.learn(net(), iter([(DATA, DATA)]), method="naive", out="run"),
        lambda: regrow.learn(net(), [(once, DATA)], method="naive", out="run"),
    ):
        with pytest.raises(InputError, match="can be read only once"):
            call()
    regrow.prune(copy.deepcopy(net()), DATA, keep=0.5)
    assert [path.name for path in here.iterdir()] == ["ownnets.py"]


def test_scores_that_are_no_shares_are_kept_beside_the_accuracy() -> None:
    data = (INPUTS, INPUTS[:, :3])
    learned = regrow.learn(net(), [(data, data)], method="naive", epochs=1, out="run")
    row = RunFolder.open("run").last("task")
    assert row["accuracy"] == [None] and row["scores"] == list(learned.scores.rows[0])


def test_progress_is_shown_where_someone_sees_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    regrow.learn(net(), [(DATA, DATA)], method="naive", epochs=1, out="unseen")
    assert not capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    regrow.learn(net(), [(DATA, DATA)], method="naive", epochs=1)
    assert not capsys.readouterr().err
    regrow.learn(net(), [(DATA, DATA)], method="naive", epochs=1, out="seen")
    assert "task-1" in capsys.readouterr().err


def test_a_killed_search_resumes_to_the_same_bits_in_a_run_that_commands_take() -> None:
    call = {"smaller": "40%", "epochs": 4, "batch_size": 16, "lr": 0.05}
    whole = regrow.search(net(), DATA, **call)

    def stop(done: int, total: int, text: str) -> None:
        if done > total * 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regrow.search(net(), DATA, **call, out="found", progress=stop)
    result = regrow.search(net(), DATA, **call, out="found")
    assert result.score == whole.score and result.plans == whole.plans
    folder, loaded = RunFolder.open("found"), regrow.load("found", model=net)
    for one in (result.model, loaded):
        assert all(map(torch.equal, one.state_dict().values(), whole.model.state_dict().values()))
    assert folder.last("found")["accuracy"] == result.score and folder.ledger.plans() == result.plans
    assert [row["epoch"] for row in folder.metrics() if row["what"] == "epoch"] == [1, 2, 3, 4]
    assert (folder.path / "report.html").is_file()
    data = (INPUTS, INPUTS[:, :3])
    regrow.search(
        net(), data, **{**call, "method": "blind", "settings": {"what": "filters"}, "epochs": 0}, out="values"
    )
    assert RunFolder.open("values").last("result")["metric"] == "negative squared error"


def interrupt(done: int, total: int, text: str) -> None:
    if text not in ("loading", "preparing", "learning", "recovering"):  # names of stages, as they begin
        raise KeyboardInterrupt


def test_another_call_is_not_resumed() -> None:
    tasks, call = [(DATA, DATA)], {"method": "naive", "epochs": 1, "out": "run"}
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.8)
    given = {"optimizer": sgd, "loss": "classification"}
    with pytest.raises(KeyboardInterrupt):
        regrow.learn(net(), tasks, **call, **given, progress=interrupt)
    other = [(DATA, (INPUTS.flip(0), DATA[1]))]
    for more, says in (
        (
            {"optimizer": partial(torch.optim.SGD, lr=0.2, momentum=0.8)},
            r"optimizer was functools.partial\(<class .*SGD'>, lr=0.1, momentum=0.8\)",
        ),
        ({"loss": lambda output, labels: output.sum()}, "loss was classification, here <function"),
        ({"tasks": other}, r"data task-1 \(test\) was .* shuffle=False"),
    ):
        with pytest.raises(StoreError, match=says):
            regrow.learn(net(), **{"tasks": tasks, **given, **more}, **call)
    regrow.learn(net(), tasks, **call, **given)


def test_a_recovery_is_not_resumed_with_another_plan_or_loss() -> None:
    model, dense = net(), net()
    _, plan = regrow.prune(model, DATA, method="llm_pruner", keep=0.5)
    kept = {key: range(8) for key in plan.changes}
    other = regrow.Plan.keeping(regrow.trace(dense, INPUTS), kept)
    call = {"by": "distil", "batch_size": 16, "out": "run"}
    with pytest.raises(KeyboardInterrupt):
        regrow.recover(model, dense, plan, DATA, **call, progress=interrupt)
    for given, more, says in ((other, {}, "plan was"), (plan, {"loss": nn.L1Loss()}, "loss was")):
        with pytest.raises(StoreError, match=says):
            regrow.recover(model, dense, given, DATA, **call, **more)


@pytest.mark.parametrize("own", [True, False])
def test_a_folder_changes_no_result_of_a_loader_that_shuffles(own: bool) -> None:
    plans, weights, states = [], [], []
    for out in (None, "run"):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(3) if own else None
        loader = DataLoader(TensorDataset(*DATA), 16, shuffle=True, generator=generator)
        plans.append(regrow.prune(net(5), loader, method="llm_pruner", keep=0.5, out=out)[1])
        grown, _ = regrow.grow(net(5), mlp="+4", data=loader, steps=2, out=out and f"{out}-grown")
        weights.append(grown[0].weight.tolist())
        states.append(next(iter(loader))[1].tolist())
    assert plans[0] == plans[1] and weights[0] == weights[1] and states[0] == states[1]


def test_a_score_that_is_no_share_is_written_once(here: Path) -> None:
    row = {"what": "result", "metric": "negative loss", "score": -1.5, "parameters": 9, "nonzero": 9}
    assert [Metrics(here / "metrics.jsonl").add(row) for _ in range(2)] == [True, False]


def test_two_examples_of_named_inputs_are_kept() -> None:
    data = {"input_ids": torch.arange(24).reshape(6, 4), "attention_mask": torch.ones(6, 4)}
    kept = Inputs(Loaded(net(), None, regrow.Example((), data), Origin("callable", ""))).for_saving().example.kwargs
    assert {name: value.tolist() for name, value in kept.items()} == {n: v[:2].tolist() for n, v in data.items()}


@pytest.mark.parametrize(("edges", "rows"), [(None, 2), (torch.eye(6), 6)])  # a graph has all its nodes
def test_a_network_is_traced_with_two_rows_of_its_data(edges: torch.Tensor | None, rows: int) -> None:
    class Net(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x if edges is None else edges @ x)

    loader = DataLoader(TensorDataset(torch.randn(6, 4), torch.arange(6) % 2), 6)
    inputs = Call(Net(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), loader).read().with_two_rows()
    assert inputs.loaded.example.args[0].shape == (rows, 4)


@pytest.mark.parametrize("out", [None, "run"])
def test_warnings_point_to_the_call(out: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow.jobs import grow, prune

    note, widen, measure = ("beware",), grow.plan_growth, prune.calibrate
    monkeypatch.setattr(grow, "plan_growth", lambda *args: (widen(*args)[0], note))

    def calibrate(*args: Any, **options: Any) -> tuple[Any, str]:
        evidence, key = measure(*args, **options)
        return replace(evidence, notes=note), key

    monkeypatch.setattr(prune, "calibrate", calibrate)
    for call in (partial(regrow.grow, mlp="+4", example=INPUTS), partial(regrow.prune, data=INPUTS, keep=0.5)):
        with pytest.warns(UserWarning, match="beware") as seen:
            call(net(), out=out and f"{out}-{call.func.__name__}")
        assert seen[0].filename == __file__


def quality(name: str) -> list[tuple[str, str, float]]:
    rows = [row for row in RunFolder.open(name).metrics() if row["what"] == "choice"]
    return [(row["model"], row["task"], row["acc"]) for row in rows]


def test_folders_have_the_check_and_the_quality_before_and_after() -> None:
    torch.manual_seed(5)
    loader = DataLoader(TensorDataset(*DATA), 16, shuffle=True)
    pruned, _ = regrow.prune(net(), loader, keep=0.5, out="pruned")
    score = regrow.evaluate(pruned, DATA)["data"].score
    assert [row[:2] for row in quality("pruned")] == [("dense", "data"), ("pruned", "data")]
    assert quality("pruned")[1][2] == pytest.approx(score)
    regrow.grow(net(), mlp="+4", example=INPUTS, validation={"held out": DATA}, out="grown")
    assert [row[:2] for row in quality("grown")] == [("before", "held out"), ("after", "held out")]
    for name in ("pruned", "grown"):
        (row,) = [row for row in RunFolder.open(name).metrics() if row["what"] == "verify"]
        assert row["ok"] and row["dtype"] == "float64"
    times = RunFolder.open("pruned").last("latency")
    assert times["whole"] > 0 and times["found"] > 0 and times["device"] == "cpu"


def test_labels_that_do_not_fit_are_left_out_unless_they_are_for_validation() -> None:
    wrong = (INPUTS, DATA[1] + 5)
    with pytest.warns(UserWarning, match="quality of the network is not measured: .*class"):
        regrow.prune(net(), wrong, keep=0.5, out="run")
    assert quality("run") == []
    with pytest.raises(ValueError, match="class 7"):
        regrow.prune(net(), DATA, validation=wrong, keep=0.5, out="other")
