"""A search and its run folder: three disjoint parts, the target, resuming, the memory it is given."""

import importlib
import json
import re
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import regrow
from jobs.results import rows, same_parameters
from regrow.allocation.latency import Latency
from regrow.allocation.levels import GRANULARITIES
from regrow.allocation.stages import MemoryStages
from regrow.core import amounts
from regrow.core.amounts import Measure
from regrow.core.candidates import Candidates, candidate_paths
from regrow.core.errors import InputError
from regrow.core.objectives import CLASSIFICATION
from regrow.data.vision import cut_out
from regrow.evaluation.continual import mean_score
from regrow.jobs import search as searching
from regrow.jobs import search_inputs
from regrow.jobs.recording import ActiveRun, Invocation
from regrow.jobs.search import Settings, build_search, build_space, retrain, search_named
from regrow.jobs.search_inputs import parse_target, read_search_data
from regrow.methods.search.space import measure_unmasked
from regrow.nets.cells import Cells
from regrow.nets.mobile import Mobile
from regrow.reports import write_page
from regrow.settings.words import format_command_line
from regrow.store.errors import StoreError
from regrow.store.run_folder import RunFolder
from regrow.tracing import trace
from regrow.training.learner import Context

pytestmark = pytest.mark.usefixtures("plan_once")

SMALL: dict[str, Any] = {
    "train": 240,
    "test": 100,
    "batch_size": 48,
    "epochs": 4,
    "retrain": 2,
    "stride": 1,
}
QUICK = {"warm": 1, "every": 1, "share": 0.3}
SETTINGS = Settings("cells:4-2-1", "digits", "nonzero=3k", method_settings=QUICK, cutout=3, **SMALL)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return search_named(SETTINGS, Invocation(tmp_path_factory.mktemp("search") / "run"))


def stopped(monkeypatch: pytest.MonkeyPatch, *writes: int) -> None:
    """From now on a run is interrupted behind these of the checkpoints that it writes."""
    write, seen = searching.write_checkpoint, count(1)

    def stopping(*given: Any, **more: Any) -> None:
        write(*given, **more)
        if next(seen) in writes:
            raise KeyboardInterrupt

    monkeypatch.setattr(searching, "write_checkpoint", stopping)


def test_the_folder_holds_the_network_that_was_tested(done: Any) -> None:
    net = regrow.load(done.path)
    parts = read_search_data(SETTINGS)
    told = rows(done, "test")[0]
    assert told["accuracy"] == mean_score(net, parts.test, CLASSIFICATION) and told["images"] == 100
    assert told["nonzero"] <= 3000
    assert sum(int(p.count_nonzero()) for p in net.parameters()) == told["nonzero"]
    found = regrow.load(done.path / "found")
    assert rows(done, "found")[0]["accuracy"] == mean_score(found, parts.search.test, CLASSIFICATION)
    zero = {name for name, p in found.named_parameters() if not bool(p.all())}
    assert all(bool((net.get_parameter(n)[found.get_parameter(n) == 0] == 0).all()) for n in zero if "weight" in n)


def test_what_is_told_of_it_fits(done: Any) -> None:
    history = rows(done, "epoch")
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert [row["stage"] for row in history] == [0, 0, 1, 1]
    assert rows(done, "levels")[0]["saved"]["operations"] > 0
    assert len(done.ledger) >= len(rows(done, "commit"))


@pytest.mark.parametrize("measure", ["nonzero", "macs"])
def test_the_ledger_adds_up(measure: str, tmp_path: Path) -> None:
    """What the levels left out and what is left make the whole space, but for classifiers of earlier stages."""
    more = QUICK | {"regrow": 0.9, "regrow_filters": 0.5, "warm": 0}
    model, _, _ = build_space(SETTINGS, read_search_data(SETTINGS).search)
    assert isinstance(model, Cells)
    axes = trace(model, read_search_data(SETTINGS).search.train.inputs[:2])
    target = f"{measure}={'3k' if measure == 'nonzero' else '30k'}"
    own = replace(SETTINGS, target=target, epochs=6, retrain=0, cutout=0, method_settings=more)
    folder = search_named(own, Invocation(tmp_path / "run"))
    assert sum(len(row["back"]) for row in rows(folder, "commit")) > 0, "something came back"
    space = build_search(own, model, axes).space
    whole = measure_unmasked(space, (), Context(model, axes, read_search_data(own).search))
    levels = rows(folder, "levels")[-1]
    assert sum(levels["saved"].values()) + levels["size"] == pytest.approx(whole, rel=1e-9)
    assert min(levels["saved"].values()) >= 0
    assert levels["size"] == rows(folder, "found")[-1][measure]


