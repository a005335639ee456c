"""Run folders: begun, interrupted, resumed, read; the ledger; checkpoints of a calibration."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from regrow import Plan, apply, trace
from regrow.core.budget import Budget
from regrow.core.plan import PlanError
from regrow.core.scores import Evidence, Need
from regrow.core.sources import Batch, Source
from regrow.methods.pruning import flap
from regrow.methods.pruning.pruner import plan_cut
from regrow.reports import read_runs
from regrow.scoring.collect import CollectionOptions, collect
from regrow.store import StoreError
from regrow.store.ledger import Ledger, replay
from regrow.store.run_folder import RunFolder
from regrow.store.statistics import fingerprint, read_finished_shards, save_statistics, shard_file_name
from store import saved

SETTINGS = {"model": "m", "keep": 0.9, "only": ("mlp",), "sources": [{"name": "news"}]}


@pytest.fixture
def run(tmp_path):
    with RunFolder.create(tmp_path / "run", verb="prune", settings=SETTINGS, command="regrow prune m") as folder:
        yield folder


# --- beginning and resuming -----------------------------------------------------------------------------------------


def test_a_run_that_was_interrupted_goes_on(run):
    (run.path / ".shapes.json.01234567.partial").write_text("half")
    (run.path / ".model.89abcdef.partial").mkdir()
    (run.out.parent / ".run.89abcdef.partial").mkdir()
    run.owner.release()
    with RunFolder.create(run.out, verb="prune", settings=dict(reversed(SETTINGS.items()))) as again:
        assert again.resumed and not run.resumed and again.path == run.path
        assert again.read_record()["command"] == "regrow prune m" and again.read_record()["versions"]["torch"]
        again.finish()
    assert [path.name for path in run.out.iterdir()] == ["run.json"] and len([*run.out.parent.iterdir()]) == 1


def test_another_run_or_something_else_in_the_folder(run, tmp_path):
    def refused(words, path=run.out, verb="prune", **settings):
        with pytest.raises(StoreError, match=words) as caught:
            RunFolder.create(path, verb=verb, settings=SETTINGS | settings)
        assert "\n" not in str(caught.value) and "choose another" in str(caught.value)

    refused("is being written by another process")
    run.owner.release()

    refused(r"keep was 0\.9, here 0\.8\); choose another folder", keep=0.8)
    refused("seed was null, here 3", seed=3)
    refused("a run of 'prune'", verb="learn")
    run.finish()
    refused("finished")
    assert [path.name for path in run.out.iterdir()] == ["run.json"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.doc").write_text("years of work")
    refused("not empty", path=other)
    assert (other / "thesis.doc").exists() and len(list(other.iterdir())) == 1


def test_a_run_goes_on_under_the_defaults_it_began_with(tmp_path):
    def again(**defaults):
        with RunFolder.create(tmp_path / "run", verb="prune", settings=SETTINGS, defaults=defaults) as folder:
            return folder

    assert again(pace=0.25, levels=("a", "b")).read_record()["defaults"] == {"pace": 0.25, "levels": ["a", "b"]}
    assert again(pace=0.25, levels=("a", "b")).resumed
    for other, words in (({"pace": 1.0}, "pace was 0.25 by default, here 1.0"), ({"floor": 1}, "floor was null")):
        with pytest.raises(StoreError, match=f"begun by regrow .*, where {words}.*choose another folder"):
            again(**{"pace": 0.25, "levels": ("a", "b")} | other)
    for name in ("defaults", "versions"):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "run.json").write_text(
            json.dumps(again(pace=0.25, levels=("a", "b")).read_record() | {name: "x"})
        )
        with pytest.raises(StoreError, match=r"Expected `object`, got `str` - at `\$\.(defaults|versions)`"):
            RunFolder.create(tmp_path / "odd", verb="prune", settings=SETTINGS, defaults={"pace": 1.0})


def test_a_folder_that_is_a_file_or_has_a_damaged_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        RunFolder.create(tmp_path / "file", verb="prune", settings={})
    for text in ("{", "[]", "{}", '{"format": "regrow-run/2"}', "[" * 10**5):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(StoreError, match=r"run\.json"):
            RunFolder.create(tmp_path, verb="prune", settings={})
        with pytest.raises(StoreError, match=r"run\.json"):
            RunFolder.open(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(StoreError, match="not a run folder"):
        RunFolder.open(tmp_path)


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    assert not RunFolder.create(tmp_path, verb="prune", settings={}).resumed


def test_finishing(run):
    save_statistics(run.path, "news", 0, measured("news"))
    run.update(notes=["a word"])
    with pytest.raises(StoreError, match="not finished; resume it first: regrow prune m"):
        RunFolder.open(run.out)
    finished = run.finish(seconds={"load": 1.5})
    done = RunFolder.open(run.out).read_record()
    assert done == finished.read_record()
    assert done["seconds"] == {"load": 1.5} and done["notes"] == ["a word"] and done["started"] <= done["finished"]
    assert [path.name for path in run.out.iterdir()] == ["run.json"]


def test_a_report_reads_what_is_written(run):
    net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 2))
    before = trace(net, torch.zeros(1, 4))
    _, after = apply(net, before, Plan.keeping(before, {"0.weight:0": range(7)}))
    run.write_axes(before, after)
    run.log("size", model="dense", params_all=9, params_counted=8, macs=8, bytes=36)
    run.log("perplexity", model="pruned", source="news", ppl=math.inf, nll=1.0)
    assert read_runs([run.out])[0].name == "run", "also while it goes on"
    run = run.finish()
    (page,) = read_runs([run.path])
    assert not page.problems and page.sizes["before"].params_all == 9
    assert page.widths[0].rows[0] == ("0.weight:0", 9, 7)
    assert json.loads((run.path / "axes.json").read_text())["after"][0]["size"] == 7


# --- the log --------------------------------------------------------------------------------------------------------


def test_a_damaged_line_is_an_error(run):
    for rest in ('{"what": "b"}\n', ""):
        (run.path / "metrics.jsonl").write_text('{"what": "a"}\nrubbish\n' + rest)
        with pytest.raises(StoreError, match="line 2 is not a measurement"):
            run.metrics()


def test_a_full_disk_leaves_the_log_as_it_was(run, monkeypatch):
    run.log("a")
    before = (run.path / "metrics.jsonl").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="disk is full"):
        patch.setattr("regrow.store.atomic.os.fsync", full)
        run.log("b", text="x" * 40)
    assert (run.path / "metrics.jsonl").read_bytes() == before


# --- the ledger -----------------------------------------------------------------------------------------------------


def plans_for(model):
    axes = trace(model, *saved.CASES["callable"].example()[0])
    start, plans = axes, []
    for left in (range(1, 9), (0, 2, 5)):
        plans.append(Plan.keeping(axes, {"rise.weight:0": left}))
        model, axes = apply(model, axes, plans[-1])
    return start, plans, model


def test_a_ledger_keeps_plans_in_order_and_replays_them(tmp_path):
    axes, plans, cut = plans_for(saved.small())
    ledger = Ledger(tmp_path / "ledger.json")
    assert ledger.plans() == () and len(ledger) == 0
    for plan in plans:
        ledger.append(plan)
    assert ledger.plans() == tuple(plans) and len(ledger) == 2
    again, after = replay(saved.small(), axes, ledger.plans())
    assert torch.equal(again.rise.weight, cut.rise.weight) and after["rise.weight:0"].ids == (1, 3, 6)
    json.loads((tmp_path / "ledger.json").read_text())


def test_the_plan_of_a_run_is_that_of_its_last_attempt(tmp_path):
    _, (first, second), _ = plans_for(saved.small())
    ledger = Ledger(tmp_path / "ledger.json")
    ledger.replace(first)
    before = ledger.path.stat().st_mtime_ns
    ledger.replace(first)
    assert ledger.plans() == (first,) and ledger.path.stat().st_mtime_ns == before, "not written again"
    ledger.replace(second)
    assert ledger.plans() == (second,)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["plans"][1]["changes"]["rise.weight:0"]["keep"].append(99),
        lambda d: d["plans"][1]["changes"]["rise.weight:0"]["keep"].clear(),
        lambda d: d["plans"][1]["changes"]["rise.weight:0"].pop("slots"),
        lambda d: d["plans"][1].update(format="other"),
        lambda d: d["plans"].__setitem__(1, 3),
    ],
)
def test_a_tampered_plan(tmp_path, spoil):
    ledger = Ledger(tmp_path / "ledger.json")
    for plan in plans_for(saved.small())[1]:
        ledger.append(plan)
    data = json.loads(ledger.path.read_text())
    spoil(data)
    ledger.path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match="plan 2") as caught:
        ledger.plans()
    assert "\n" not in str(caught.value)


def test_a_plan_that_is_legal_but_of_another_network(tmp_path):
    axes, plans, _ = plans_for(saved.small())
    with pytest.raises(PlanError):
        replay(saved.small(), axes, reversed(plans))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "regrow-ledger/2"}', '{"plans": []}'])
def test_a_damaged_ledger_is_not_written_over(tmp_path, text):
    path = tmp_path / "ledger.json"
    path.write_text(text)
    with pytest.raises(StoreError, match="restore it"):
        Ledger(path).append(Plan())
    assert path.read_text() == text


# --- checkpoints ----------------------------------------------------------------------------------------------------


def source(name, seed=0, batches=4):
    generator = torch.Generator().manual_seed(seed)
    return Source(
        name,
        [
            Batch((torch.randn(3, 6, generator=generator),), labels=torch.randint(0, 4, (3,), generator=generator))
            for _ in range(batches)
        ],
    )


def measured(name, seed=0):
    model = saved.small()
    axes = trace(model, *saved.CASES["callable"].example()[0])
    return collect(model, axes, [source(name, seed)], {Need.ACTIVATIONS, Need.GRADIENTS, Need.FISHER})[name][0]


def same(a, b):
    sums = ("count", "total", "square")
    assert (a.source, a.tokens, list(a.moments), list(a.gradients), list(a.fisher)) == (
        *(b.source, b.tokens),
        *(list(b.moments), list(b.gradients), list(b.fisher)),
    )
    for name, moments in a.moments.items():
        assert all(torch.equal(*(torch.as_tensor(getattr(m, s)) for m in (moments, b.moments[name]))) for s in sums)
    assert all(torch.equal(gradient, b.gradients[name]) for name, gradient in a.gradients.items())
    assert all(torch.equal(squares, b.fisher[key]) for key, squares in a.fisher.items())
    return True


def test_statistics_come_back_bit_for_bit(run):
    statistics = measured("news")
    assert statistics.moments and statistics.gradients and statistics.fisher
    save_statistics(run.path, "news", 1, statistics, key="k")
    found = read_finished_shards(run.path, {"news": "k", "code": "k"}, shards=3)
    assert found.keys() == {("news", 1)} and same(found["news", 1], statistics)
    assert read_finished_shards(run.path, {"news": "other"}, shards=3) == {}


def test_damaged_checkpoints_are_measured_again(run):
    save_statistics(run.path, "news", 0, measured("news"))
    (path,) = (run.path / "statistics").iterdir()
    whole = path.read_bytes()
    for data in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"rubbish" * 9):
        path.write_bytes(data)
        assert read_finished_shards(run.path, {"news": ""}) == {}
    path.write_bytes(whole)
    assert read_finished_shards(run.path, {"news": ""})


@given(st.text(max_size=80), st.text(max_size=80), st.integers(0, 99), st.integers(0, 99))
def test_names_of_sources_are_never_paths(one, other, shard, another):
    name = shard_file_name(one, shard)
    assert Path(name).name == name and name == name.lower() and name.isascii() and len(name) < 100
    assert not name.startswith((".", "-"))
    assert (name == shard_file_name(other, another)) == ((one, shard) == (other, another))


def test_hostile_names_of_sources(run):
    names = ["../../up", "/etc/passwd", "a/b", "..", "", "nul\0", "ü" * 300, "News", "news", "news-0", "con", "-x"]
    for name in names:
        save_statistics(run.path, name, 0, measured("news"))
    files = list(run.path.rglob("*"))
    assert len([path for path in files if path.is_file()]) == len(names) + 1
    assert not list(run.path.parent.glob("up*"))


def test_fingerprints_see_every_batch_and_setting():
    base = fingerprint(source("a"), "flap", 4)
    assert base == fingerprint(source("b"), "flap", 4)
    assert base not in (
        fingerprint(source("a", seed=1), "flap", 4),
        fingerprint(source("a", batches=3), "flap", 4),
        fingerprint(source("a"), "flap", 5),
        fingerprint(source("a"), "flap4"),
    )
    kwargs = [Source("a", [Batch(kwargs={"x": torch.ones(2), "y": y})]) for y in (None, True, 1)]
    assert len({fingerprint(one) for one in kwargs}) == 3


def pruned(folder, die_after=0):
    """A calibration with checkpoints, and its plan; the process may be killed on the way."""
    model = saved.small()
    axes = trace(model, *saved.CASES["callable"].example()[0])
    sources = [source("news", 1), source("code", 2)]
    run = RunFolder.create(folder, verb="prune", settings={})
    run.owner.release()
    keys = {s.name: fingerprint(s) for s in sources}
    done = read_finished_shards(run.path, keys, shards=2)
    finished = len(done)

    def keep(name, shard, statistics):
        nonlocal finished
        save_statistics(run.path, name, shard, statistics, key=keys[name])
        finished += 1
        if finished == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    method = flap.build(flap.Settings())
    statistics = collect(
        model, axes, sources, method.needs, shards=2, options=CollectionOptions(done=done, on_done=keep)
    )
    return plan_cut(method, model, axes, Budget(0.7), Evidence(statistics)).plan, len(done)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_calibration_killed_half_way_gives_the_same_plan(tmp_path):
    code = "import pathlib, sys; from test_run_folder import pruned; pruned(pathlib.Path(sys.argv[1]), 3)"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "a")], env=environment)
    assert killed.returncode == -signal.SIGKILL
    plan, resumed = pruned(tmp_path / "a")
    whole, fresh = pruned(tmp_path / "b")
    assert (resumed, fresh) == (3, 0)
    assert plan.to_json() == whole.to_json() and plan.means
