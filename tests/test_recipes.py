"""Recipes: what is committed prints its tables, and what a recipe builds on is still there."""

import importlib
import json
import runpy
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

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
        ("mgas", "mgas_tables.py --show", "| MGAS (reconstructed) |"),
        ("baselines", "recovery_table.py --show", "| refit |"),
        ("gprune", "rank_variation.py --show", "| wifv | key-value groups, pooled |"),
        ("baselines", "smollm2_methods_table.py --show", "| flap |"),
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


def _width_pruning_rows(points: ModuleType, loss: Callable[[object], float]) -> list[dict[str, object]]:
    """Rows of all points of the screen, and of the test that follows from it; domains differ by a constant."""
    rows: list[dict[str, object]] = []

    def add(some: Iterable[object]) -> None:
        there = {row["key"] for row in rows}
        for point in some:
            if point.key in there:
                continue
            names = [point.left_out] if point.left_out else [name for fold in points.FOLDS for name in fold]
            base, at = loss(point), points.FOLDS[0] + points.FOLDS[1]
            nll = {
                name: [at.index(name) + base * (1 + 0.1 * i) + 0.01 * point.sample for i in range(4)] for name in names
            }
            row = {
                **vars(point),
                "dtype": "bfloat16",
                "key": point.key,
                "nll": nll,
                "bits_per_byte": dict.fromkeys(names, 1.0),
            }
            rows.append({**row, "seconds": {"plan": 2.0}})

    add(points.screen_all((0.8,), (0, 1)))
    add(points.screen_finalists(rows, (0.8,), (0, 1)))
    add(points.test(rows, (0.8,), (0, 1), 2))
    add(points.stages((0.8,), (0, 1), 2))
    add(points.bases((0.8,), (0, 1), 1))
    add(points.distil_rates((0, 1)))
    add(points.distil(rows, (0.8,), (0, 1), 1))
    return rows


def test_width_pruning_tests_the_baselines_that_the_screen_prefers_and_pairs_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chosen per fold on its own calibration domains; the strongest baseline comes first and is what others recover."""
    monkeypatch.syspath_prepend(str(RECIPES))
    points, show = (importlib.import_module(f"width_pruning_{name}") for name in ("points", "show"))

    def loss(point: object) -> float:
        if point.method == "dense":
            return 0.0
        if point.method == "gprune":
            switched = point.settings.get("switch") != "never"
            return 0.5 + points.BASES.index(point.settings["base"]) / (20 if switched else 10)
        if point.distil:
            return 0.3 + abs(point.distil["lr"] - 3e-4)
        methods = {"obs": 1, **{name: i for i, name in enumerate(points.METHODS)}}
        bad = 1.0 + methods[point.method] / 10 + (not point.settings["compensate"]) / 20
        return bad + (0.01 if (point.fold == 1) == (point.settings["allocation"] == "ranked") else 0.0)

    rows = _width_pruning_rows(points, loss)
    chosen = [points.best(rows, 0.8, fold) for fold in (0, 1)]
    assert [[point.method for point in one] for one in chosen] == [[*points.TESTED]] * 2
    assert [one[0].settings["allocation"] for one in chosen] == ["ranked", "uniform"]
    with pytest.raises(SystemExit, match="run screen first"):
        points.best([row for row in rows if row["on"] != "left out: talk"], 0.8, 0)
    # What unseen domains lose changes nothing of the choice.
    shuffled = [{**row, "nll": {}} if row["on"] == "domains" else row for row in rows]
    assert points.best(shuffled, 0.8, 0) == chosen[0]

    distilled = [row for row in rows if row["distil"] and row["on"] == "domains"]
    assert [row["distil"]["lr"] for row in distilled] == [3e-4, 3e-4]
    with pytest.raises(SystemExit, match="1 of 2 rates are tried"):
        next(points.distil([row for row in rows if row["distil"] != distilled[0]["distil"]], (0.8,), (0,), 1))

    first, *rest = [line for line in show.test_table(rows) if line.startswith("| 0.8 | 0 |")]
    assert first.startswith(f"| 0.8 | 0 | **{chosen[0][0].arm}** |")
    gain = next(line for line in rest if "| gprune, learned shares |" in line)
    assert "-0.5750 ± 0.0144 [0.0000]" in gain and "| +49.8 ± 0.0 [" in gain and gain.endswith("| 0, 1 |")
    assert "distilled" in rest[0] and "gprune" in rest[1]
    longer = [
        {**row, "nll": {name: [*nll, *[9.0] * (row["method"] == "dense")] for name, nll in row["nll"].items()}}
        for row in rows
    ]
    half = [{**row, "dtype": "float32"} if row["sample"] and row["on"] == "domains" else row for row in rows]
    before = [{**row, "dtype": "float32"} for row in rows if row["method"] == "dense"]
    assert [*show.test_table([*half, *before])][2:] == [*show.test_table(rows)][2:]
    [alone] = [line for line in show.test_table(half) if line.startswith("| 0.8 | 0 | gprune, learned shares |")]
    assert "-0.5750 ± 0.0144 [0.0000]" in alone and "| +50.0 ± 0.0 |" in alone
    dense = [show.before(some, 0) for some in (rows, longer)]
    assert dense[0].level(seen=True) == dense[1].level(seen=True) and dense[0].level() < dense[1].level()
    lines = [line for line in show.stages_table(rows) if line.startswith("| ")]
    assert len(lines) == 1 + 2 * len(points.CONTRASTS) == 1 + 2 * 13
    ratios = [line.split(" | ")[-2] for line in show.bases_table(rows) if line.startswith("| 0.8 | 0 |")]
    assert ratios == ["1.259", "1.122", "1.122"]  # exp(0.2 · 1.15) and exp(0.1 · 1.15): the means over windows


def test_points_that_are_not_screened_have_the_names_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    points = importlib.import_module("width_pruning_points")
    found = list(points.unscreened((0.9,), (0,), 1))
    names = [point.arm for point in found]
    assert len(names) == len(set(names)) and names[0] == "dense"
    assert {name + points.RECONSTRUCTED for name in points.UNSCREENED} < set(names)
    assert points.with_prior(points.fisher(0.9)).key in {one.key for one in found}


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
