"""The page of a search, from made-up run folders, a real short run, and damaged ones."""

import json
import random
import shutil

import pytest
from click.testing import CliRunner

from regrow.cli.app import regrow
from regrow.nets import mobile
from regrow.nets.cells import supernet_config
from regrow.reports import ReportError, read_runs, to_html, write_page
from regrow.reports.comparison import compare
from regrow.reports.summary import RECONSTRUCTED, summarise
from reports.folders import damaged, rows_of, write_rows
from reports.test_page import check_self_contained, words_of

SECTIONS = {"search", "found", "use", "record"}
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
COMMIT |= {"task": 0, "accuracy_before": [0.45], "accuracy_after": [0.45], "logits_moved": 0.0, "parameters": 1234}
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
        "memory": [{"stage": i, "held": 10**6, "peak": peak, "resident": peak + 10**5} for i, peak, _ in MEMORY],
        "levels": [levels | {"measure": "nonzero", "asked": 500.0, "size": 495.0}],
        "found": [{"accuracy": 0.66, "parameters": 610, "nonzero": 495, "macs": 1990, "bytes": 2440}],
        "test": [{"accuracy": 0.7125, "images": 450, "parameters": 610, "nonzero": 493}],
    }
    rows = [{"what": what, **row} for what, many in (records | change).items() for row in many]
    (path / "run.json").write_text(json.dumps(told))
    write_rows(path, rows)
    (path / "shapes.json").write_text(json.dumps({"format": "regrow-shapes/2", "origin": {"config": {"cells": plan}}}))
    return path


def alarms(folder):
    return summarise(read_runs([folder])[0]).alarms


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("searches") / "quest")


def test_a_page_shows_what_was_found_and_how(folder, tmp_path):
    text = write_page([folder], tmp_path / "page.html").read_text(encoding="utf-8")
    page, said = check_self_contained(text), words_of(text)
    assert set(page.ids) >= SECTIONS and not {"quality", "accuracy", "network"} & set(page.ids)
    assert "mgas is reconstructed" in said and "is missing" not in said and not alarms(folder)
    for words in (
        "mgas searched cells:8-2-2 and found a network of 610 parameters, 495 nonzero.",
        "Its test accuracy is 71.2 %, trained further.",
        "Target: nonzero parameters 495 allowed at most 500",
        "Memory of training 3.90 MB allowed at most 4MB",
        "Cell 1, node 1 7 skip of the cell before last; sep3 (3 inside) of the cell before last; sep5 (8 inside)",
        "Cell 2, node 2 14 skip of node 1; sep3 (15 inside) of the last cell",
    ):
        assert words in said
    (course,) = page.figures
    assert "over 4 epochs" in course


def found_as(path, **config):
    """A run folder of a search that found what a description says."""
    told = {"format": "regrow-shapes/2", "origin": {"config": config}}
    (searched(path) / "shapes.json").write_text(json.dumps(told))
    return path


def test_blocks_are_listed(tmp_path):
    plans = mobile.supernet_config((1, 8, 8), 10, width=4, blocks=2, operations=("mb3e6", "skip"))["blocks"]
    text = to_html(read_runs([found_as(tmp_path / "run", blocks=[*plans, {"ops": [["x", 1]]}])]))  # of an unknown kind
    check_self_contained(text)
    said = words_of(text)
    assert "Block 1 4 3 × 3 bottleneck (24 inside) Block 2 4 3 × 3 bottleneck (24 inside); skip" in said
    assert "Block 12 – x" in said


@pytest.mark.parametrize(("many", "nodes"), [(6, 3), (12, 4), (2, 5), (1, 1)])
def test_whole_spaces_are_listed(tmp_path, many, nodes):
    space = supernet_config((3, 32, 32), 10, cells=many, nodes=nodes)
    parts = read_runs([searched(tmp_path / "whole", space["cells"])])[0].found.parts
    assert len(parts) == many * nodes
    assert sum(len(sums.split("; ")) for _, _, sums in parts) == many * 7 * nodes * (nodes + 3) // 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"levels": [{"saved": {}, "asked": 500.0, "size": 300.0}]},
            "overshot: the final network has 300, allowed are 500 (nonzero parameters)",
        ),
        (
            {
                "levels": [{"saved": {}, "asked": 2e6, "size": 3e6, "measure": "macs"}],
                "found": [{"accuracy": 0.66, "parameters": 610, "nonzero": 495, "macs": 3_000_000, "bytes": 2440}],
            },
            "missed: the final network has 3.00\xa0M, allowed are 2.00\xa0M (MACs)",
        ),
        ({"levels": []}, ""),
        ({"levels": [], "target": "nonzero=0.6k"}, ""),
        ({"levels": [], "target": "nonzero=2k"}, "overshot: the final network has 495, allowed are 2,000"),
        ({"levels": [], "target": "macs=2k"}, ""),
        ({"levels": [{"saved": {}, "asked": 500.0, "size": 99.0}]}, "overshot: the final network has 99, allowed"),
        (
            {"commit": [{**COMMIT, "logits_moved": 0.25}]},
            "should not change outputs, but one did: logits by up to 0.250",
        ),
        ({"commit": [{**COMMIT, "logits_moved": 0.25, "grown": {"a": 1}}]}, ""),
        ({"commit": [{**COMMIT, "logits_moved": 0.25, "restored": {"a": 1}}]}, ""),
        ({"commit": [{**COMMIT, "logits_moved": 0.25, "stood": True}]}, ""),  # it was not masked before, as told
        ({"commit": [{**COMMIT, "logits_moved": 0.0009}]}, ""),
        ({"memory": [{"stage": 1, "peak": 4_200_000}]}, "budget of 4MB was exceeded: a stage needed 4.20"),
    ],
)
def test_what_must_not_be_overlooked_is_said(tmp_path, change, said):
    told = alarms(searched(tmp_path / "run", **change))
    assert len(told) == bool(said) and said in "".join(told)
    assert all(f'<p class="alarm">{line}</p>' in to_html(read_runs([tmp_path / "run"])) for line in told)


