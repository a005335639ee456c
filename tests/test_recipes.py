"""Recipes: what is committed prints its tables, and what a recipe builds on is still there."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from regrow.data.streams import digits_task, fewer, permuted

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(
    ("words", "arm"),
    [
        ("sparsegrow_tables.py main --show", "| SparseGrow, never grown, final size |"),
        ("sparsegrow_twins.py --show", "| layer expansion, SparseGrow |"),
        ("mgas_tables.py --show", "| MGAS (reconstructed) |"),
        ("mgas_choice.py --show", "| mgas floor=1 press=0.05 pace=0.25 |"),
        ("bench201_search.py --show", "| MGAS (reconstructed), operations |"),
        ("recovery_table.py --out results/recovery.jsonl --table", "| refit |"),
        ("smollm2_methods_table.py --out results/smollm2_methods.jsonl --table", "| flap |"),
        ("gprune_show.py main results/gprune.jsonl", "| gprune flap mlp |"),
    ],
)
def test_what_is_committed_prints_its_table(words: str, arm: str) -> None:
    said = subprocess.run([sys.executable, *words.split()], cwd=RECIPES, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr[-2000:]
    assert arm in said.stdout


@pytest.mark.parametrize("gate", ["kronecker", "none"])
def test_twins_part_and_learn_on(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of growing goes through the rest of a task and the next one."""
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("sparsegrow_twins")
    rows = recipe.twins(permuted(fewer(digits_task(), 200, 80), 3), at=1, seed=0, gate=gate)
    assert [row["twin"] for row in rows] == [*recipe.WIDE, *recipe.OTHER]
    plain, *grown = (row["parameters"] for row in rows)
    assert min(grown) > plain
