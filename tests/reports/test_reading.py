"""What is read of run folders: whole, interrupted, damaged and hostile ones."""

import json
import math
import random
import subprocess
import sys

import pytest

from regrow.reports import ReportError, read_runs, to_html
from regrow.reports.comparison import compare, find_differences
from regrow.reports.records import mean_perplexities
from regrow.reports.summary import describe_proof, next_command, quality_table, summarise
from regrow.store.metrics import VerifyRow
from reports.folders import GROUPS, KINDS, LAYERS, NEURONS, ODD, mlp, rows_of, write_rows, write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_complete_run(folder):
    (run,) = read_runs([folder])
    assert not run.problems
    assert [row.name for row in run.quality] == ["news", "code", "manual", "talk", "piqa", "arc-easy"]
    news = run.quality[0]
    assert news.value("before") == 33.2 and news.lost == pytest.approx(math.log(41.0 / 33.2)) and news.seen
    assert news.error("before") == pytest.approx(33.2 * math.expm1(1.96 * 0.028))
    unseen = [row for row in run.quality if row.seen is False]
    assert mean_perplexities(unseen)[0] == pytest.approx(math.sqrt(14.1 * 26.4))
    neurons, groups = run.widths
    assert neurons.name == "MLP neurons" and neurons.before == LAYERS * NEURONS > neurons.after
    assert groups.before == LAYERS * GROUPS and groups.after == groups.before - 2
    assert [key for key, *_ in neurons.rows] == [mlp(layer) for layer in range(LAYERS)]
    assert run.sizes["changed"].params_counted == round(106_168_320 * 0.9)
    assert [row.ok for row in run.rows_of(VerifyRow)] == [True, True]
    assert describe_proof(run).startswith("Its outputs equal those of the model before with the removed units masked.")


def test_a_target_is_shown_with_its_limit(folder):
    def ask(run):
        run["settings"] |= {"keep": None, "target": "kv_cache=50M@4096"}

    edit(folder / "run.json", ask)
    row = {"what": "budget", "measure": "kv_cache", "context": 4096, "asked": 5e7, "before": 9.4e7, "after": 4.9e7}
    write_rows(folder, [*rows_of(folder), row])
    (run,) = read_runs([folder])
    (figures,) = [row for row in summarise(run).figures if "cache" in row.label]
    assert figures.label == "Target: key-value cache at 4,096 tokens"
    assert (figures.before, figures.after) == ("94.0\xa0MB", "49.0\xa0MB")
    assert figures.remark == "allowed at most 50.0\xa0MB"


def test_a_cut_that_does_not_hold_is_an_alarm(folder):
    rows = [row | {"max_abs_diff": 1.0} if row["what"] == "verify" else row for row in rows_of(folder)]
    write_rows(folder, rows)
    alarm, *_ = summarise(read_runs([folder])[0]).alarms
    assert alarm.startswith("Do not use it: its outputs differ from")


@pytest.mark.parametrize("fitted", [False, True])
def test_what_was_recovered_is_shown_beside_the_cut(folder, fitted):
    rows = rows_of(folder)
    before = {row["source"]: row for row in rows if row["what"] == "perplexity" and row["model"] == "dense"}
    after = [row for row in rows if row["what"] == "perplexity" and row["model"] == "pruned"]
    if fitted:  # the cut lost twice as much
        rows += [{**row, "model": "cut", "ppl": row["ppl"] ** 2 / before[row["source"]]["ppl"]} for row in after]
        rows.append({"what": "reconstruction", "tokens": 8192, "layers": [{}] * 60, "seconds": 1.0})
    else:
        rows += [{**row, "model": "recovered"} for row in before.values()]
        rows += [{"what": "paired", "source": source, "delta_nll": 0.0, "of": []} for source in before]
        rows.append({"what": "recovery", "by": "refit", "tokens": 8192, "seconds": 1.0})
    write_rows(folder, rows)
    (run,) = read_runs([folder])
    won = [row.recovered for row in run.quality if row.seen is not None]
    assert won == pytest.approx([0.5 if fitted else 1.0] * len(KINDS))
    table = quality_table(run)
    steps = ["Cut", "Reconstructed"] if fitted else ["Pruned", "Recovered"]
    assert list(table.columns) == ["", "Before", *steps, "Change", "Loss recovered"]
    told = "60 layers were fitted by least squares on 8,192 tokens" if fitted else "Recovered by refit on 8,192 tokens"
    assert told in " ".join(summarise(run).details) and told in to_html([run])


def test_the_next_command_follows_from_the_run(folder):
    def said(**change):
        edit(folder / "run.json", lambda run: run.update(change))
        return next_command(read_runs([folder])[0])

    assert said() == "regrow recover run --by distil --out run-recovered"
    (folder / "tokenizer_config.json").write_text("{}")  # fewer tokens were not seen to mend answers
    assert said() == "regrow recover run --by distil --tokens 262144 --out run-recovered"
    (folder / "tokenizer_config.json").unlink()
    assert said(sources=[]) == "regrow export run --to onnx --out run.onnx"
    (folder / "tokenizer_config.json").write_text("{}")
    assert said() == "regrow chat run"
    assert said(verb="learn") == "regrow learn --resume run --task TASK"
    assert said(command="regrow.prune(…) in Python") == ""
    assert said(finished=None, command="regrow prune m --out run") == "regrow prune m --out run"


