import json
import math
import random
import subprocess
import sys

import msgspec
import pytest

from regrow.reports import ReportError, summarise, to_markdown
from regrow.reports.findings import module_means, rank_means
from regrow.reports.reading import ABSENT
from reports.folders import GROUPS, LAYERS, NEURONS, STAYING, mlp, write_run

ODD = (None, True, -1, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "<script>alert(1)</script>")
ODD += ("\ud800", [], {}, [[[]]], {"": None}, [None, 3, "a"], "\x00\x1b[31m\u202e", {"a": {"b": [1]}})


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_complete_run(folder):
    summary = summarise([folder])
    (run,) = summary.runs
    assert not run.missing and not run.problems
    assert [row.source for row in run.perplexity] == ["news", "code", "manual", "talk"] == summary.domains
    news = run.perplexity[0]
    assert news.ppl("before") == 33.2 and news.ratio == pytest.approx(41.0 / 33.2) and news.seen
    assert news.before.ends[0] == pytest.approx(33.2 * math.exp(-1.96 * 0.028))
    assert run.means["unseen"].before == pytest.approx(math.sqrt(14.1 * 26.4))
    neurons, groups = run.widths
    assert neurons.kind == "MLP neurons" and neurons.before == LAYERS * NEURONS > neurons.after
    assert groups.before == LAYERS * GROUPS and groups.changed == 2
    assert [row.depth for row in neurons.rows] == list(range(LAYERS))
    assert run.frozen == {"the vocabulary: the model's output": 1}
    assert run.size.after.params_counted == round(106_168_320 * 0.9)
    assert [row.holds for row in run.verify] == [True, True]


def test_what_a_method_saw(tmp_path):
    (run,) = summarise([write_run(tmp_path / "run", "gprune", 0.8)]).runs
    found = run.findings
    assert not run.missing and not run.problems and found.sources == ["news", "code", "manual", "talk"]
    neurons, heads = rank_means(found)
    assert (neurons.units, neurons.axes, neurons.pooled) == (LAYERS * NEURONS, LAYERS, False)
    assert (heads.units, heads.axes, heads.pooled) == (LAYERS * GROUPS, LAYERS, True)
    assert heads.means["spearman"] == pytest.approx(0.8)
    (_, cells), (pooled, others) = module_means(found)
    grid = [f"{a} {b}" for a in ("robust", "sensitive") for b in ("weak", "strong")]
    assert [row.name for row in cells] == [*grid, "All"] and [row.name for row in others][:2] == ["robust", "sensitive"]
    assert pooled.endswith(", ranked together")
    assert cells[2].units == LAYERS * NEURONS // 4 and cells[2].means["switched"] == pytest.approx(2 / 3)
    assert cells[-1].units == LAYERS * NEURONS


def test_modules_of_whole_axes_and_an_interrupted_run(tmp_path):
    folder = write_run(tmp_path / "run", "gprune")

    def whole(found):
        tested = {row["space"]: row for row in found["modules"] if " more" not in row["name"]}
        found["modules"] = [row | {"name": key} for key, row in tested.items()]
        for row in found["modules"]:
            del row["learned"], row["given"]
        del found["best_step"]

    edit(folder / "findings.json", whole)
    ((_, (row,)),) = module_means(summarise([folder]).runs[0].findings)
    assert row.name == "One module per layer" and row.means["start"] is not None and row.means["learned"] is None
    assert "at step 60 of 100" in to_markdown(summarise([folder]))  # the lowest so far


def test_findings_that_do_not_fit_are_left_out_and_named(tmp_path):
    folder = write_run(tmp_path / "run", "gprune")
    edit(folder / "findings.json", lambda found: found["modules"][0].update(start=1.5))
    (run,) = summarise([folder]).runs
    assert run.findings is None and len(run.problems) == 1 and len(run.perplexity) == 4
    assert run.problems[0].startswith("findings.json: modules.0.start is 1.5: ") and "left out" in run.problems[0]


def test_a_target_and_a_regular_plan_are_told(folder):
    def asked(run):
        run["settings"] |= {"keep": None, "target": "kv_cache=50M@4096", "regular": True}

    edit(folder / "run.json", asked)
    row = {"what": "budget", "measure": "kv_cache", "context": 4096, "asked": 5e7, "before": 9.4e7, "after": 4.9e7}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    summary = summarise([folder])
    (run,) = summary.runs
    assert run.label == "flap kv_cache=50M@4096 regular" and run.keep is None
    found = to_markdown(summary)
    assert "The plan is regular" in found and "at 4,096 tokens" in found
    assert "allowed at most 50.0\N{NO-BREAK SPACE}MB, before 94.0\N{NO-BREAK SPACE}MB" in found


def test_figures_and_templates_are_loaded_only_when_asked_for():
    code = "import sys, regrow.reports; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ABSENT)
def test_a_missing_file_is_said(folder, name):
    (folder / name).unlink()
    (run,) = summarise([folder]).runs
    assert list(run.missing) == [name]
    assert name in to_markdown(summarise([folder]))


def test_without_axes_the_plan_gives_the_widths(folder):
    whole = summarise([folder]).runs[0]
    (folder / "axes.json").unlink()
    run = summarise([folder]).runs[0]
    assert [kind.after for kind in run.widths] == [kind.after for kind in whole.widths]
    assert run.widths[0].kind == "model.layers.*.mlp.gate_proj.weight:0"
    assert [row.depth for row in run.widths[0].rows] == list(range(LAYERS))


