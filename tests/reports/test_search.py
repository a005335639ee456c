"""The page of a search, from made-up run folders, a real short run, and damaged ones."""

import html
import json
import random
import re
import shutil

import pytest
from click.testing import CliRunner

from regrow.cli.app import regrow
from regrow.nets import mobile
from regrow.nets.cells import OPERATIONS, supernet
from regrow.reports import ReportError, cells, figures, summarise, to_html, to_markdown, write_page
from regrow.reports.search import RECONSTRUCTED
from reports.test_page import check_self_contained
from reports.test_summary import ODD

SECTIONS = {"found", "epochs", "passed", "levels", "memory", "ran", "notes"}
DRAWN = {"fig-search-size", "fig-search-front"}
CELLS = [
    {
        "reduce": False,
        "inputs": [5, 6],
        "nodes": [
            {"width": 7, "ops": [["skip", 0, 8], ["sep3", 0, 3], ["sep5", 1, 8]]},
            {"width": 9, "ops": [["dil3", 1, 8], ["max", 2, 8]]},
        ],
    },
    {
        "reduce": True,
        "inputs": [11, 12],
        "nodes": [
            {"width": 13, "ops": [["skip", 0, 16], ["dil5", 1, 16]]},
            {"width": 14, "ops": [["skip", 2, 16], ["sep3", 1, 15]]},
        ],
    },
]
EPOCHS = [
    {"epoch": 1, "stage": 0, "accuracy": 0.25, "size": 900.0, "allowed": 900.0},
    {"epoch": 2, "stage": 0, "accuracy": 0.45, "size": 460.0, "allowed": 450.0},
    {"epoch": 3, "stage": 1, "accuracy": 0.35, "size": 2000.0, "allowed": 2000.0},
    {"epoch": 4, "stage": 1, "accuracy": 0.65, "size": 510.0, "allowed": 500.0},
]
COMMIT = {"what": "commit", "epoch": 2, "grown": {}, "cut": {"a": 2, "b": 3}, "dropped": ["x", "y"], "back": []}
COMMIT |= {"task": 0, "steps_watched": 3, "loss_before": 1.0, "recovery_steps": None}
COMMIT |= {"accuracy_before": [0.45], "accuracy_after": [0.45], "logits_moved": 0.0, "parameters": 1234}
MEMORY = ((0, 3_100_000, 3_000_000), (1, 3_900_000, 4_000_000))


def searched(path, plan=CELLS, target="nonzero=500", budget="4MB", **change):
    """A run folder of a search; ``change`` replaces or leaves out records by what they are."""
    path.mkdir(parents=True)
    settings = {"space": "cells:8-2-2", "data": "digits", "target": target, "method": "mgas", "method_settings": {}}
    settings |= {"stages": 2, "memory": budget, "epochs": 4, "retrain": 2, "train": 0, "test": 0, "seed": 0}
    told = {"format": "regrow-run/2", "verb": "search", "command": "regrow search cells:8-2-2", "settings": settings}
    told |= {"versions": {"regrow": "0.1.0"}, "started": "2026-11-25T20:00:00+00:00", "seconds": {"search": 60.0}}
    told |= {"finished": "2026-11-25T20:02:00+00:00", "defaults": {}}
    told["seconds"]["retrain"] = 15.0
    shares = {"operations": 0.75, "filters": 0.5, "weights": 0.875}
    levels = {"saved": {"operations": 1100.0, "filters": 330.0, "weights": 44.0}, "kept": shares}
    records = {
        "stages": [{"ends": [0, 1], "peaks": [planned for _, _, planned in MEMORY]}],
        "epoch": [row | shares for row in EPOCHS],
        "commit": [COMMIT, COMMIT | {"cut": {}, "dropped": [], "back": ["x"], "logits_moved": 0.5}],
        "front": [{"epoch": 3, "size": 800.0, "parameters": 900, "nonzero": 790, "accuracy": 0.7}],
        "memory": [{"stage": i, "held": 10**6, "peak": peak, "resident": peak + 10**5} for i, peak, _ in MEMORY],
        "levels": [levels | {"measure": "nonzero", "asked": 500.0, "size": 495.0}],
        "found": [{"accuracy": 0.66, "parameters": 610, "nonzero": 495, "macs": 1990, "bytes": 2440}],
        "test": [{"accuracy": 0.7125, "images": 450, "parameters": 610, "nonzero": 493}],
    }
    rows = [{"what": what, **row} for what, many in (records | change).items() for row in many]
    (path / "run.json").write_text(json.dumps(told))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "shapes.json").write_text(json.dumps({"format": "regrow-shapes/2", "origin": {"config": {"cells": plan}}}))
    return path


