"""Reconstruction in pruning runs: nearer to the dense network, resumable, recorded, and refused where it cannot be."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regrow
from regrow.core.errors import InputError
from regrow.jobs import pruning_inputs
from regrow.jobs import recover as recovery_run
from regrow.jobs.parents import undo_run
from regrow.jobs.prune import prune_named
from regrow.jobs.recording import Invocation
from regrow.reports import read_runs, to_html
from regrow.settings import recover
from regrow.settings.prune import Settings
from regrow.store.run_folder import RunFolder

PRUNING = Settings(
    "toys:classifier", method="magnitude", keep=0.5, sources=("digits",), tokens=256, eval_tokens=200, reconstruct=True
)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "cli"))


def weights(folder: RunFolder) -> bytes:
    return (folder.path / "model.safetensors").read_bytes()


def test_the_cut_is_checked_then_reconstructed_then_measured(tmp_path: Path) -> None:
    plain = prune_named(replace(PRUNING, reconstruct=False), Invocation(tmp_path / "plain"))
    folder = prune_named(PRUNING, Invocation(tmp_path / "run"))
    rows = folder.metrics()
    assert [row["what"] for row in rows] == [
        *("size", "choice", "verify"),
        *("size", "choice", "reconstruction", "size", "choice", "latency"),
    ]
    (row,) = (row for row in rows if row["what"] == "reconstruction")
    assert [layer["weight"] for layer in row["layers"]] == ["body.3.weight", "head.weight"]
    assert all(layer["after"] < layer["before"] and layer["ridge"] for layer in row["layers"])
    assert "one set of data" in row["note"] and row["tokens"] == 256
    assert "2 layers were fitted by least squares on 256 examples" in to_html(read_runs([folder.path]))
    assert "least squares" not in to_html(read_runs([plain.path]))
    accuracy = [[one["acc"] for one in of.metrics() if one["what"] == "choice"] for of in (plain, folder)]
    assert accuracy[1][0] == accuracy[0][0] and weights(folder) != weights(plain)
    record, taken = folder.read_record(), {"reconstruct choose_on": "left_out_source"}
    assert record["settings"]["reconstruct"] is True and record["defaults"].items() >= taken.items()
    assert not plain.read_record()["settings"]["reconstruct"] and "--reconstruct" in record["command"]
    settings = recover.Settings(str(folder.path), "refit", tokens=256)
    assert recovery_run.recover_named(settings, Invocation(tmp_path / "more", code=PRUNING.model)).read_record()[
        "finished"
    ]
    undone = [undo_run(one.path, tmp_path / f"{i}") / "model.safetensors" for i, one in enumerate((folder, plain))]
    assert undone[0].read_bytes() == undone[1].read_bytes()


@pytest.mark.parametrize("options", [{}, {"method": "fisher", "reconstruct": True}], ids=["default", "named"])
def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(pruning_inputs, "MOST_FITTED", 8 * 40)
    monkeypatch.setattr(pruning_inputs, "FEWEST_FITTED", 16)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
    data = torch.randn(320, 8), torch.randint(4, (320,))
    regrow.prune(net, data, keep=0.5, batch_size=16, out=tmp_path / "run", **options)
    rows = RunFolder.open(tmp_path / "run").metrics()
    assert [row["tokens"] for row in rows if row["what"] == "reconstruction"] == [48]


def test_a_reconstruction_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole, steps = prune_named(PRUNING, Invocation(tmp_path / "whole")), []

    def stopping(done: int, total: int, what: str) -> None:
        if what.startswith("refitting"):
            steps.append(total)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_named(PRUNING, Invocation(tmp_path / "stopped", progress=stopping))
    assert (tmp_path / "stopped" / ".work" / "statistics" / "reconstruction" / "000000.safetensors").exists()
    seen: list[str] = []
    stopped = prune_named(
        PRUNING, Invocation(tmp_path / "stopped", progress=lambda done, total, what: seen.append(what))
    )
    assert weights(stopped) == weights(whole)
    assert len([what for what in seen if what.startswith("refitting")]) == steps[0] - 1


def test_too_little_data_is_found_before_the_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are 0 batches; give more data"):
        prune_named(replace(PRUNING, sources=()), Invocation(tmp_path / "run"))
    few = replace(PRUNING, tokens=16)
    with pytest.raises(InputError, match="there are 1 batches"):
        prune_named(few, Invocation(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match="there are 1 batches"):
        regrow.prune(net, torch.randn(8, 4), method="magnitude", keep=0.5, reconstruct=True, batch_size=8)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_prune_reconstructs_in_python(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(12 * 36, 5)).eval()
    data = {name: torch.randn(96, 2, 8, 8) * scale for name, scale in (("a", 1.0), ("b", 2.0), ("c", 0.5))}
    other = torch.randn(64, 2, 8, 8)
    distances = []
    for given in (False, True):
        model, before = copy.deepcopy(net), copy.deepcopy(net.state_dict())
        more = {"out": tmp_path / "run"} if given else {}
        small, _ = regrow.prune(model, data, method="magnitude", keep=0.5, reconstruct=given, batch_size=32, **more)
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        with torch.no_grad():
            distances.append(float((small(other) - net(other)).square().mean()))
    assert distances[1] < 0.5 * distances[0]
    (row,) = (row for row in RunFolder.open(tmp_path / "run").metrics() if row["what"] == "reconstruction")
    assert row["choose_on"] == "left_out_source" and all("seen" in layer for layer in row["layers"])
    with pytest.raises(ValueError, match="fits on data"):
        regrow.prune(copy.deepcopy(net), method="magnitude", keep=0.5, example=other[:1], reconstruct=True)
