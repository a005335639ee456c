"""Recipes: what is committed prints its tables, and what a recipe builds on is still there."""

import importlib
import runpy
from itertools import pairwise
from pathlib import Path

import pytest

from regrow.data.streams import digits_task, fewer, permuted_tasks

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "words", "arm"),
    [
        ("sparsegrow", "sparsegrow_tables.py main --show", "| SparseGrow, never grown, final size |"),
        ("sparsegrow", "sparsegrow_tables.py ablation --show", "| no gate |"),
        ("sparsegrow", "sparsegrow_twins.py --show", "| layer expansion, SparseGrow |"),
        ("mgas", "mgas_tables.py --show", "| MGAS (reconstructed) |"),
        ("mgas", "mgas_choice.py --show", "| mgas min_cost=1 sparsity_penalty=0.05 filter_lr_ratio=0.25 |"),
        ("mgas", "bench201_search.py --show", "| MGAS (reconstructed), operations |"),
        ("baselines", "recovery_table.py --out results/recovery.jsonl --table", "| refit |"),
        ("baselines", "smollm2_methods_table.py --out results/smollm2_methods.jsonl --table", "| flap |"),
        ("gprune", "gprune_show.py main results/gprune.jsonl", "| gprune flap mlp |"),
        ("gprune", "gprune_show.py ablation results/gprune.jsonl", "| full ‡ |"),
    ],
)
def test_pages_hold_the_tables_of_the_committed_rows(
    page: str, words: str, arm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(RECIPES)
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setattr("sys.argv", words.split())
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # it would hold for the tests that follow
    try:
        runpy.run_path(words.split()[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code
    printed = capsys.readouterr().out
    assert arm in printed
    there = set((RECIPES.parent / "docs" / "reproductions" / f"{page}.md").read_text("utf-8").splitlines())
    assert not [line for line in printed.splitlines() if line.startswith("|") and line not in there]


def test_the_page_of_run_folders_has_the_life_cycles_and_they_went_back_to_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("life_cycles")
    page = (RECIPES.parent / "docs" / "run-folders.md").read_text("utf-8").splitlines()
    assert not [line for line in "\n".join(recipe.show(recipe.OUT)).splitlines() if line not in page]
    for row in (row for row in recipe.rows(recipe.OUT) if row["stage"] == "checks"):
        stages = [*recipe.CYCLES[row["cycle"]].stages]
        assert [one["name"] for one in row["history"]] == stages and row["snapshots"] == len(stages)
        assert row["replay"]["tensors"] and not row["replay"]["differ"]
        back = row["undo"]
        assert back["tensors"] == back["same_type"] == back["equal_bits"] and not back["largest"] and not back["others"]
        assert all(one["ok"] for one in row["verify"].values())


def test_under_the_gate_no_growth_is_shown_that_trained_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches and layers that are added have no factors: their rows under the gate do not measure growth."""
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("sparsegrow_twins")
    tables = "\n".join(recipe.shown(recipe.rows(recipe.OUT))).split("\n\n")
    gated = [table for title, table in pairwise(tables) if "under the gate" in title]
    assert len(gated) == 2
    assert not [arm for arm in recipe.OTHER for table in gated if arm in table]


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["kronecker", "none"])
def test_twins_part_and_learn_on(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of growing goes through the rest of a task and the next one."""
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("sparsegrow_twins")
    rows = recipe.twins(permuted_tasks(fewer(digits_task(), 200, 80), 3), at=1, seed=0, gate=gate)
    assert [row["twin"] for row in rows] == [*recipe.WIDE, *recipe.OTHER]
    plain, *grown = (row["parameters"] for row in rows)
    assert min(grown) > plain
