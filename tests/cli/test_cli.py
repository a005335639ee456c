"""The command line: what works, and what every mistake is answered with."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.conftest import Run
from regrow import Plan, load, trace, with_branches
from regrow.core.plan import PlanError
from regrow.store.ledger import Ledger, read_plan, replay

PRUNE = (
    "prune",
    "toys:classifier",
    "--method",
    "magnitude",
    "--source",
    "digits",
    "--tokens",
    "256",
    "--eval-tokens",
    "200",
)


def test_prune_evaluate_and_show_a_network_of_ones_own(regrow: Run) -> None:
    code, out, err = regrow(*PRUNE, "--keep", "0.6", "--finetune", "2", "--out", "run")
    assert code == 0, err
    assert "Its outputs equal those of" in out and "Accuracy" in out and "go on with: regrow recover run" in out
    assert (Path("run") / "report.html").stat().st_size > 5_000
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    sizes = {row["model"]: row["params_counted"] for row in rows if row["what"] == "size"}
    assert 0 < sizes["pruned"] <= 0.6 * sizes["dense"]
    import toys

    model = load("run", model=lambda: toys.classifier()[0])
    assert model.body[0].out_channels < 12
    code, out, _ = regrow("show", "toys:classifier")
    assert code == 0 and "12" in out and "neutral" in out
    code, out, _ = regrow("show", "run", "--code", "toys:classifier")
    assert code == 0 and "History of the network" in out and "regrow prune toys:classifier" in out


def test_show_says_how_a_network_was_traced(regrow: Run) -> None:
    for name, words in (("classifier", "on fake data"), ("picking", "by recording one eager run")):
        code, out, err = regrow("show", f"toys:{name}")
        assert code == 0, err
        assert f"traced {words}" in " ".join(out.split())
    assert "since torch.export refuses" in " ".join(out.split())


def test_a_branch_is_dropped(regrow: Run) -> None:
    import toys

    whole, example = toys.stepping()
    Path("drop.json").write_text(Plan.dropping(with_branches(whole, trace(whole.eval(), example)), ["body"]).to_json())
    code, _, err = regrow("apply", "drop.json", "toys:stepping", "--out", "less")
    assert code == 0, err
    less = load("less", model=lambda: toys.stepping()[0])
    assert torch.equal(less(example), whole.last(whole.first(example)))
    assert not [name for name, _ in less.named_parameters() if name.startswith("body")]


def test_a_dry_run_writes_the_plan_that_apply_runs(regrow: Run) -> None:
    code, _, err = regrow(*PRUNE, "--keep", "0.5", "--dry-run", "plan.json")
    assert code == 0, err
    plan = read_plan(json.loads(Path("plan.json").read_text()))
    code, _, err = regrow("apply", "plan.json", "toys:classifier", "--out", "cut")
    assert code == 0, err
    import toys

    model = load("cut", model=lambda: toys.classifier()[0])
    assert model.body[0].out_channels == len(plan.changes["body.0.weight:0"].keep)


WIDE = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.first(x).relu()
        return self.last(h * (2.0 if h.shape[-1] >= 12 else 1.0))

def net():
    return Wide().eval(), torch.ones(3, 4)
"""


