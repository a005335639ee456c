"""``regrow grid``: a run per cell, a row per cell, and what its exit code says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GRID = """
base: {method: magnitude, keep: 0.6, tokens: 64, eval_tokens: 64, no_verify: true}
grid:
  source: [digits, mine=pictures]
"""


@pytest.mark.slow
def test_a_grid_goes_on_past_a_failure_and_is_resumed(regrow, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"), prepend=":")
    (tmp_path / "toys.py").write_text((Path(__file__).parent / "toys.py").read_text())
    (tmp_path / "grid.yaml").write_text(GRID)
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(40):
            (tmp_path / "pictures" / name / f"{i}.png").write_bytes(b"no picture")
    words = ("grid", "grid.yaml", "--model", "toys:classifier", "--jobs", "2", "--out", "G")
    code, out, err = regrow(*words)
    rows = [json.loads(line) for line in Path("G/grid.jsonl").read_text().splitlines()]
    assert code == 1 and [row["state"] for row in rows] == ["finished", "failed"]
    assert "2 cells: 1 finished, 1 failed" in out and "toys:classifier (named on the command line)" in err
    assert rows[1]["error"].startswith("pictures") and rows[1]["error"] in " ".join(err.split())
    shown = np.random.default_rng(0)
    for path in Path("pictures").rglob("*.png"):
        Image.fromarray(shown.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    code, out, _ = regrow(*words)
    again = [json.loads(line) for line in Path("G/grid.jsonl").read_text().splitlines()]
    assert code == 0 and "2 finished, 0 failed" in out and again[0] == rows[0]
    assert regrow("evaluate", "G/source=digits", "--source", "nothing")[0] == 2


def test_mistakes_are_found_before_any_cell_runs(regrow, tmp_path: Path) -> None:
    cases = {
        "base: {keep: 0.5}\ngrid: {model: [resnet81]}": "grid.yaml: model=resnet81: ",
        "base: {keep: 0.5}\ngrid: {model: [resnet18], method: [flop]}": "did you mean 'flap'?",
        "base: {keep: 0.5}\ngrid: {model: [resnet18], source: [mine=nowhere]}": "nowhere does not exist",
    }
    for text, message in cases.items():
        (tmp_path / "grid.yaml").write_text(text)
        code, _, err = regrow("grid", "grid.yaml", "--out", "G")
        assert code == 2 and message in err and err.count("\n") == 1
    (tmp_path / "grid.yaml").write_text("base: {model: resnet18}\ngrid: {keep: [0.5]}")
    code, _, err = regrow("grid", "grid.yaml", "--memory", "4Gb!", "--out", "G")
    assert code == 2 and "--memory: an amount of bytes" in err
    assert not Path("G").exists()


def test_a_missing_package_is_told_before_anything_is_written(regrow, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "grid.yaml").write_text("base: {model: resnet18}\ngrid: {keep: [0.5]}")
    code, _, err = regrow("grid", "grid.yaml", "--on", "ray", "--out", "G")
    assert code == 4 and "pip install 'regrow[cluster]'" in err and not Path("G").exists()
