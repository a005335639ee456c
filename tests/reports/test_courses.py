"""The page that compares learning runs, from real short runs and from damaged ones."""

import json
import random
import re
import shutil

import pytest

from regrow.jobs.learn import extend
from regrow.jobs.recording import Invocation
from regrow.reports import comparison, summarise, to_html, to_markdown, write_page
from reports.test_course import learned, rows
from reports.test_page import check_self_contained
from reports.test_summary import ODD

SECTIONS = {"results", "front", "setup", "remarks"}
DRAWN = {"fig-courses", "fig-courses-size"}
FIGURES = ("average", "average_along", "learning", "backward_transfer", "forgetting", "forward_transfer")


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    root = tmp_path_factory.mktemp("courses")
    return [learned(root), learned(root, "naive"), learned(root, "replay", memory=50)]


def cells(text, label):
    """What the first table says of a run."""
    line = next(line for line in text.splitlines() if line.startswith(f'<tr><th scope="row">{label}</th>'))
    return re.findall(r"<td[^>]*>([^<]*)</td>", line)


def test_every_figure_of_every_run_is_there(several, tmp_path):
    text = write_page(several, tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert set(page.ids) >= SECTIONS | DRAWN and "sizes" not in page.ids
    told = to_markdown(summarise(several))
    assert "3 runs of mlp:16-16, each trained on 3 tasks in sequence." in text and "trained on 3 tasks" in told
    for folder in several:
        matrix = next(row for row in rows(folder) if row["what"] == "matrix")
        last = [row for row in rows(folder) if row["what"] == "task"][-1]
        shown = cells(text, folder.name)
        for value, name in zip(shown, FIGURES, strict=False):
            digits = float(value.replace("−", "-").split("\xa0")[0])
            assert digits == pytest.approx(100 * matrix[name], abs=0.051), name
        assert shown[6] == f"{last['parameters']:,}"
        assert shown[8] == str(sum(row["what"] == "growth" for row in rows(folder)))
        assert all(value in told for value in shown[:7])
        assert shown[9] == "–" or float(shown[9].split("\xa0")[0]) < 0.1
        assert shown[11:] == [f"{100 * value:.1f}\xa0%" for value in matrix["matrix"][-1]]


def test_lines_are_means_over_the_tasks_learned_by_then(several):
    drawing = comparison.compared_accuracy(summarise(several))
    for folder in several:
        means = [
            sum(row["accuracy"][: i + 1]) / (i + 1)
            for i, row in enumerate(row for row in rows(folder) if row["what"] == "task")
        ]
        assert f"{folder.name}: " + ", ".join(f"{100 * mean:.3g}\xa0%" for mean in means) in drawing.wide


def test_what_leads_at_its_size_is_marked(several):
    summary = summarise(several)
    table = dict(comparison.compare(summary).rows)
    ends = {run.label: run.course.matrix.average for run in summary.runs}
    assert table["naive"][0].best == (ends["naive"] >= ends["replay"])
    assert table["sparsegrow"][0].best == (ends["sparsegrow"] >= max(ends.values()))
    assert table["sparsegrow"][7].value < table["sparsegrow"][6].value  # parameters after the first task, at the end


def test_runs_of_other_tasks_do_not_compare(several, tmp_path):
    longer = shutil.copytree(several[1], tmp_path / "longer")
    extend(Invocation(longer), ["digits"])
    text = to_html(summarise([several[0], longer]))
    assert "differ in tasks or in what was evaluated" in text and "trained on 3 to 4 tasks" in text
    assert "has the highest final" not in text and "differ in tasks or in what was evaluated" not in to_html(
        summarise(several)
    )


def test_runs_of_one_size_have_no_front(several, tmp_path):
    page = check_self_contained(to_html(summarise(several[1:])))
    assert "fig-courses-size" not in page.ids and "fig-courses" in page.ids


@pytest.mark.parametrize("left", ["nothing", "no matrix"])
def test_a_run_under_way_is_compared_as_far_as_it_got(several, tmp_path, left):
    folder = shutil.copytree(several[0], tmp_path / "run")
    told = [] if left == "nothing" else [row for row in rows(folder) if row["what"] == "task"][:2]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    summary = summarise([folder, several[1]])
    text = to_html(summary)
    check_self_contained(text)
    drawn = comparison.compared_accuracy(summarise([folder, several[1]])).wide
    assert cells(text, "sparsegrow")[0] == "–" and ("sparsegrow" in drawn) == bool(told)
    to_markdown(summary)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_measurements_do_not_break_the_page(several, tmp_path, seed):
    rng, folder = random.Random(seed), shutil.copytree(several[0], tmp_path / "run")

    def damaged(value):
        if rng.random() < 0.01:
            return rng.choice(ODD)
        if isinstance(value, dict):
            return {key: damaged(part) for key, part in value.items()}
        return [damaged(part) for part in value] if isinstance(value, list) else value

    lines = [{"what": row["what"]} | {k: damaged(v) for k, v in row.items() if k != "what"} for row in rows(folder)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    check_self_contained(to_html(summarise([folder, several[1]])))
    to_markdown(summarise([several[1], folder]))


def test_as_many_runs_as_a_page_takes_make_one_of_bounded_size(several, tmp_path):
    page = write_page(several * 20, tmp_path / "page.html")
    assert page.stat().st_size < 1_000_000 and "The first 24 runs." in page.read_text(encoding="utf-8")