def test_only_run_json(folder):
    for name in ABSENT:
        (folder / name).unlink()
    edit(folder / "run.json", lambda run: run.pop("finished"))
    (run,) = summarise([folder]).runs
    assert len(run.missing) == 4 and not run.widths and run.scores is None
    assert any("interrupted" in problem for problem in run.problems)


def test_widths_follow_two_plans_with_units_that_came_back_and_new_ones(folder):
    layer = STAYING[0][0]

    def again(ledger):
        first = ledger["plans"][0]["changes"][mlp(layer)]
        ids = [first["ids"][i] for i in first["keep"]]
        second = first | {"size": len(ids), "keep": list(range(len(ids))), "ids": ids, "restore": [7], "grow": 3}
        ledger["plans"].append(ledger["plans"][0] | {"changes": {mlp(layer): second}})

    (folder / "axes.json").unlink()
    edit(folder / "ledger.json", again)
    row = summarise([folder]).runs[0].widths[0].rows[layer]
    plans = json.loads((folder / "ledger.json").read_text())["plans"]
    assert (row.before, row.after) == (NEURONS, len(plans[0]["changes"][mlp(layer)]["keep"]) + 1 + 3)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": "regrow-run/9"}', "[" * 100_000, "\x00"])
def test_not_a_run_folder(tmp_path, content):
    with pytest.raises(ReportError, match=r"no run\.json"):
        summarise([tmp_path])
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ReportError, match=r"run\.json"):
        summarise([tmp_path])


def test_the_number_of_folders(folder):
    for folders in ([], [folder] * 65):
        with pytest.raises(ReportError, match="1 to 64"):
            summarise(folders)


def test_damaged_files_are_left_out_and_named(folder):
    (folder / "ledger.json").write_text('{"format": "regrow-led')
    (folder / "scores.json").write_text("[1, 2]")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"what": "perpl')  # cut short by a crash
    (run,) = summarise([folder]).runs
    assert [problem.split(" ")[0].strip(":") for problem in run.problems] == ["ledger.json", "scores.json"]
    assert len(run.perplexity) == 4 and str(folder) not in "".join(run.problems)


@pytest.mark.parametrize(
    "line",
    [
        '{"what": "perplexity", "model": "pruned", "source": "news", "ppl": 9.0, "nll": 1.0, "se": -3}',
        '{"what": "perplexity", "model": "pruned", "source": "code", "ppl": "9.1", "nll": 1.0}',
        '{"what": "paired", "source": "talk", "delta_nll": 1e9}',
        '{"what": "size", "model": "pruned", "params_all": 1e99, "macs": true}',
        '{"what": "perpl',
    ],
)
def test_a_line_that_does_not_fit_is_left_out_alone_and_named(folder, line):
    (whole,) = summarise([folder]).runs
    path = folder / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}{line}\n")
    (run,) = summarise([folder]).runs
    first, last = run.problems
    assert first.startswith("metrics.jsonl: line 1")
    assert last.startswith(f"metrics.jsonl: line {len(path.read_text().splitlines())}")
    assert all(problem.endswith("left out") for problem in run.problems)
    shown = ("perplexity", "size", "choice", "verify", "widths")
    assert all(getattr(run, name) == getattr(whole, name) for name in shown) and run.perplexity[0].delta_nll


def test_an_axis_of_absurd_size_is_named(folder):
    edit(folder / "axes.json", lambda axes: axes["before"].append({"key": "huge", "size": 10**30}))
    (run,) = summarise([folder]).runs
    assert any(problem.startswith("axes.json: before.") for problem in run.problems) and run.perplexity


def test_nothing_in_a_folder_can_break_the_summary(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.folders.LAYERS", 2)
    folder = write_run(tmp_path / "run", "gprune")
    rng = random.Random(0)
    names = ["run.json", "ledger.json", "axes.json", "scores.json", "findings.json", "metrics.jsonl"]
    whole = {name: (folder / name).read_text() for name in names}
    for turn in range(200):
        name = rng.choice(names)
        lines = whole[name].splitlines() if name.endswith("l") else [whole[name]]
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(_damaged(json.loads(lines[place]), rng, depth=rng.randint(1, 6)))
        (folder / name).write_text("\n".join(lines))
        try:
            summary = summarise([folder])
        except ReportError:
            assert name == "run.json"
        else:
            json.dumps(msgspec.to_builtins(summary), allow_nan=False)
            to_markdown(summary) if turn % 8 == 0 else None
        (folder / name).write_text(whole[name])


def _damaged(value, rng, depth):
    """The value with one part of it, ``depth`` levels down or fewer, replaced by something odd."""
    if depth == 0 or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key] = _damaged(value[key], rng, depth - 1)
    return value


def test_comparison_labels_tell_runs_apart(tmp_path):
    runs = [write_run(tmp_path / str(i), method=m, keep=k, seed=s) for i, (m, k, s) in enumerate(
        [("flap", 0.9, 0), ("flap", 0.9, 1), ("random", 0.9, 0), ("flap", 0.8, 0), ("flap", 0.8, 0)]
    )]  # fmt: skip
    labels = [run.label for run in summarise(runs).runs]
    assert labels == ["flap 0.9 seed 0", "flap 0.9 seed 1", "random 0.9", "flap 0.8 seed 0 3", "flap 0.8 seed 0 4"]