def test_figures_and_templates_are_loaded_only_when_asked_for():
    code = "import sys, regrow.reports; sys.exit('matplotlib' in sys.modules or 'jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_run_json(folder):
    for name in ("axes.json", "metrics.jsonl"):
        (folder / name).unlink()
    edit(folder / "run.json", lambda run: run.pop("finished"))
    (run,) = read_runs([folder])
    assert run.problems == ["metrics.jsonl is missing", "axes.json is missing"] and not run.widths
    assert any("interrupted" in alarm for alarm in summarise(run).alarms)


def test_an_axis_that_is_gone_was_removed_with_its_block(folder):
    edit(folder / "axes.json", lambda axes: axes.update(after=[r for r in axes["after"] if r["key"] != mlp(3)]))
    assert read_runs([folder])[0].widths[0].rows[3] == (mlp(3), NEURONS, 0)
    edit(folder / "run.json", lambda run: run.update(verb="recover"))  # its network was traced again
    assert len(read_runs([folder])[0].widths[0].rows) == LAYERS - 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": "regrow-run/9"}', "[" * 100_000, "\x00"])
def test_not_a_run_folder(tmp_path, content):
    with pytest.raises(ReportError, match=r"no run\.json"):
        read_runs([tmp_path])
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ReportError, match=r"run\.json"):
        read_runs([tmp_path])


def test_the_number_of_folders(folder):
    for folders in ([], [folder] * 65):
        with pytest.raises(ReportError, match="1 to 64"):
            read_runs(folders)


def test_damaged_files_are_left_out_and_named(folder):
    (folder / "axes.json").write_text("[1, 2]")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"what": "perpl')  # cut short by a crash
    (run,) = read_runs([folder])
    assert [problem.split(" ")[0].strip(":") for problem in run.problems] == ["axes.json"]
    assert len(run.quality) == 6 and str(folder) not in "".join(run.problems)


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
    (whole,) = read_runs([folder])
    path = folder / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}{line}\n")
    (run,) = read_runs([folder])
    first, last = run.problems
    assert first.startswith("metrics.jsonl: line 1")
    assert last.startswith(f"metrics.jsonl: line {len(path.read_text().splitlines())}")
    assert all(problem.endswith("left out") for problem in run.problems)
    assert run.rows == whole.rows and run.quality == whole.quality and run.sizes == whole.sizes


def test_an_axis_of_absurd_size_is_named(folder):
    edit(folder / "axes.json", lambda axes: axes["before"].append({"key": "huge", "size": 10**30}))
    (run,) = read_runs([folder])
    assert any(problem.startswith("axes.json: ") for problem in run.problems) and run.quality


def test_nothing_in_a_folder_can_break_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.folders.LAYERS", 2)
    monkeypatch.setattr("regrow.reports.page.FIGURES", dict.fromkeys(("quality", "search"), lambda run: None))
    folder = write_run(tmp_path / "run", "gprune")
    rng = random.Random(0)
    names = ["run.json", "axes.json", "metrics.jsonl"]
    whole = {name: (folder / name).read_text() for name in names}
    for _ in range(200):
        name = rng.choice(names)
        lines = whole[name].splitlines() if name.endswith("l") else [whole[name]]
        place = rng.randrange(len(lines))
        lines[place] = json.dumps(_damaged(json.loads(lines[place]), rng, depth=rng.randint(1, 6)))
        (folder / name).write_text("\n".join(lines))
        try:
            to_html(read_runs([folder]))
        except ReportError:
            assert name == "run.json"
        (folder / name).write_text(whole[name])


def _damaged(value, rng, depth):
    """The value with one part of it, ``depth`` levels down or fewer, replaced by something odd."""
    if depth == 0 or not isinstance(value, dict | list) or not value:
        return rng.choice(ODD)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    value[key] = _damaged(value[key], rng, depth - 1)
    return value


def test_compared_runs_have_names_of_their_own_and_the_settings_that_differ(tmp_path):
    cases = [("flap", 0.9, 0), ("flap", 0.9, 1), ("random", 0.9, 0)]
    folders = [write_run(tmp_path / str(i) / "run", method=m, keep=k, seed=s) for i, (m, k, s) in enumerate(cases)]
    runs = read_runs(folders)
    assert [run.name for run in runs] == ["run #1", "run #2", "run #3"]
    assert find_differences(runs) == {"method": ["flap", "flap", "random"], "seed": ["0", "1", "0"]}
    compared = compare(runs)
    assert len(compared.averages) == 1
    assert compared.averages[0].startswith("run #1, run #2: perplexity ")
    assert not any("differ in" in alarm for alarm in compared.alarms)
    edit(folders[1] / "run.json", lambda run: run["settings"].update(tokens=99))
    compared = compare(read_runs(folders))
    assert not compared.averages
    assert any("differ in tokens, too" in alarm for alarm in compared.alarms)


def test_a_setting_of_one_run_may_be_the_default_of_another(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    edit(folders[0] / "run.json", lambda run: run["settings"].update(method_settings={"ratio": 1.0}))
    edit(folders[0] / "run.json", lambda run: run.update(defaults={"minimum": 1.0, "metric": "wifv"}))
    edit(folders[1] / "run.json", lambda run: run["settings"].update(method_settings={}))
    edit(folders[1] / "run.json", lambda run: run.update(defaults={"ratio": 0.25, "minimum": 0.0, "metric": "wifv"}))
    assert find_differences(read_runs(folders)) == {"minimum": ["1", "0"], "ratio": ["1", "0.25"]}