def test_how_it_goes_is_told_while_it_searches(tmp_path: Path) -> None:
    said: list[str] = []
    settings = replace(SETTINGS, retrain=1)
    folder = search_named(
        settings, Invocation(tmp_path / "run", progress=lambda _, total, what: said.extend([what] * (total > 1)))
    )
    told = [*dict.fromkeys(line.rpartition(", loss ")[0] for line in said)]
    first, _, second, _ = rows(folder, "epoch")
    assert told[0] == "search, stage 1" and told[2] == "search, stage 2" and told[4:] == ["retraining"]
    for line, row, start in ((told[1], first, "search, stage 1, "), (told[3], second, "search, stage 2, ")):
        size, most, accuracy, *shares = re.findall(r"[\d.]+k?", line.removeprefix(start))
        assert line.startswith(start) and [amounts.parse_amount(one, Measure.PARAMETERS) for one in (size, most)] == (
            pytest.approx([row["size"], row["allowed"]], rel=5e-3)
        )
        assert float(accuracy) == pytest.approx(row["accuracy"], abs=6e-3)
        assert [int(share) for share in shares] == [round(100 * row[level]) for level in GRANULARITIES]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cutout": 8}, "take 0, for none, to 7"),
        ({"cutout": -1}, "cutout must be 0 to"),
    ],
)
def test_what_means_nothing_in_the_training_anew_is_refused(
    given: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        search_named(replace(SETTINGS, **given), Invocation(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_squares_are_cut_out_in_the_training_anew(done: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sides = []

    def watched(pictures: Any, side: int) -> Any:
        sides.append(side)
        return cut_out(pictures, side)

    monkeypatch.setattr("regrow.methods.search.retrain.cut_out", watched)
    parts = read_search_data(SETTINGS)
    net = regrow.load(done.path / "found")
    retrain(ActiveRun(record=RunFolder.create(tmp_path / "run", verb="t", settings={})), SETTINGS, parts, net)
    assert set(sides) == {3}


def test_a_found_network_goes_on_from_its_weights_unless_it_is_to_start_fresh(done: Any, tmp_path: Path) -> None:
    parts, net, began = read_search_data(SETTINGS), regrow.load(done.path / "found"), []
    for fresh in (False, True):
        # At a rate this low it ends as it begins.
        own = replace(SETTINGS, fresh=fresh, retrain=1, lr=1e-9, weight_decay=0.0)
        folder = RunFolder.create(tmp_path / f"{fresh}", verb="t", settings={})
        began.append(retrain(ActiveRun(record=folder), own, parts, net))
    for name, value in net.named_parameters():
        assert torch.allclose(began[0].get_parameter(name), value, rtol=0, atol=1e-6)
    weights = [(name, value) for name, value in net.named_parameters() if value.dim() > 1 and bool(value.any())]
    assert weights and not any(torch.allclose(began[1].get_parameter(n), v, atol=1e-3) for n, v in weights)
    assert "--fresh --" in format_command_line(replace(SETTINGS, fresh=True), "--out", "x")


def test_both_trainings_are_compared_on_validation_data_and_the_better_is_kept(done: Any, tmp_path: Path) -> None:
    own = replace(SETTINGS, both=True, retrain=1)
    folder = search_named(own, Invocation(tmp_path / "run"))
    scores = {row["fresh"]: row["score"] for row in rows(folder, "retrained")}
    assert scores.keys() == {True, False}
    kept = mean_score(regrow.load(folder.path), read_search_data(own).search.test, CLASSIFICATION)
    assert kept == pytest.approx(max(scores.values()))
    with pytest.raises(InputError, match="give one of them"):
        replace(SETTINGS, both=True, fresh=True)


def test_a_run_notes_the_defaults_it_took_and_none_of_what_it_was_given(done: Any, tmp_path: Path) -> None:
    taken = done.read_record()["defaults"]
    assert taken["lr_threshold"] == 2.0 and taken["lr"] == 8.0 and taken["levels"] == [*GRANULARITIES]
    assert not {*QUICK, "target", "stages", "seed"} & {*taken}
    place, area = tmp_path / "run", tmp_path / "run" / ".work"
    area.mkdir(parents=True)
    told = {name: value for name, value in done.read_record().items() if name != "finished"}
    (area / "run.json").write_text(json.dumps(told | {"defaults": taken | {"lr_threshold": 1.0}}))
    with pytest.raises(StoreError, match=r"lr_threshold was 1\.0 by default, here 2\.0"):
        search_named(SETTINGS, Invocation(place))
    assert [one.name for one in area.iterdir()] == ["run.json"]
    (area / "run.json").write_text(json.dumps(told | {"settings": told["settings"] | {"fresh": True}}))
    with pytest.raises(StoreError, match="fresh was true, here false"):
        search_named(SETTINGS, Invocation(place))


def test_draws_of_another_seed_are_another_network(tmp_path: Path) -> None:
    """On the same data and from the same weights; the seed of the run is that of the draw by default."""
    found = []
    for i, more in enumerate(({}, {"seed": 0}, {"seed": 1})):
        given = SMALL | {"epochs": 0, "retrain": 0, "method": "blind"}
        folder = search_named(
            Settings("cells:4-2-1", "digits", "params=30%", method_settings=more, **given),
            Invocation(tmp_path / f"{i}"),
        )
        found.append([n for n, _ in regrow.load(folder.path).named_parameters()])
    assert found[0] == found[1] != found[2]


def test_parts_are_disjoint() -> None:
    parts = read_search_data(SETTINGS)
    learned, held, test = (
        {tuple(one.flatten().tolist()) for one in part.inputs}
        for part in (parts.search.train, parts.search.test, parts.test)
    )
    assert len(parts.search.train) == 192 and len(parts.search.test) == 48
    assert not learned & held and not (learned | held) & test
    assert {tuple(one.flatten().tolist()) for one in parts.whole.train.inputs} == learned | held


def test_killed_and_resumed_is_never_stopped(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(monkeypatch, 3, 5)  # once in the search, once in the training after it
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search_named(SETTINGS, Invocation(tmp_path / "killed"))
    again = search_named(SETTINGS, Invocation(tmp_path / "killed"))
    whole, other = regrow.load(done.path), regrow.load(again.path)
    assert same_parameters(whole, other)
    assert [_same(row) for row in rows(done, "epoch")] == [_same(row) for row in rows(again, "epoch")]
    for what in ("found", "levels", "test"):
        assert [_same(row) for row in rows(done, what)] == [_same(row) for row in rows(again, what)] != []


def _same(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("time", "at")}


@pytest.mark.parametrize(
    "more, told",
    [
        ({"epochs": 3}, "a stage of 2 no epoch to learn masks in, .* use --epochs 4 or more"),
        ({"epochs": 0, "method": "darts", "method_settings": {}}, "0 epochs: .* take --epochs 1"),
    ],
)
def test_too_few_epochs_are_refused_before_the_space_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr("regrow.jobs.search.trace_examples", lambda *_: pytest.fail("traced"))
    with pytest.raises(ValueError, match=told):
        search_named(replace(SETTINGS, **more), Invocation(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_search_that_would_learn_nothing_is_refused(tmp_path: Path) -> None:
    for more, told in (
        ({"train": -5}, "train must be 0 to"),
        ({"target": "params=60", "method_settings": QUICK | {"levels": ("operations",)}}, "below what is left"),
        ({"target": "params=60", "method": "darts", "method_settings": {}}, "below what is left whatever goes"),
    ):
        with pytest.raises(ValueError, match=told):
            search_named(replace(SETTINGS, **more), Invocation(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_a_space_is_searched_in_three_stages_or_as_many_as_it_has_parts() -> None:
    task = read_search_data(SETTINGS).search
    for space, given, heads in (("cells:4-2-1", 0, 2), ("cells:4-4-1", 0, 3), ("cells:4-4-1", 4, 4)):
        model, _, _ = build_space(replace(SETTINGS, space=space, stages=given), task)
        assert isinstance(model, Cells) and len(model.heads) == heads
    assert build_space(replace(SETTINGS, space="resnet:4-2", stages=0), task)[2] is None
    with pytest.raises(ValueError, match="one stage: no --stages 2"):
        build_space(replace(SETTINGS, space="resnet:4-2", stages=2), task)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fresh": True}, "--fresh is of the training after the search, and --retrain 0"),
        ({"cutout": 4}, "--cutout 4 is of the training"),
        ({"input": "1x1x9x9"}, "--input 1x1x9x9 is of a MODEL"),
        (
            {"fresh": True, "retrain": 1, "space": "shifted:Own"},
            r"Own does not initialise shift; give it a method reset_",
        ),
    ],
)
def test_options_without_effect_are_refused(
    given: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.shift = nn.Linear(64, 10), nn.Parameter(torch.zeros(64))

    def forward(self, x):
        return self.body(x.flatten(1) + self.shift)
"""
    (tmp_path / "shifted.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=words):
        settings = Settings(
            **SMALL | {"space": "resnet:4-2", "data": "digits", "target": "params=80%", "retrain": 0} | given
        )
        search_named(settings, Invocation(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("layers", "what must be one of operations, filters, weights, got 'layers'"),
        ("weights", "weights cannot be searched"),
    ],
)
def test_what_a_random_search_removes_is_checked(what: str, words: str, tmp_path: Path) -> None:
    given = SMALL | {"epochs": 0, "method": "blind", "method_settings": {"what": what}}
    with pytest.raises(ValueError, match=words):
        search_named(Settings("cells:4-2-1", "digits", "params=40%", **given), Invocation(tmp_path / "wrong"))


@pytest.mark.parametrize("what", ["operations", "filters"])
def test_controls_meet_the_target_unlearned(what: str, tmp_path: Path) -> None:
    given = SMALL | {"epochs": 0, "retrain": 0, "method": "blind", "method_settings": {"what": what}}
    folder = search_named(Settings("cells:4-2-1", "digits", "params=40%", **given), Invocation(tmp_path / "run"))
    told = rows(folder, "found")[0]
    whole = sum(p.numel() for p in build_space(SETTINGS, read_search_data(SETTINGS).search)[0].parameters())
    assert 0.3 * whole < told["nonzero"] <= 0.4 * whole


@pytest.mark.parametrize("most", [1700, 4000])
def test_what_darts_leaves_is_cut_to_the_target_or_told_to_be_below_it(most: int, tmp_path: Path) -> None:
    given = SMALL | {"epochs": 1, "retrain": 0, "method": "darts"}
    folder = search_named(Settings("cells:4-2-1", "digits", f"params={most}", **given), Invocation(tmp_path / "run"))
    told, levels = rows(folder, "found")[0], rows(folder, "levels")[0]
    assert told["parameters"] == told["nonzero"] <= most
    assert levels["below"] == (levels["discretised"] <= most) == (levels["saved"]["filters"] == 0)
    assert not levels["below"] or told["parameters"] == levels["discretised"]
    nodes = [one for one in regrow.load(folder.path).modules() if isinstance(one, Candidates)]
    assert [len(node.ops) for node in nodes] == [2, 2]
    assert "skips" in rows(folder, "epoch")[0]


OWN = """
from torch import nn
from regrow import Candidates

def conv(kernel, inputs=6):
    return nn.Sequential(nn.Conv2d(inputs, 6, kernel, padding=kernel // 2), nn.BatchNorm2d(6), nn.ReLU())

def tiny(classes=10):
    def choice():
        return Candidates({"one": conv(1), "three": conv(3), "five": conv(5), "same": nn.Identity()})
    return nn.Sequential(conv(3, 1), choice(), choice(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))

def wrong():
    return tiny(3)
"""


def test_a_network_of_ones_own_code_is_searched_in_all_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it marks goes too; the found network is trained, saved, and read with the function that makes it."""
    (tmp_path / "own_nets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    given = SMALL | {"method_settings": {"warm": 0, "every": 1}}
    folder = search_named(Settings("own_nets:tiny", "digits", "params=30%", **given), Invocation(tmp_path / "run"))
    levels = rows(folder, "levels")[0]
    assert (
        levels["saved"]["operations"] > 0 and levels["size"] == rows(folder, "found")[0]["nonzero"] <= levels["asked"]
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_nets  # type: ignore[import-not-found]

    net = regrow.load(folder.path, model=own_nets.tiny)
    assert (
        mean_score(
            net, read_search_data(Settings("own_nets:tiny", "digits", "params=30%", **given)).test, CLASSIFICATION
        )
        == (rows(folder, "test")[0]["accuracy"])
    )
    with pytest.raises(
        ValueError, match=r"own_nets:wrong returns \(2, 3\) for two images; return logits of 10 classes"
    ):
        search_named(Settings("own_nets:wrong", "digits", "params=30%", **given), Invocation(tmp_path / "other"))


def test_a_network_of_ones_own_loses_filters_and_weights(tmp_path: Path) -> None:
    given = SMALL | {"stages": 1, "method_settings": {"warm": 1, "every": 1, "levels": ("filters",)}}
    folder = search_named(Settings("resnet:4-2", "digits", "macs=10k", **given), Invocation(tmp_path / "run"))
    assert regrow.load(folder.path).get_submodule("3").conv1.out_channels < 4
    assert rows(folder, "levels")[0]["saved"]["filters"] > 0


RESIDUAL = """
from torch import nn
from regrow.nets.vision import ResidualBlock

def tiny(classes=10):
    blocks = [ResidualBlock(6, 6, 1, nn.BatchNorm2d) for _ in range(2)]
    return nn.Sequential(nn.Conv2d(1, 6, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))
"""


@pytest.mark.parametrize(
    "method, given",
    [
        ("mgas", {"warm": 1, "every": 1, "levels": ("operations",)}),
        ("trials", {"levels": ("operations",)}),
        ("blind", {}),
    ],
)
def test_residual_blocks_go_and_a_killed_search_goes_on(
    method: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "residual_nets.py").write_text(RESIDUAL)
    monkeypatch.chdir(tmp_path)
    more = SMALL | {"retrain": 0, "stages": 1, "method": method, "method_settings": given}
    settings = Settings("residual_nets:tiny", "digits", "params=60%", **more)
    done = search_named(settings, Invocation(tmp_path / "run"))
    dropped = set[str]()
    for plan in done.ledger.plans():
        dropped = (dropped | plan.drop.keys()) - {*plan.back}
    build = importlib.import_module("residual_nets").tiny
    net, levels = regrow.load(done.path, model=build), rows(done, "levels")[0]
    assert dropped and all(not [*net.get_submodule(path).parameters()] for path in dropped)
    assert sum(p.numel() for p in net.parameters()) == levels["size"] <= levels["asked"]
    assert levels["saved"]["operations"] > 0
    stopped(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        search_named(settings, Invocation(tmp_path / "killed"))
    again = search_named(settings, Invocation(tmp_path / "killed"))
    assert same_parameters(net, regrow.load(again.path, model=build))
    assert [_same(row) for row in rows(done, "epoch")] == [_same(row) for row in rows(again, "epoch")]


def test_stages_fit_the_memory_that_is_given(tmp_path: Path) -> None:
    settings = Settings("cells:4-3-1", "digits", "params=30%", memory="8MiB", **SMALL)
    model, _, plan = build_space(settings, read_search_data(settings).search)
    assert isinstance(model, Cells) and plan is not None
    assert max(plan.peaks) <= 8 * 2**20 and plan.ends[-1] == 2 and sorted(map(int, model.heads)) == list(plan.ends)
    assert not plan.recomputed and not model.recomputed
    with pytest.raises(ValueError, match="do not suffice"):
        build_space(
            Settings("cells:4-3-1", "digits", "params=30%", memory="100KiB", **SMALL),
            read_search_data(SETTINGS).search,
        )


def test_where_no_stages_fit_parts_are_computed_anew(tmp_path: Path) -> None:
    """A third of what one stage needs: the same search as in one stage without a budget, number by number."""
    given: dict[str, Any] = {
        "method_settings": QUICK,
        **SMALL | {"batch_size": 192, "epochs": 2, "retrain": 0, "stages": 1},
    }
    plain = search_named(Settings("cells:4-4-1", "digits", "params=30%", **given), Invocation(tmp_path / "plain"))
    ample = Settings("cells:4-4-1", "digits", "params=30%", memory="64MiB", **given)
    _, _, plan = build_space(ample, read_search_data(ample).search)
    assert plan is not None and not plan.recomputed
    small = search_named(
        Settings("cells:4-4-1", "digits", "params=30%", memory="17MiB", **given), Invocation(tmp_path / "small")
    )
    (planned,) = rows(small, "stages")
    assert planned["recomputed"] and max(planned["peaks"]) < 0.5 * max(plan.peaks)
    nets = [regrow.load(folder.path) for folder in (plain, small)]
    assert same_parameters(*nets)
    assert all(row["peak"] <= 17 * 2**20 for row in rows(small, "memory"))
    pages = [write_page([one.path], tmp_path / "page.html").read_text(encoding="utf-8") for one in (plain, small)]
    assert ["recomputed in the backward pass" in page for page in pages] == [False, True]


@pytest.mark.parametrize(("method", "space"), [("blind", "cells:4-2-1"), ("darts", "cells:4-3-1")])
def test_a_method_that_runs_all_of_the_network_keeps_a_budget_in_one_stage(
    method: str, space: str, tmp_path: Path
) -> None:
    given = SMALL | {"method": method, "memory": "64MiB", "train": 120, "epochs": 1, "retrain": 0}
    ample = Settings(space, "digits", "params=50%", **given)
    _, _, whole = build_space(ample, read_search_data(ample).search)
    assert whole is not None and not whole.recomputed
    memory = int(max(whole.peaks) / 2**20 - 0.01)  # a little less, whatever the processor's kernels need
    given["memory"] = f"{memory}MiB"
    done = search_named(Settings(space, "digits", "params=50%", **given), Invocation(tmp_path / "done"))
    plan = rows(done, "stages")[0]
    assert len(plan["ends"]) == 1 and plan["recomputed"]
    assert [row["stage"] for row in rows(done, "memory")] == [0]
    assert all(row["peak"] <= plan["peaks"][0] <= memory * 2**20 for row in rows(done, "memory"))
    assert not rows(done, "commit")
    with pytest.raises(ValueError, match="do not suffice"):
        search_named(
            Settings(space, "digits", "params=30%", **given | {"memory": "3MiB"}), Invocation(tmp_path / "run")
        )
    with pytest.raises(ValueError, match="one stage: no --memory"):
        search_named(Settings("resnet:4-2", "digits", "params=30%", **given), Invocation(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    model, parts = (
        build_space(Settings(space, "digits", "params=30%"), read_search_data(SETTINGS).search)[0],
        read_search_data(SETTINGS),
    )
    axes, one_stage = trace(model, parts.search.train.inputs[:2]), MemoryStages(tuple(plan["ends"]), (1,))
    build_search(Settings(space, "digits", "params=30%", method=method), model, axes, one_stage)


def test_a_network_of_blocks_is_found_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        "mobile:4-1",
        "digits",
        "nonzero=70k",
        stages=2,
        method_settings=QUICK,
        **SMALL | {"retrain": 1},
    )
    done = search_named(settings, Invocation(tmp_path / "run"))
    net, told = regrow.load(done.path), rows(done, "test")[0]
    assert isinstance(net, Mobile) and told["accuracy"] == mean_score(
        net, read_search_data(settings).test, CLASSIFICATION
    )
    assert told["nonzero"] <= 70_000 and all(n > 0 for n in rows(done, "levels")[0]["saved"].values())
    assert [row["stage"] for row in rows(done, "epoch")] == [0, 0, 1, 1]
    page = (write_page([done.path], tmp_path / "page.html")).read_text(encoding="utf-8")
    assert "Block 6" in page and "allowed at most 70,000" in page
    stopped(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        search_named(settings, Invocation(tmp_path / "killed"))
    again = search_named(settings, Invocation(tmp_path / "killed"))
    other = regrow.load(again.path)
    assert same_parameters(net, other)
    assert _same(rows(done, "test")[-1]) == _same(rows(again, "test")[-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "a target is like"),
        ("0.2", "a target is like"),
        ("params=9M", "not below"),
        ("params=0", "above 0"),
        ("ms=5@9", "a search takes"),
        ("macs=150%", "at most 100%"),
        ("kv_cache=30%", "a search takes"),
    ],
)
def test_a_target_that_is_none_is_refused(text: str, message: str) -> None:
    parts = read_search_data(SETTINGS)
    model = build_space(SETTINGS, parts.search)[0]
    with pytest.raises(ValueError, match=message):
        parse_target(text, trace(model, parts.search.train.inputs[:2]))


def invented(model: torch.nn.Module, scale: float = 1.0) -> Latency:
    """A latency table of the same form as one that is measured, with times that are nobody's."""
    held: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if not name.endswith("scale"):
            held[name.rpartition(".")[0]] = held.get(name.rpartition(".")[0], 0) + parameter.numel()
    layers = {path: ((0.0, 0.1 * scale), (float(n), scale * (1 + i / 100))) for i, (path, n) in enumerate(held.items())}
    return Latency(layers | {"": ((1.0, 2.0),)} | dict.fromkeys(candidate_paths(model), ((1.0, 0.1),)))


def test_a_target_in_milliseconds_is_met_by_the_table_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"method_settings": QUICK, **SMALL, "retrain": 0}
    table = invented(
        build_space(
            Settings("cells:4-2-1", "digits", "params=30%", **given),
            read_search_data(SETTINGS).search,
        )[0]
    )
    settings = Settings("cells:4-2-1", "digits", f" ms={0.5 * table.total:.4f}", **given)
    monkeypatch.setattr(search_inputs, "measure_latency", lambda *_, **__: table)
    done = search_named(settings, Invocation(tmp_path / "run"))
    told, levels = rows(done, "latency")[0], rows(done, "levels")[0]
    assert told["whole"] == table.total and told["found"] > 0
    assert levels["measure"] == "ms" and levels["size"] <= levels["asked"] == pytest.approx(0.5 * table.total, abs=1e-3)
    assert levels["saved"]["weights"] == 0 and all(bool(p.all()) for p in regrow.load(done.path / "found").parameters())
    page = write_page([done.path], tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"allowed at most {levels['asked']:.3g}\N{NO-BREAK SPACE}ms" in page
    stopped(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        search_named(settings, Invocation(tmp_path / "killed"))
    monkeypatch.setattr(
        search_inputs, "measure_latency", lambda model, *_, **__: invented(model, 3.0)
    )  # the machine is slower now
    kept = tmp_path / "killed" / ".work" / "run.json"
    text = kept.read_text()
    for damaged in ({"curves": {"": []}}, {"curves": {"": [[1.0, -2.0]]}}, {"curves": {}, "total": 1.0}):
        kept.write_text(json.dumps(json.loads(text) | {"latency": damaged}))
        with pytest.raises(StoreError, match=r"run\.json.*latency"):
            search_named(settings, Invocation(tmp_path / "killed"))
    kept.write_text(text)
    again = search_named(settings, Invocation(tmp_path / "killed"))
    both = [regrow.load(folder.path) for folder in (done, again)]
    assert same_parameters(*both)


@pytest.mark.parametrize("method", ["mgas", "trials", "blind"])
def test_widths_are_rounded(tmp_path: Path, method: str) -> None:
    """Axes of 4, 8 and 12 filters keep multiples of 4, within the target."""
    given: dict[str, Any] = {"method_settings": QUICK if method == "mgas" else {}, **SMALL, "retrain": 0}
    levels = {"what" if method == "blind" else "levels": "filters"}
    given["method_settings"] = {**given["method_settings"], **levels}
    done = search_named(
        Settings("cells:4-2-1", "digits", "params=60%", method=method, round_to=4, **given),
        Invocation(tmp_path / "run"),
    )
    found, levels_row = regrow.load(done.path), rows(done, "levels")[0]
    widths = [len(norm.weight) for norm in found.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    assert {width % 4 for width in widths} == {0} and levels_row["saved"]["filters"] > 0
    assert levels_row["size"] <= levels_row["asked"]


def test_a_time_that_cannot_be_reached_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_inputs, "measure_latency", lambda model, *_, **__: invented(model))
    for target_, message in (("ms=1.9", "whatever goes"), ("ms=1000", "not below")):
        with pytest.raises(ValueError, match=message):
            search_named(
                Settings("cells:4-2-1", "digits", target_, **SMALL | {"epochs": 6}), Invocation(tmp_path / "run")
            )
    assert not (tmp_path / "run").exists()


def test_a_space_and_a_method_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no small network 'cells:8'"):
        search_named(Settings("cells:8", "digits", "params=30%", **SMALL), Invocation(tmp_path / "run"))
    with pytest.raises(ValueError, match="did you mean 'mgas'"):
        search_named(
            Settings("cells:4-2-1", "digits", "params=30%", method="mgass", **SMALL), Invocation(tmp_path / "run")
        )
    assert not (tmp_path / "run").exists()
