"""The page of a learning run, from real short runs and from damaged ones."""

import json
import random
import re
import shutil

import pytest

from regrow.jobs.learn import Settings, extend, run
from regrow.jobs.recording import Invocation
from regrow.reports import summarise, to_html, to_markdown, write_page
from reports.test_page import check_self_contained
from reports.test_summary import ODD

SECTIONS = {"known", "growth", "shape", "ran", "notes"}
DRAWN = {"fig-course-size"}
OWNED = {"owned"}


def learned(path, method="sparsegrow", tasks=3, **settings):
    given = {"grow": "always"} | settings if method == "sparsegrow" else settings
    asked = Settings(
        (f"permuted:digits:{tasks}",), model="mlp:16-16", method=method, method_settings=given, epochs=2, lr=0.05
    )
    return run(asked, Invocation(path / method)).path


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    return learned(tmp_path_factory.mktemp("grown"))


def test_a_page_shows_what_was_known_and_how_the_network_grew(grown, tmp_path):
    text = write_page([grown], tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert set(page.ids) >= SECTIONS | DRAWN | OWNED and not {"perplexity", "proof"} & set(page.ids)
    assert "reconstructed" in text and "is missing from the run folder" not in text and "permuted-3" in text
    told = rows(grown)
    matrix = next(row for row in told if row["what"] == "matrix")
    shades = re.findall(r'style="--share: ([0-9.]+)">([^<]*)</span>', text)
    for value in (v for row in [*matrix["matrix"], matrix["before"]] for v in row):
        assert (f"{value:.3f}", f"{100 * value:.1f}\xa0%") in shades
    for name in ("average", "average_along", "learning"):
        assert f'<dd class="value">{100 * matrix[name]:.1f}\xa0%</dd>' in text
    for name in ("backward_transfer", "forgetting", "forward_transfer"):
        assert f"{100 * matrix[name]:+.1f}\xa0points".replace("-", "−") in text
    growths = [row for row in told if row["what"] == "growth"]
    assert growths
    for row in growths:
        born = "<br>".join(f"{n} in <code>{key}</code>" for key, n in row["grown"].items())
        assert f'<th scope="row">{row["task"] + 1}</th><td>{row["epoch"] + 1}</td><td class="left">{born}</td>' in text
    for row in (row for row in told if row["what"] == "task"):
        assert f"<td>{row['parameters']:,}</td><td>{row['nonzero']:,}</td>" in text
        for share in (*row["owned"].values(), *row["free"].values()):
            assert f"<td>{100 * share:.1f}\xa0%</td>" in text


def test_markdown_tells_the_same(grown):
    told = to_markdown(summarise([grown]))
    matrix = next(row for row in rows(grown) if row["what"] == "matrix")
    assert "reconstructed" in told and "## Growth" in told and "## Proof" not in told
    assert all(f"{100 * value:.1f}\xa0%" in told for row in matrix["matrix"] for value in row)


def test_a_method_that_owns_nothing_has_no_section_on_it(grown, tmp_path):
    folder = learned(tmp_path, "naive", tasks=2)
    text = to_html(summarise([folder]))
    page = check_self_contained(text)
    assert set(page.ids) >= SECTIONS | DRAWN and not OWNED & set(page.ids) and "reconstructed" not in text
    check_self_contained(to_html(summarise([folder, grown])))


def test_a_hard_gate_owns_but_has_no_directions(tmp_path):
    text = to_html(summarise([learned(tmp_path, tasks=2, gate="hard")]))
    assert set(check_self_contained(text).ids) >= OWNED and "owned" in text and "Free is" not in text


def test_tasks_that_came_later_are_on_the_page(tmp_path):
    folder = learned(tmp_path, "naive", tasks=1)
    extend(Invocation(folder), ["digits"])
    matrix = summarise([folder]).runs[0].course.matrix
    assert matrix.tasks == ["permuted-1", "digits"] and matrix.average is not None
    assert [len(row) for row in matrix.matrix] == [1, 2]
    assert "digits" in to_html(summarise([folder]))


@pytest.mark.parametrize("left", ["nothing", "no matrix", "more to come"])
def test_a_run_under_way_has_a_page(grown, tmp_path, left):
    folder = shutil.copytree(grown, tmp_path / "run")
    told = rows(folder)
    if left == "nothing":
        told = []
    elif left == "no matrix":
        told = [row for row in told if row["what"] != "matrix"]
    else:
        later = next(row for row in told if row["what"] == "task")
        told.append({**later, "task": 3, "name": "later", "accuracy": [0.5] * 4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    (found,) = summarise([folder]).runs
    count = {"nothing": 0, "no matrix": 3, "more to come": 4}[left]
    assert len(found.course.matrix.matrix) == count and found.course.matrix.average is None
    text = to_html(summarise([folder]))
    assert set(check_self_contained(text).ids) >= SECTIONS and ('style="--share' in text) == bool(count)
    to_markdown(summarise([folder]))


@pytest.mark.parametrize("seed", range(6))
def test_damaged_measurements_do_not_break_the_page(grown, tmp_path, seed):
    rng, folder = random.Random(seed), shutil.copytree(grown, tmp_path / "run")

    def damaged(value):
        if rng.random() < 0.01:
            return rng.choice(ODD)
        if isinstance(value, dict):
            return {key: damaged(part) for key, part in value.items()}
        return [damaged(part) for part in value] if isinstance(value, list) else value

    lines = [{"what": row["what"]} | {k: damaged(v) for k, v in row.items() if k != "what"} for row in rows(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    check_self_contained(to_html(summarise([folder])))
    to_markdown(summarise([folder]))


@pytest.mark.slow
def test_many_tasks_make_a_page_of_bounded_size(grown, tmp_path):
    folder, n = shutil.copytree(grown, tmp_path / "run"), 150
    task = {"what": "task", "parameters": 10**6, "nonzero": 10**5, "accuracy": [0.5] * n, "seconds": 1.0}
    task |= {what: {f"{i}.weight": 0.5 for i in range(300)} for what in ("owned", "free", "widths")}
    events = [{"what": "growth", "task": i, "epoch": 1, "grown": {"a": 3}, "logits_moved": 0.0} for i in range(n)]
    matrix = {"what": "matrix", "tasks": [f"t{i}" for i in range(n)], "matrix": [[0.5] * n] * n, "before": [0.1] * n}
    lines = [*({**task, "task": i} for i in range(n)), *events, matrix]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_page([folder], tmp_path / "page.html").stat().st_size < 3_000_000


def test_two_files_are_enough(grown, tmp_path):
    folder = tmp_path / grown.name
    folder.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(grown / name, folder)
    assert to_html(summarise([folder])) == to_html(summarise([grown]))