def alarms(folder):
    return re.findall(r'<p class="alarm">([^<]*)</p>', to_html(summarise([folder])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("searches") / "quest")


def test_a_page_shows_what_was_found_and_how(folder, tmp_path):
    text = write_page([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert set(page.ids) >= SECTIONS | DRAWN and not {"perplexity", "known", "proof"} & set(page.ids)
    assert "reconstructed" in text and "is missing from the run folder" not in text and not alarms(folder)
    assert "mgas searched cells:8-2-2 and found a network of 610 parameters, 495 of them nonzero." in text
    for value in ("71.2\xa0%", "66.0\xa0%", "610", "495"):
        assert f'<dd class="value">{value}</dd>' in text
    assert (
        "retrained from scratch, on 450 examples" in text
        and "of operations, 3 of 9" in text
        and "of at most 500 nonzero parameters" in text
    )
    assert "cell before last: skip, sep3 (3 inside); last cell: sep5 (8 inside)" in text
    assert '<th scope="row">skip</th><td>1</td><td>2</td><td>3</td>' in text
    assert '<th scope="row">operations</th><td>1,100</td><td>75.0\xa0%</td>' in text
    assert "<td>2</td><td>0</td><td>5</td><td>0</td><td>45.0\xa0%</td>" in text  # a commit
    assert '<th scope="row">3</th><td>800</td><td>790</td><td>70.0\xa0%</td>' in text
    drawing = figures.search_front(summarise([folder]).runs[0])
    assert "epoch 3: 800 nonzero parameters, 70.0\xa0%; final: 495 nonzero parameters, 66.0\xa0%" in drawing.wide


def test_kinds_are_those_of_the_networks():
    assert cells.KINDS == OPERATIONS and cells.BLOCK_KINDS == mobile.OPERATIONS


def found_as(path, **config):
    """A run folder of a search that found what a description says."""
    told = {"format": "regrow-shapes/2", "origin": {"config": config}}
    (searched(path) / "shapes.json").write_text(json.dumps(told))
    return path


def test_blocks_are_listed_and_a_collapse_of_them_is_told(tmp_path):
    def of_blocks(name, plans):
        return found_as(tmp_path / name, blocks=plans)

    plans = mobile.supernet((1, 8, 8), 10, width=4, blocks=2, operations=("mb3e6", "skip"))["blocks"]
    folder = of_blocks("whole", [*plans, {"ops": [["x", 1]]}])  # of a kind that is not known
    text, words = to_html(summarise([folder])), to_markdown(summarise([folder]))
    check_self_contained(text)
    row = '<tr><th scope="row">Block 1, halves the resolution</th><td>4</td>'
    row += '<td class="words">3 × 3 bottleneck (24 inside)'
    assert row in text and "of 12</dd>" in text and not alarms(folder)
    assert (
        "* block 2, 4 wide: 3 × 3 bottleneck (24 inside); its input" in words
        and "* block 12, – wide: x (1 inside)" in words
    )
    bare = of_blocks("collapsed", [plan | {"ops": [["skip", 4]]} for plan in plans])
    assert alarms(bare)[0] == "The search may have collapsed: 11 of 11 blocks do nothing."


@pytest.mark.parametrize(("many", "nodes"), [(6, 3), (12, 4), (2, 5), (1, 1)])
def test_whole_spaces_are_listed(tmp_path, many, nodes):
    space = supernet((3, 32, 32), 10, cells=many, nodes=nodes)
    folder = searched(tmp_path / "whole", space["cells"])
    found = summarise([folder]).runs[0].search
    assert len(cells.operations(found.cells)) == many * 7 * nodes * (nodes + 3) // 2
    page = to_html(summarise([folder]))
    assert f"<h3>Cell {many}" in page and f"<h3>Cell {many + 1}" not in page
    assert [sum(row) for row in cells.count_kinds(found.cells).values()] == [many * nodes * (nodes + 3) // 2] * 7


def only(kinds):
    node = {"width": 8, "ops": [[kind, source, 8] for source in (0, 1) for kind in kinds]}
    return [{"reduce": False, "inputs": [8, 8], "nodes": [node]}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"plan": only(["skip", "sep3"])}, "50.0\xa0% of the kept operations are skips"),
        ({"plan": only(["skip", "avg", "max", "sep3"])}, "75.0\xa0% of the kept operations have no weights"),
        (
            {"levels": [{"saved": {}, "asked": 500.0, "size": 300.0}]},
            "overshot: the final network has 300 nonzero parameters, the target is 500",
        ),
        (
            {
                "levels": [{"saved": {}, "asked": 2e6, "size": 3e6, "measure": "macs"}],
                "found": [{"accuracy": 0.66, "parameters": 610, "nonzero": 495, "macs": 3_000_000, "bytes": 2440}],
            },
            "missed: the final network has 3.00\xa0M MACs per example",
        ),
        ({"levels": []}, ""),
        ({"levels": [], "target": "nonzero=0.6k"}, ""),
        (
            {"levels": [], "target": "nonzero=2k"},
            "overshot: the final network has 495 nonzero parameters, the target is 2,000",
        ),
        ({"levels": [], "target": "macs=2k"}, ""),
        (
            {
                "levels": [{"saved": {}, "asked": 500.0, "size": 99.0}],
            },
            "The target was overshot: the final network has 99 nonzero parameters",
        ),
        ({"commit": [{**COMMIT, "logits_moved": 0.25}]}, "1 of 1 did (after epoch 2): logits changed by up to 0.250"),
        ({"commit": [{**COMMIT, "logits_moved": 0.25, "grown": {"a": 1}}]}, ""),
        ({"commit": [{**COMMIT, "logits_moved": 0.25, "restored": {"a": 1}}]}, ""),
        ({"commit": [{**COMMIT, "logits_moved": 0.25, "stood": True}]}, ""),  # it was not masked before, as told
        ({"commit": [{**COMMIT, "logits_moved": 0.0009}]}, ""),
        ({"memory": [{"stage": 1, "peak": 4_200_000}]}, "budget of 4.00\xa0MB was exceeded: stage 2 needed 4.20"),
        ({"memory": [{"stage": 1, "peak": 4_200_000}], "target": "nonzero=500"}, "memory budget"),
    ],
)
def test_what_must_not_be_overlooked_is_said(tmp_path, change, said):
    told = alarms(searched(tmp_path / "run", **change))
    assert len(told) == bool(said) and said in "".join(told)
    markdown = to_markdown(summarise([tmp_path / "run"]))
    assert said.split(" (")[0] in markdown.replace("\\", "")


def test_a_skip_that_halves_the_resolution_has_weights(tmp_path):
    plan = [{**only(["skip"])[0], "reduce": True}]
    (found,) = summarise([searched(tmp_path / "run", plan)]).runs
    assert len(cells.operations(found.search.cells)) == 2 and not cells.count_bare(found.search.cells)


def test_what_a_search_without_stages_or_cells_lacks(tmp_path):
    text = to_html(summarise([searched(tmp_path / "run", [], budget="", stages=[], memory=[])]))
    page = check_self_contained(text)
    assert "not made of cells" in text and "memory" not in page.ids
    assert set(page.ids) >= SECTIONS - {"memory"}


def test_a_run_under_way_has_a_page(folder, tmp_path):
    run_json = json.loads((folder / "run.json").read_text())
    run_json.pop("finished")
    for left in (0, 1, 3, 6):
        here = tmp_path / str(left)
        here.mkdir()
        lines = (folder / "metrics.jsonl").read_text().splitlines()[:left]
        (here / "metrics.jsonl").write_text("\n".join(lines))
        (here / "run.json").write_text(json.dumps(run_json))
        text = to_html(summarise([here]))
        page = check_self_contained(text)
        assert "The search is not finished" in text and "shapes.json" in text
        assert ("fig-search-size" in page.ids) == (left > 1)
        to_markdown(summarise([here]))


@pytest.mark.parametrize("seed", range(8))
def test_damage_does_not_break_the_page(folder, tmp_path, seed):
    rng, here = random.Random(seed), shutil.copytree(folder, tmp_path / "run")

    def damaged(value):
        if rng.random() < 0.02:
            return rng.choice(ODD)
        if isinstance(value, dict):
            return {key: damaged(part) for key, part in value.items()}
        return [damaged(part) for part in value] if isinstance(value, list) else value

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{"what": row["what"]} | {k: damaged(v) for k, v in row.items() if k != "what"} for row in rows]
    (here / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (here / "shapes.json").write_text(json.dumps(damaged(json.loads((folder / "shapes.json").read_text()))))
    told = json.loads((folder / "run.json").read_text())
    (here / "run.json").write_text(json.dumps(told | {"settings": damaged(told["settings"])}))
    check_self_contained(to_html(summarise([here])))
    to_markdown(summarise([here, folder]))
    check_self_contained(to_html(summarise([here, folder])))


@pytest.mark.parametrize("method", RECONSTRUCTED)
def test_where_results_stand_it_is_said_that_a_method_is_reconstructed(method, folder, tmp_path):
    own = searched(tmp_path / "own")
    told = json.loads((own / "run.json").read_text())
    told["settings"]["method"] = method
    (own / "run.json").write_text(json.dumps(told))
    for place, runs in (("one", [own]), ("two", [own, folder])):
        assert RECONSTRUCTED[method] in html.unescape(write_page(runs, tmp_path / place).read_text(encoding="utf-8"))


def test_searches_are_compared_a_row_each(folder, tmp_path):
    test = {"accuracy": 0.5, "images": 450, "parameters": 700, "nonzero": 600}
    other = searched(tmp_path / "other", target="nonzero=600", test=[test])
    text = write_page([folder, other], tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert {"results", "setup", "remarks"} <= set(page.ids) and not {"sizes", "front"} & set(page.ids)
    first = '<td>nonzero=500</td><td class="best">71.2\xa0%</td><td>66.0\xa0%</td><td>610</td><td>493</td>'
    second = "<td>nonzero=600</td><td>50.0\xa0%</td><td>66.0\xa0%</td><td>700</td><td>600</td><td>75.0</td>"
    assert first in text and second in text and "2 searches of cells:8-2-2." in text and "reconstructed" in text
    told = to_markdown(summarise([folder, other]))
    assert (
        "| 71.2\xa0% | 66.0\xa0% | 610 | 493 | 75.0 |" in told
        and "mgas seed 0 quest has the highest test accuracy" in told
    )


def test_what_one_search_is_told_another_may_have_by_default(folder, tmp_path):
    runs = []
    for name, told, taken in (
        ("a", {"filter_lr_ratio": 1.0}, {"min_cost": 1.0}),
        ("b", {}, {"min_cost": 0.0, "filter_lr_ratio": 0.25}),
    ):
        runs.append(searched(tmp_path / name))
        run = json.loads((runs[-1] / "run.json").read_text())
        run["settings"]["method_settings"], run["defaults"] = told, taken
        (runs[-1] / "run.json").write_text(json.dumps(run))
    found = to_html(summarise(runs))
    assert '<th scope="col">filter_lr_ratio</th><th scope="col">min_cost</th>' in found
    assert "<td>1</td><td>1</td>" in found and "<td>0.25</td><td>0</td>" in found


def test_searches_of_other_data_are_told_apart(folder, tmp_path):
    other = searched(tmp_path / "other")
    run_json = json.loads((other / "run.json").read_text())
    run_json["settings"]["data"] = "cifar/"
    (other / "run.json").write_text(json.dumps(run_json))
    told = to_html(summarise([folder, other]))
    assert "different data" in told and "has the highest test accuracy" not in told


@pytest.mark.slow
def test_a_real_search_leaves_its_page(tmp_path):
    words = "search cells:4-2-1 --data digits --target 0.3 --epochs 6 --retrain 1 --stages 2 --train 200 --test 100"
    result = CliRunner().invoke(regrow, [*words.split(), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    (found,) = summarise([tmp_path / "run"]).runs
    search = found.search
    assert len(search.cells) == 2 and len(search.epochs) == 6 and not found.problems and not found.missing
    assert search.asked and search.reached and search.reached <= 1.01 * search.asked
    assert all(row.allowed and row.size for row in search.epochs)
    page = check_self_contained((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert set(page.ids) >= (SECTIONS | DRAWN) - {"memory", "passed", "fig-search-front"}


def test_a_folder_without_a_run_has_no_page(tmp_path):
    with pytest.raises(ReportError, match="not a run folder"):
        summarise([tmp_path])
