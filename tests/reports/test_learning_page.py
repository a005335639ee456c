"""The pages of learning runs, of one and of several, from real short runs and from damaged ones."""

import random
import shutil

import pytest

from regrow.jobs.learn import Settings, extend, learn_named
from regrow.jobs.recording import Invocation
from regrow.reports import read_runs, to_html, write_page
from regrow.reports.comparison import compare
from reports.folders import damaged, rows_of, write_rows
from reports.test_page import check_self_contained, words_of


def learned(path, method="sparsegrow", tasks=3, **settings):
    given = {"grow": "always"} | settings if method == "sparsegrow" else settings
    asked = Settings(
        (f"permuted:digits:{tasks}",), model="mlp:16-16", method=method, method_settings=given, epochs=2, lr=0.05
    )
    return learn_named(asked, Invocation(path / method)).path


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    root = tmp_path_factory.mktemp("courses")
    return [learned(root), learned(root, "naive"), learned(root, "replay", memory=50)]


def test_a_page_shows_what_was_known_after_each_task(several):
    grown = several[0]
    text = to_html(read_runs([grown]))
    page, said = check_self_contained(text), words_of(text)
    assert {"accuracy", "use", "record"} <= set(page.ids) and not {"quality", "network", "search"} & set(page.ids)
    assert "sparsegrow is reconstructed" in said and "is missing" not in said
    rows = rows_of(grown)
    matrix = next(row for row in rows if row["what"] == "matrix")
    for value in (v for row in [*matrix["matrix"], matrix["before"]] for v in row):
        assert f'style="--share: {value:.3f}">{100 * value:.1f}\xa0%</td>' in text
    for name in ("average", "learning"):
        assert f'<td class="after">{100 * matrix[name]:.1f}\xa0%</td>' in text
    assert f"{100 * matrix['forgetting']:+.1f} points".replace("-", "−") in said
    tasks, growths = ([row for row in rows if row["what"] == what] for what in ("task", "growth"))
    first = f"{tasks[0]['parameters']:,} after the first task; {len(growths)} growth"
    assert f"Parameters {tasks[-1]['parameters']:,} {first}" in said
    assert all(f"<td>{row['parameters']:,}</td></tr>" in text for row in tasks)
    assert f"Memory of the method {tasks[-1]['remembered'] / 1000:.1f} kB what it stores beside" in said
    assert "regrow learn --resume sparsegrow --task TASK" in said


def test_a_network_that_did_not_grow_says_so(several):
    said = words_of(to_html(read_runs([several[1]])))
    assert "Memory of the method 0 B" in said and "The network did not grow." in said and "reconstructed" not in said


def test_tasks_that_came_later_are_on_the_page(tmp_path):
    folder = learned(tmp_path, "naive", tasks=1)
    extend(Invocation(folder), ["digits"])
    results = read_runs([folder])[0].task_results
    assert results.names == ["permuted-1", "digits"] and results.end.average is not None
    assert [len(row) for row in results.accuracies] == [1, 2]
    assert "digits" in to_html(read_runs([folder]))


@pytest.mark.parametrize("left", ["nothing", "no matrix", "more to come"])
def test_a_run_under_way_has_a_page(several, tmp_path, left):
    folder = shutil.copytree(several[0], tmp_path / "run")
    rows = rows_of(folder)
    if left == "nothing":
        rows = []
    elif left == "no matrix":
        rows = [row for row in rows if row["what"] != "matrix"]
    else:
        later = next(row for row in rows if row["what"] == "task")
        rows.append({**later, "task": 3, "name": "later", "accuracy": [0.5] * 4})
    write_rows(folder, rows)
    (found,) = read_runs([folder])
    count = {"nothing": 0, "no matrix": 3, "more to come": 4}[left]
    assert len(found.task_results.accuracies) == count and found.task_results.end is None
    text = to_html([found])
    assert ("accuracy" in check_self_contained(text).ids) == ('style="--share' in text) == bool(count)
    check_self_contained(to_html(read_runs([folder, several[1]])))


@pytest.mark.parametrize("seed", range(6))
def test_damaged_measurements_do_not_break_the_page(several, tmp_path, seed):
    rng, folder = random.Random(seed), shutil.copytree(several[0], tmp_path / "run")
    write_rows(folder, [damaged(row, rng) for row in rows_of(folder)])
    check_self_contained(to_html(read_runs([folder])))
    check_self_contained(to_html(read_runs([folder, several[1]])))


def test_many_tasks_make_a_page_of_bounded_size(several, tmp_path):
    folder, n = shutil.copytree(several[0], tmp_path / "run"), 150
    task = {"what": "task", "parameters": 10**6, "nonzero": 10**5, "accuracy": [0.5] * n, "seconds": 1.0}
    figures = dict.fromkeys(("average", "average_along", "learning", "forgetting"), 0.5)
    figures |= dict.fromkeys(("backward_transfer", "forward_transfer"), 0.5)
    matrix = {"what": "matrix", "tasks": [f"t{i}" for i in range(n)], "matrix": [[0.5] * n] * n, "before": [0.1] * n}
    write_rows(folder, [*({**task, "task": i, "name": f"t{i}"} for i in range(n)), matrix | figures])
    assert write_page([folder], tmp_path / "page.html").stat().st_size < 500_000


def test_two_files_are_enough(several, tmp_path):
    folder = tmp_path / several[0].name
    folder.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(several[0] / name, folder)
    assert to_html(read_runs([folder])) == to_html(read_runs([several[0]]))


def test_a_comparison_has_the_figures_of_every_run(several, tmp_path):
    text = write_page(several, tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    compared = compare(read_runs(several))
    assert compared.headline == "3 runs of mlp:16-16" and not compared.alarms and len(page.figures) == 1
    for folder, row in zip(several, compared.table.rows[1:], strict=True):
        matrix = next(row for row in rows_of(folder) if row["what"] == "matrix")
        cells = dict(zip(compared.table.columns, row, strict=True))
        assert cells["Run"] == cells["method"] == folder.name
        assert cells["Final average accuracy"] == f"{100 * matrix['average']:.1f}\xa0%"
        last = [row for row in rows_of(folder) if row["what"] == "task"][-1]
        assert cells["Parameters"] == f"{last['parameters']:,}"
        assert all(f">{cell}</td>" in text for cell in row[1:])


def test_runs_of_other_tasks_do_not_compare(several, tmp_path):
    longer = shutil.copytree(several[1], tmp_path / "longer")
    extend(Invocation(longer), ["digits"])
    (alarm,) = compare(read_runs([several[0], longer])).alarms
    assert "cannot be compared" in alarm


def test_runs_of_one_size_have_no_front(several):
    assert not check_self_contained(to_html(read_runs(several[1:]))).figures


def test_as_many_runs_as_a_page_takes_make_one_of_bounded_size(several, tmp_path):
    assert write_page(several * 20, tmp_path / "page.html").stat().st_size < 1_000_000