def test_what_a_search_without_cells_lacks(tmp_path):
    text = to_html(read_runs([searched(tmp_path / "run", [], budget="", stages=[], memory=[])]))
    assert set(check_self_contained(text).ids) >= SECTIONS - {"found"} and "Memory" not in text


def test_a_run_under_way_has_a_page(folder, tmp_path):
    run_json = json.loads((folder / "run.json").read_text())
    run_json.pop("finished")
    for left in (0, 1, 3, 6):
        here = tmp_path / str(left)
        here.mkdir()
        write_rows(here, rows_of(folder)[:left])
        (here / "run.json").write_text(json.dumps(run_json))
        text = to_html(read_runs([here]))
        page = check_self_contained(text)
        assert "The search is not finished" in text and "shapes.json is missing" in text and "use" not in page.ids
        assert len(page.figures) == (left > 1)


@pytest.mark.parametrize("seed", range(8))
def test_damage_does_not_break_the_page(folder, tmp_path, seed):
    rng, here = random.Random(seed), shutil.copytree(folder, tmp_path / "run")
    write_rows(here, [damaged(row, rng, 0.02) for row in rows_of(folder)])
    shapes = damaged(json.loads((folder / "shapes.json").read_text()), rng, 0.02)
    (here / "shapes.json").write_text(json.dumps(shapes))
    told = json.loads((folder / "run.json").read_text())
    settings = damaged(told["settings"], rng, 0.02)
    (here / "run.json").write_text(json.dumps(told | {"settings": settings if isinstance(settings, dict) else {}}))
    check_self_contained(to_html(read_runs([here])))
    check_self_contained(to_html(read_runs([here, folder])))


@pytest.mark.parametrize("method", RECONSTRUCTED)
def test_where_results_stand_it_is_said_that_a_method_is_reconstructed(method, folder, tmp_path):
    own = searched(tmp_path / "own")
    told = json.loads((own / "run.json").read_text())
    told["settings"]["method"] = method
    (own / "run.json").write_text(json.dumps(told))
    for runs in ([own], [own, folder]):
        assert f"{method} is reconstructed from abstracts and public code" in to_html(read_runs(runs))


def test_searches_are_compared_a_row_each(folder, tmp_path):
    test = {"accuracy": 0.5, "images": 450, "parameters": 700, "nonzero": 600}
    other = searched(tmp_path / "other", target="nonzero=600", test=[test])
    compared = compare(read_runs([folder, other]))
    assert compared.headline == "2 runs of cells:8-2-2" and not compared.alarms
    cells = [dict(zip(compared.table.columns, row, strict=True)) for row in compared.table.rows]
    assert [row["target"] for row in cells] == ["nonzero=500", "nonzero=600"]
    assert [row["Test accuracy"] for row in cells] == ["71.2\xa0%", "50.0\xa0%"]
    check_self_contained(to_html(read_runs([folder, other])))


def test_searches_of_other_data_are_told_apart(folder, tmp_path):
    other = searched(tmp_path / "other")
    run_json = json.loads((other / "run.json").read_text())
    run_json["settings"]["data"] = "cifar/"
    (other / "run.json").write_text(json.dumps(run_json))
    assert compare(read_runs([folder, other])).alarms == ["The runs differ in data: their quality cannot be compared."]


def test_a_real_search_leaves_its_page(tmp_path):
    words = (
        "search cells:4-2-1 --data digits --target params=30% --epochs 6 --retrain 1 --stages 2 --train 200 --test 100"
    )
    result = CliRunner().invoke(regrow, [*words.split(), "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    (run,) = read_runs([tmp_path / "run"])
    assert len(run.found.cells) == 2 and not run.problems
    page = check_self_contained((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert set(page.ids) >= SECTIONS and page.figures


def test_a_folder_without_a_run_has_no_page(tmp_path):
    with pytest.raises(ReportError, match="not a run folder"):
        read_runs([tmp_path])
