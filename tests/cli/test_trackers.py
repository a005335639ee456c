"""``--track``: rows of measurements also go to a tracker, here that of TensorBoard with a writer of ours."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cli.conftest import Run
from regrow.core.errors import ResourceError
from regrow.jobs.trackers import tracking
from regrow.store.run_folder import RunFolder

LEARN = ("learn", "digits", "--model", "mlp:8", "--method", "naive", "--epochs", "1", "--train", "64", "--test", "64")


class Writer:
    """Stands for TensorBoard's SummaryWriter, which may not be installed."""

    scalars: dict[str, list[tuple[Any, int | None]]]

    def __init__(self, folder: str) -> None:
        Writer.folder, Writer.scalars, Writer.closed = folder, {}, False

    def add_scalar(self, name: str, value: float, global_step: int | None = None) -> None:
        self.scalars.setdefault(name, []).append((value, global_step))

    def add_hparams(self, values: dict[str, Any], metric_dict: dict[str, Any]) -> None:
        Writer.settings = values

    def flush(self) -> None: ...

    def close(self) -> None:
        Writer.closed = True


def test_rows_go_to_tensorboard(regrow: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "packages" / "tensorboard").mkdir(parents=True)
    (tmp_path / "packages" / "tensorboard" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "packages")
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    code, _, err = regrow(*LEARN, "--out", "runs/small", "--track", "tensorboard")
    assert code == 0, err
    row = RunFolder.open("runs/small").last("task")
    assert Writer.scalars["task/parameters"] == [(row["parameters"], 0)]
    assert Writer.scalars["task/accuracy/0"] == [(row["accuracy"][0], 0)]
    assert Path(Writer.folder) == tmp_path / "runs" / "tensorboard" / "small" and Writer.closed
    assert Writer.settings["method"] == "naive"


def test_a_tracker_that_is_missing_or_unknown_is_refused_first(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.jobs.trackers.find_spec", lambda name: None if name == "wandb" else ModuleType(name))
    monkeypatch.setattr("regrow.jobs.learn.run", lambda *inputs, **more: pytest.fail("it ran"))
    for name, says, wanted in (("wandb", "pip install 'regrow[wandb]'", 4), ("paper", "one of tensorboard, mlflow", 2)):
        code, _, err = regrow(*LEARN, "--out", "run", "--track", name)
        assert code == wanted and says in err and err.count("\n") == 1, err


class Ids:
    """Stands for accelerate's MLflow tracker; fails as often as ``fails`` says."""

    fails = ""

    def __init__(self, project: str, run_name: str, run_id: str | None = None) -> None:
        Ids.run_id, self.sent = run_id, 0

    def start(self) -> None:
        if "start" in self.fails:
            raise OSError("no server\nat all")
        self.tracker = SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    def log(self, values: dict[str, float], step: int | None) -> None:
        self.sent += 1
        assert self.sent == 1 or "log" not in self.fails, "sent after a failure"
        if "log" in self.fails:
            raise OSError("connection lost")

    def finish(self) -> None:
        if "finish" in self.fails:
            raise OSError("not closed")


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> type[Ids]:
    monkeypatch.setattr("regrow.jobs.trackers.find_spec", ModuleType)
    monkeypatch.setattr("accelerate.tracking.MLflowTracker", Ids)
    monkeypatch.setattr(Ids, "fails", "")
    return Ids


def test_a_resumed_run_goes_on_in_the_run_of_the_tracker(mlflow: type[Ids], tmp_path: Path) -> None:
    from accelerate import PartialState

    for known in (None, "abc"):
        with tracking(RunFolder.create(tmp_path / "run", verb="learn", settings={}), "mlflow"):
            assert Ids.run_id == known
        assert not PartialState._shared_state


def test_a_tracker_that_fails_stops_no_run(mlflow: type[Ids], tmp_path: Path) -> None:
    begin = partial(RunFolder.create, tmp_path / "run", verb="learn", settings={})
    mlflow.fails = "start"
    with (
        pytest.raises(ResourceError, match=r"mlflow cannot start \(no server"),
        tracking(begin(), "mlflow"),
    ):
        pytest.fail("it ran")
    mlflow.fails = "log finish"
    with pytest.warns(UserWarning, match="connection lost") as seen, tracking(begin(), "mlflow") as folder:
        for epoch in range(3):
            folder.log("epoch", epoch=epoch)
        assert len(folder.metrics()) == 3
    assert len(seen) == 1
    mlflow.fails = "finish"
    with pytest.warns(UserWarning, match="not closed"), pytest.raises(KeyError), tracking(begin(), "mlflow"):
        raise KeyError("of the run")
