"""``--track``: rows of measurements also go to a tracker, here that of TensorBoard with a writer of ours."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cli.conftest import Run

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
    from regrow.run_folder import RunFolder

    row = RunFolder.open("runs/small").last("task")
    assert Writer.scalars["task/parameters"] == [(row["parameters"], 0)]
    assert Writer.scalars["task/accuracy/0"] == [(row["accuracy"][0], 0)]
    assert Path(Writer.folder) == tmp_path / "runs" / "tensorboard" / "small" and Writer.closed
    assert Writer.settings["method"] == "naive"


def test_a_tracker_that_is_missing_or_unknown_is_refused_first(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "regrow.commands.trackers.find_spec", lambda name: None if name == "wandb" else ModuleType(name)
    )
    monkeypatch.setattr("regrow.commands.learn.run", lambda *inputs, **more: pytest.fail("it ran"))
    for name, says, wanted in (("wandb", "pip install 'regrow[wandb]'", 4), ("paper", "one of tensorboard, mlflow", 2)):
        code, _, err = regrow(*LEARN, "--out", "run", "--track", name)
        assert code == wanted and says in err and err.count("\n") == 1, err