def test_a_plan_past_a_branch_on_a_width_is_refused_by_apply_and_replay(
    regrow: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("own_wide.py").write_text(WIDE)
    monkeypatch.syspath_prepend(".")
    model, example = importlib.import_module("own_wide").net()
    axes = trace(model, example)
    plan = Plan.keeping(axes, {"first.weight:0": range(6)})
    Path("plan.json").write_text(plan.to_json())
    code, _, err = regrow("apply", "plan.json", "own_wide:net", "--out", "cut")
    assert code == 2 and "own_wide.py:12: return self.last(h * (2.0 if h.shape[-1] >= 12 else 1.0))" in err, err
    assert not Path("cut").exists()
    with pytest.raises(PlanError, match="depends on the size"):
        replay(model, axes, [plan])


def test_a_plan_that_grows_and_a_ledger_that_restores_are_applied(regrow: Run) -> None:
    import toys

    whole, example = toys.classifier()
    axes = trace(whole.eval(), example)
    key = "body.0.weight:0"
    Path("grow.json").write_text(Plan.growing(axes, {key: 4}).to_json())
    code, _, err = regrow("apply", "grow.json", "toys:classifier", "--out", "wide")
    assert code == 0, err
    wide = load("wide", model=lambda: toys.classifier()[0])
    assert wide.body[0].out_channels == 16 and len(Ledger(Path("wide/ledger.json"))) == 1
    assert torch.allclose(wide(example), whole(example), atol=1e-6)
    cut = Plan.keeping(axes, {key: range(6)})
    _, left = replay(toys.classifier()[0].eval(), axes, [cut])
    for plan in (cut, Plan.restoring(left, {key: range(6, 12)})):
        Ledger(Path("ledger.json")).append(plan)
    code, _, err = regrow("apply", "ledger.json", "toys:classifier", "--out", "back")
    assert code == 0, err
    assert torch.equal(load("back", model=lambda: toys.classifier()[0])(example), whole(example))
    Path("back.json").write_text(Plan.restoring(left, {key: (7,)}).to_json())
    code, _, err = regrow("apply", "back.json", "toys:classifier", "--out", "none")
    assert code != 0 and "12 units here, the plan was made for 6" in err and not Path("none").exists()


def test_the_settings_of_a_run_give_the_same_plan(regrow: Run) -> None:
    regrow(*PRUNE, "--keep", "0.5", "--out", "one")
    code, _, err = regrow("prune", "toys:classifier", "--config", "one", "--out", "two")
    assert code == 0, err
    plans = [json.loads((Path(name) / "ledger.json").read_text())["plans"][0]["changes"] for name in ("one", "two")]
    assert plans[0] == plans[1]
    code, out, _ = regrow("report", "one", "two", "--out", "both.html")
    assert code == 0 and Path("both.html").exists()
    assert ["Run", "before", "one", "two"] in [line.split() for line in out.splitlines()], "few runs stand across"


def test_a_network_is_searched_for_a_size(regrow: Run) -> None:
    given = ("--data", "digits", "--train", "200", "--test", "50", "--stages", "1", "--epochs", "3", "--retrain", "1")
    code, out, err = regrow("search", "cells:3-2-1", *given, "--target", "params=40%", "--stride", "1", "--out", "run")
    assert code == 0, err
    said = " ".join(out.split())
    assert "3 epochs leave the last stage no cut before its end" in out + err
    assert "found a network of" in said and "trained further." in said and "allowed at most" in said
    assert type(load("run")).__name__ == "Cells"
    code, _, err = regrow("search", "cells:3-2-1", *given, "--target", "7", "--out", "other")
    assert code == 2 and "a target is like" in err and not Path("other").exists()
    code, out, _ = regrow("methods", "mgas")
    assert code == 0 and "reconstructed" in out.lower() and "--set lr_threshold=2" in out
    assert "--set levels=operations,filters,weights" in out.replace("\n", "")


def test_tasks_are_learned_one_after_the_other_and_more_when_they_come(regrow: Run) -> None:
    given = ("--epochs", "2", "--train", "200", "--test", "50", "--model", "mlp:8")
    code, out, err = regrow("learn", "permuted:digits:2", *given, "--out", "run")
    assert code == 0, err
    assert "permuted-2" in out and "Final average accuracy" in out
    code, out, err = regrow("learn", "--resume", "run", "--task", "digits")
    assert code == 0, err
    assert "digits" in out
    assert load("run")[1].in_features == 64
    assert (
        "report.html" in out
        and "regrow learn --resume run" in out
        and "digits" in Path("run/report.html").read_text("utf-8")
    )
    parameters = [line.split()[-1] for line in out.splitlines() if line.startswith(("permuted-", "digits"))]
    assert parameters[0] == "610" and all(one.replace(",", "").isdecimal() for one in parameters), "in one column"
    code, _, err = regrow("learn", "digits", "--without-old", "--out", "other")
    assert code == 2 and "--resume RUN" in err
    code, _, err = regrow("learn", "digits", "--resume", "run", "--epochs", "7", "--set", "strength=3")
    assert code == 2 and "leave out TASKS, --set, --epochs" in err
    code, _, err = regrow("learn", "digits", "--task", "digits", "--out", "other")
    assert code == 2 and "--resume" in err
    code, _, err = regrow("learn", "permuted:digits:2", "--method", "sparsgrow", "--out", "other")
    assert code == 2 and "did you mean 'sparsegrow'?" in err
    code, out, _ = regrow("methods", "sparsegrow")
    assert code == 0 and "reconstructed" in out.lower() and "--set gate=kronecker" in out


def test_methods_are_listed_and_explained(regrow: Run) -> None:
    code, out, _ = regrow("methods")
    assert code == 0 and all(name in out for name in ("random", "magnitude", "wanda_sp", "flap", "llm_pruner"))
    code, out, _ = regrow("methods", "flap")
    assert code == 0 and "compensate=true" in out and "AAAI 2024" in out


MISTAKES = {
    "missing model": (("prune", "no-such-model", "--keep", "0.8", "--out", "run"), "no-such-model"),
    "not a model": (("prune", "text.txt", "--keep", "0.8", "--out", "run"), "text.txt"),
    "pickle": (("prune", "weights.pth", "--keep", "0.8", "--out", "run"), "safetensors"),
    "unknown method": ((*PRUNE, "--method", "magnitud", "--keep", "0.8", "--out", "run"), "did you mean 'magnitude'"),
    "keep 0": ((*PRUNE, "--keep", "0", "--out", "run"), "above 0"),
    "keep 1.2": ((*PRUNE, "--keep", "1.2", "--out", "run"), "at most 1"),
    "keep abc": ((*PRUNE, "--keep", "abc", "--out", "run"), "'abc'"),
    "keep nan": ((*PRUNE, "--keep", "nan", "--out", "run"), "above 0"),
    "no keep": ((*PRUNE, "--out", "run"), "--keep 0.8"),
    "keep and target": ((*PRUNE, "--keep", "0.8", "--target", "macs=2M", "--out", "run"), "one of --keep"),
    "target of nothing known": ((*PRUNE, "--target", "watts=3", "--out", "run"), "params=100M"),
    "infeasible target": ((*PRUNE, "--target", "params=10", "--out", "run"), "least possible is params="),
    "cache without attention": ((*PRUNE, "--target", "kv_cache=1M@64", "--out", "run"), "no kv_cache"),
    "tokens of a picture": ((*PRUNE, "--target", "ms=1@64", "--out", "run"), "no rows of tokens"),
    "cut in one block alone": (
        (*PRUNE, "--keep", "0.5", "--regular", "--only", "none", "--out", "run"),
        "no axis is left",
    ),
    "infeasible keep": ((*PRUNE, "--keep", "0.001", "--out", "run"), "least"),
    "no source": (("prune", "toys:classifier", "--method", "wanda_sp", "--keep", "0.8", "--out", "run"), "--source"),
    "unknown source": (("prune", "toys:classifier", "--keep", "0.8", "--source", "x", "--out", "run"), "NAME=FOLDER"),
    "unknown setting": ((*PRUNE, "--keep", "0.8", "--set", "formm=token", "--out", "run"), "formm"),
    "setting of another type": ((*PRUNE, "--keep", "0.8", "--set", "compensate=two", "--out", "run"), "compensate"),
    "full folder": ((*PRUNE, "--keep", "0.8", "--out", "full"), "full exists and is not empty"),
    "NaN weights": (
        ("prune", "toys:broken", "--method", "magnitude", "--keep", "0.8", "--out", "run"),
        "NaN or infinite",
    ),
    "nothing to cut": (("prune", "toys:spectral", "--method", "magnitude", "--keep", "0.5", "--out", "run"), "least"),
    "plan not there": (("apply", "none.json", "toys:classifier", "--out", "run"), "none.json"),
    "plan damaged": (("apply", "text.txt", "toys:classifier", "--out", "run"), "not JSON"),
    "unknown option": ((*PRUNE, "--kep", "0.5"), "--keep"),
    "unknown dtype": ((*PRUNE, "--keep", "0.5", "--dtype", "int3", "--out", "run"), "int3"),
    "round 0": ((*PRUNE, "--keep", "0.5", "--round", "0", "--out", "run"), "--round"),
    "report of nothing": (("report", "none"), "none"),
    "evaluate nothing": (("evaluate", "none"), "none"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_the_value_and_leaves_nothing_behind(regrow: Run, name: str) -> None:
    Path("full").mkdir()
    Path("full/old.txt").write_text("mine")
    Path("text.txt").write_text("not a model, not a plan")
    torch.save({"w": torch.ones(2)}, "weights.pth")
    before = sorted(Path().iterdir())
    words, says = MISTAKES[name]
    code, _, err = regrow(*words)
    assert code == 2
    last = [line for line in err.splitlines() if line.startswith("regrow: ")]
    assert len(last) == 1 and says in last[0], err
    assert "Traceback" not in err
    assert sorted(Path().iterdir()) == before and list(Path("full").iterdir()) == [Path("full/old.txt")]


SOURCES = {
    "empty": (b"", "empty"),
    "one line": (b"just one line\n", "single line"),
    "shorter than a window": (b"two words\n\nand two more\n", "window"),
    "binary": (bytes(range(256)) * 40, "text"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_is_no_text_is_refused(regrow: Run, name: str, tiny_language_model: Path) -> None:
    content, says = SOURCES[name]
    Path("mail.txt").write_bytes(content)
    code, _, err = regrow(
        "prune", str(tiny_language_model), "--keep", "0.8", "--source", "mail=mail.txt", "--out", "run"
    )
    assert code == 2 and says in err and "mail" in err and "Traceback" not in err, err
    assert not Path("run").exists()


def test_a_language_model_is_pruned_saved_and_evaluated(regrow: Run, tiny_language_model: Path) -> None:
    words = (
        "prune",
        str(tiny_language_model),
        "--method",
        "flap",
        "--keep",
        "0.7",
        "--source",
        "manual",
        "--source",
        "code",
        "--unseen",
        "talk",
    )
    code, out, err = regrow(*words, "--tokens", "512", "--eval-tokens", "256", "--seq-len", "64", "--out", "run")
    assert code == 0, err
    assert "perplexity" in out.lower() and "talk" in out
    code, out, err = regrow(
        "evaluate", "run", "--source", "manual", "--eval-tokens", "256", "--seq-len", "64", "--json", "e.json"
    )
    assert code == 0, err
    found = json.loads(Path("e.json").read_text())["perplexity"][0]["ppl"]
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    logged = [
        r["ppl"] for r in rows if r["what"] == "perplexity" and r["model"] == "pruned" and r["source"] == "manual"
    ]
    assert found == logged[0]


def test_a_run_killed_in_calibration_goes_on_to_the_same_plan(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow.store import statistics

    words = (
        "prune",
        str(tiny_language_model),
        "--keep",
        "0.7",
        "--source",
        "manual",
        "--source",
        "code",
    )
    sizes = ("--tokens", "512", "--eval-tokens", "256", "--seq-len", "64")
    assert regrow(*words, *sizes, "--out", "whole")[0] == 0
    real = statistics.save_statistics

    def stop_at_the_second(run: Path, source: str, shard: int, statistics: Any, *, key: str = "") -> None:
        if source == "code":
            raise KeyboardInterrupt
        real(run, source, shard, statistics, key=key)

    monkeypatch.setattr(statistics, "save_statistics", stop_at_the_second)
    code, _, err = regrow(*words, *sizes, "--out", "halves")
    assert code == 130 and "resumes from there" in err
    assert len(list(Path("halves/.work/statistics").iterdir())) == 1
    monkeypatch.setattr(statistics, "save_statistics", real)
    assert regrow(*words, *sizes, "--out", "halves")[0] == 0
    plans = [json.loads((Path(name) / "ledger.json").read_text())["plans"] for name in ("whole", "halves")]
    assert plans[0] == plans[1]


def test_gprune_tells_what_it_saw_and_goes_on_when_killed_while_learning(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow.methods.pruning.gprune import shares

    words = [
        "prune",
        str(tiny_language_model),
        "--method",
        "gprune",
        "--set",
        "base=wanda_sp",
        "--keep",
        "0.7",
    ]
    words += ["--source", "manual", "--source", "code", "--source", "news", "--unseen", "talk"]
    words += ["--tokens", "512", "--eval-tokens", "128", "--seq-len", "64"]
    words += ["--set", "steps=4", "--set", "every=2", "--set", "shards=2"]
    code, _, err = regrow(*words, "--out", "whole")
    assert code == 0, err
    found = json.loads(Path("whole/findings.json").read_text())
    assert [row["step"] for row in found["history"]] == [0, 2, 4] and found["sources"] == ["manual", "code", "news"]
    assert "gprune is reconstructed" in Path("whole/report.html").read_text()
    real = shares.write_checkpoint

    def stop_after_two_steps(path: Path, model: Any, state: Any, **more: Any) -> None:
        real(path, model, state, **more)
        if state.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(shares, "write_checkpoint", stop_after_two_steps)
    assert regrow(*words, "--out", "halves")[0] == 130
    monkeypatch.setattr(shares, "write_checkpoint", real)
    assert regrow(*words, "--out", "halves")[0] == 0
    plans = [json.loads((Path(name) / "ledger.json").read_text())["plans"] for name in ("whole", "halves")]
    assert plans[0] == plans[1]
    assert json.loads(Path("halves/findings.json").read_text()) == found
