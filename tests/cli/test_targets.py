"""Targets, rounding and regular widths from the command line: met, told, and taken up again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.conftest import Run
from regrow import load
from regrow.jobs import pruning_inputs
from regrow.jobs.pruning_inputs import make_budget, read_pruning_settings
from regrow.settings.prune import Settings
from regrow.settings.words import format_command_line
from regrow.store import StoreError
from regrow.store.run_folder import RunFolder

SMALL = ("--tokens", "512", "--eval-tokens", "128", "--seq-len", "64")


def told(folder: str) -> dict[str, Any]:
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["what"] == "budget")


def test_parameters_are_all_parameters(regrow: Run) -> None:
    code, out, err = regrow(
        "prune", "toys:classifier", "--method", "magnitude", "--target", "params=1.5k", "--round", "4", "--out", "run"
    )
    assert code == 0, err
    import toys

    model = load("run", model=lambda: toys.classifier()[0])
    left = sum(p.numel() for p in model.parameters())
    assert told("run")["after"] == left <= 1500 and model.body[0].out_channels % 4 == 0
    assert f"{left:,}" in out and "allowed at most 1,500" in out
    assert "allowed at most 1,500" in Path("run/report.html").read_text()
    run = json.loads(Path("run/run.json").read_text())
    assert "--target params=1.5k" in run["command"]
    words = ("prune", "toys:classifier", "--method", "magnitude", "--smaller", "30%")
    assert regrow(*words, "--out", "smaller")[0] == 0
    row, recorded = told("smaller"), json.loads(Path("smaller/run.json").read_text())
    assert row["measure"] == "params" and 0.65 < row["after"] / row["before"] <= 0.7
    assert recorded["settings"]["target"] == "params=70%" and "--target params=70%" in recorded["command"]
    assert "params=70%" in Path("smaller/report.html").read_text()


def test_a_cache_target_leaves_a_regular_model(regrow: Run, tiny_language_model: Path) -> None:
    words = ("prune", str(tiny_language_model), "--source", "manual", *SMALL, "--regular")
    code, _, err = regrow(*words, "--target", "kv_cache=10K@64", "--out", "cache")
    assert code == 0, err
    assert "key-value cache at 64 tokens" in Path("cache/report.html").read_text()
    model = load("cache")
    with torch.no_grad():
        layers = model(torch.arange(64)[None], use_cache=True).past_key_values.layers
    held = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    assert held == told("cache")["after"] <= 10_000 < told("cache")["before"] == 2 * held
    code, _, err = regrow(*words, "--keep", "0.6", "--round", "8", "--out", "widths")
    assert code == 0, err
    (wide,) = {layer.mlp.up_proj.out_features for layer in load("widths").model.layers}
    assert wide % 8 == 0 and wide < 40
    assert "--regular" in json.loads(Path("widths/run.json").read_text())["command"]
    assert regrow("report", "cache", "widths", "--out", "both.html")[0] == 0


def test_times_are_measured_once_for_a_run(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("prune", str(tiny_language_model), "--source", "manual", *SMALL, "--target", "ms=100%")
    real = pruning_inputs.collect_evidence
    monkeypatch.setattr(
        pruning_inputs, "collect_evidence", lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    code, _, err = regrow(*words, "--out", "run")
    assert code == 130, err
    begun = RunFolder.open_unfinished("run")
    assert begun is not None
    first = begun.read_record()["timing"]
    assert set(first["names"].values()) == set(first["curves"]) and len(first["names"]) == 4
    monkeypatch.setattr(pruning_inputs, "collect_evidence", real)
    code, out, err = regrow(*words, "--out", "run")
    assert code == 0, err
    assert RunFolder.open("run").read_record()["timing"] == first
    row = told("run")
    assert row["predicted"] <= row["asked"] == row["before"] and row["after"] > 0
    assert "predicted" in out


def test_recorded_settings_are_read_and_gone_on_with() -> None:
    settings = Settings("m", keep=0.7, sources=("news",))
    recorded = json.loads(json.dumps(asdict(settings)))
    with pytest.raises(StoreError, match="'something' is unknown here; use the version"):
        read_pruning_settings(recorded | {"something": 1})
    with pytest.raises(StoreError, match="settings: 'regular' is missing; use the version"):
        read_pruning_settings({name: value for name, value in recorded.items() if name != "regular"})
    assert read_pruning_settings(recorded) == settings
    budget = make_budget(settings)
    assert budget.target is None and not budget.regular and budget.keep == 0.7
    new = Settings("m", target="kv_cache=5M@64", regular=True, round_to=8)
    assert read_pruning_settings(json.loads(json.dumps(asdict(new)))) == new
    again = "regrow prune m --target kv_cache=5M@64 --regular --round 8 --out o"
    assert format_command_line(new, "--out", "o") == again
    assert make_budget(new).measure == "kv_cache" and new.keep is None


OWN = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 10)
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
"""


def test_an_input_is_that_of_the_source_as_told_or_a_guess_that_is_printed(regrow: Run) -> None:
    Path("own_small.py").write_text(OWN)
    guess = "example input: 1x1x224x224 (guessed; set it with --input 1x3x32x32 or example=, or give an image source)\n"
    code, out, err = regrow("show", "own_small:net")
    assert code == 0 and guess in err and "an input of 1x1x224x224" in out
    code, out, err = regrow("show", "own_small:net", "--input", "1x1x8x8")
    assert code == 0 and "example input" not in err and "an input of 1x1x8x8" in out
    words = (
        "prune",
        "own_small:net",
        "--method",
        "magnitude",
        "--source",
        "digits",
        "--tokens",
        "32",
        "--eval-tokens",
        "32",
    )
    code, _, err = regrow(*words, "--target", "macs=3k", "--out", "run")
    assert code == 0 and "example input" not in err, err
    assert told("run")["before"] == 8 * 8 * 8 * 9 + 80 and told("run")["after"] <= 3000
    assert RunFolder.open("run").read_record()["input"] == "1x1x8x8"
    code, _, err = regrow("evaluate", "run", "--code", "own_small:net")
    assert code == 0 and "example input" not in err
    code, _, err = regrow(*words, "--target", "macs=9k", "--input", "1x1x16x16", "--out", "larger")
    assert code == 0 and told("larger")["before"] == 16 * 16 * 8 * 9 + 80, err
    assert "--input 1x1x16x16" in RunFolder.open("larger").read_record()["command"]
    code, _, err = regrow("show", "own_small:net", "--input", "8,8")
    assert code == 2 and "like 1x3x32x32; got '8,8'" in err
