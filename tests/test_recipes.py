"""Recipes: what is committed prints its tables, and what a recipe builds on is still there."""

import importlib
import json
import runpy
from pathlib import Path

import pytest

from regrow.data import SourceError
from regrow.data.streams import load_digits, permuted_tasks, sample_task

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(
    ("page", "words", "arm"),
    [
        ("sparsegrow", "sparsegrow_tables.py main --show", "| SparseGrow, never grown, final size |"),
        ("sparsegrow", "sparsegrow_tables.py grid --show --first 100", "| Laplace 0.5 |"),
        ("sparsegrow", "sparsegrow_tables.py growth --show --against grown", "| grown from 20 |"),
        ("sparsegrow", "sparsegrow_tables.py ablation --show", "| new units dense |"),
        ("sparsegrow", "sparsegrow_tables.py shift --show", "| PackNet, task named |"),
        ("sparsegrow", "sparsegrow_twins.py --show", "| layer expansion, SparseGrow |"),
        ("mgas", "search_tables.py --show", "| params=25% | trials |"),
        ("baselines", "recovery_table.py --show", "| refit |"),
        ("gprune", "rank_variation.py --show", "| wifv | key-value groups, pooled |"),
        ("baselines", "equal_terms.py --show", "| llm_pruner |"),
        ("baselines", "recovery_curve.py --show", "| fisher | 0.8 |"),
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
    page = (RECIPES.parent / "docs" / "reproductions" / "life-cycles.md").read_text("utf-8").splitlines()
    assert not [line for line in "\n".join(recipe.show(recipe.OUT)).splitlines() if line not in page]
    for row in (row for row in recipe.rows(recipe.OUT) if row["stage"] == "checks"):
        stages = [*recipe.CYCLES[row["cycle"]].stages]
        assert [one["name"] for one in row["history"]] == stages and row["snapshots"] == len(stages)
        assert row["replay"]["tensors"] and not row["replay"]["differ"]
        back = row["undo"]
        assert back["tensors"] == back["same_type"] == back["equal_bits"] and not back["largest"] and not back["others"]
        assert all(one["ok"] for one in row["verify"].values())


def test_twins_part_and_learn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of growing goes through the rest of a task and the next one."""
    monkeypatch.syspath_prepend(str(RECIPES))
    recipe = importlib.import_module("sparsegrow_twins")
    rows = recipe.twins(permuted_tasks(sample_task(load_digits(), 200, 80), 3), at=1, seed=0)
    assert [row["twin"] for row in rows] == [*recipe.WIDE, *recipe.OTHER]
    plain, *grown = (row["parameters"] for row in rows)
    assert min(grown) > plain


def test_fetched_corpora_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files in the form of the real ones."""
    monkeypatch.syspath_prepend(str(RECIPES))
    corpora = importlib.import_module("corpora")
    squad = {"data": [{"paragraphs": [{"context": "one"}, {"context": "one"}, {"context": "two"}]}]}
    talk = {"examples": [{"input": "agent_A: Hi agent_B: Hello"}]}
    files = {
        corpora.wiki: (json.dumps(squad), ("one", "two")),
        corpora.dialogue: (json.dumps(talk), ("A: Hi \nB: Hello",)),
        corpora.legal: (json.dumps({"MIT": {"licenseText": "free"}}), ("free",)),
        corpora.prose: ("Call me Ishmael.\n\n" + "x" * 3000 + "\n\nThe end.", None),
    }
    for reader, (content, documents) in files.items():
        path = tmp_path / f"{reader.__name__}.json"
        path.write_text(content)
        found = reader(path).documents
        assert found == documents if documents else len(found) == 2
        path.write_bytes(b"\xff{")
        with pytest.raises(SourceError, match=r"fetch it again"):
            reader(path)
        with pytest.raises(SourceError, match=r"does not exist; check the path"):
            reader(tmp_path / "gone")
