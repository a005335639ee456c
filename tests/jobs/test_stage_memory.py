"""A memory budget while a search runs: what a stage needs is foretold, kept below it, and measured; once per stage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import regrow
from jobs.results import rows, same_parameters
from regrow.allocation.stages import MemoryBudgetError
from regrow.core.objectives import CLASSIFICATION
from regrow.jobs import search, spaces
from regrow.jobs.recording import Invocation
from regrow.jobs.search import Settings, build_search, build_space, search_named
from regrow.jobs.search_inputs import make_schedule, read_search_data
from regrow.jobs.spaces import MemoryWatch
from regrow.methods import MethodKind, find_method
from regrow.reports import write_page
from regrow.tracing import trace
from regrow.training.continual import learn
from regrow.training.fit import FitOptions

pytestmark = pytest.mark.usefixtures("plan_once")

SMALL: dict[str, Any] = {"train": 120, "test": 50, "batch_size": 48, "epochs": 4, "retrain": 1, "stride": 1}
QUICK = {"warm": 1, "every": 1}
BUDGET = 5_600_000
"""Bytes: too few for `cells:4-2-1` in one stage, or in two of which the first leaves much."""

LEAVES_MUCH = QUICK | {"lr_threshold": 0.0}
"""The first stage removes nothing, unlike what the plan of stages expects."""

TIGHT = Settings("cells:4-2-1", "digits", "nonzero=30%", memory=f"{BUDGET}", method_settings=LEAVES_MUCH, **SMALL)


def kept(folder: Any) -> list[dict[str, Any]]:
    """What was measured, once it is seen that it kept the budget, and what was foretold of each stage."""
    found, plan = rows(folder, "memory"), rows(folder, "stages")[0]
    assert [row["stage"] for row in found] == [*range(len(plan["ends"]))]
    for row, planned in zip(found, plan["peaks"], strict=True):
        foretold = row["predicted"] or planned
        assert row["joint"] and 0.85 * foretold < row["peak"] <= foretold <= BUDGET, row
    return found


def run_and_watch(settings: Settings, place: Path) -> tuple[Any, list[bool]]:
    """Run a search, and note for its learning and for the training of its result whether parts are recomputed."""
    recomputed: list[bool] = []

    def watched(model: nn.Module, *given: Any, **more: Any) -> Any:
        recomputed.append(bool(model.recomputed))
        return learn(model, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "learn", watched)
        return search_named(settings, Invocation(place)), recomputed


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[bool]]:
    return run_and_watch(TIGHT, tmp_path_factory.mktemp("tight") / "run")


@pytest.fixture(scope="module")
def tight(watched: tuple[Any, list[bool]]) -> Any:
    return watched[0]


@pytest.mark.parametrize(
    ("space", "memory", "batch", "recomputed"),
    [("cells:4-3-1", "64MiB", 48, False), ("mobile:4-1", "64MiB", 48, False), ("cells:4-3-1", "9MiB", 96, True)],
)
def test_what_a_stage_needs_with_its_masks_is_planned(space: str, memory: str, batch: int, recomputed: bool) -> None:
    """Masks cost by the weight: where those are many, a plan without them would be far off."""
    more = {"batch_size": batch, "epochs": 1, "method_settings": {"warm": 0}}
    settings = replace(TIGHT, space=space, memory=memory, **more)
    parts = read_search_data(settings)
    model, _, plan = build_space(settings, parts.search)
    axes = trace(model, parts.search.train.inputs[:2])
    own = build_search(settings, model, axes, plan)
    assert plan is not None and len(plan.ends) == 1 and plan.recomputed == recomputed
    watch = MemoryWatch(own, max(plan.peaks), batch)
    schedule = make_schedule(settings, CLASSIFICATION, settings.epochs)
    learn(model, axes, [parts.search], own.learner, schedule, options=FitOptions(around=watch))
    assert watch.rows["0"].joint
    assert 0.85 * max(plan.peaks) < watch.rows["0"].peak <= max(plan.peaks)


@pytest.mark.parametrize("method", ["trials", "darts", "blind"])
def test_the_memory_of_every_method_is_predicted(method: str, tmp_path: Path) -> None:
    """Trials hold a copy of the network and optimizer moments of their own."""
    settings = Settings("mobile:4-1", "digits", "params=60%", method=method, memory="64MiB", **SMALL | {"retrain": 0})
    folder = search_named(settings, Invocation(tmp_path / "run"))
    (row,), (plan,) = rows(folder, "memory"), rows(folder, "stages")
    assert 0.85 * plan["peaks"][0] < row["peak"] <= 1.15 * plan["peaks"][0]


def test_a_step_in_which_masks_learn_is_measured_once_a_stage(tight: Any) -> None:
    """Weights learn alone in the first epoch of a stage, and need less."""
    assert [row["epoch"] for row in kept(tight)] == [2, 4]


def test_where_a_stage_left_more_than_was_planned_parts_are_computed_anew(tight: Any, tmp_path: Path) -> None:
    """The same search, number by number, as in these stages without a budget."""
    assert [row["recomputed"] for row in kept(tight)] == [False, True]
    assert not rows(tight, "stages")[0]["recomputed"]
    plain = search_named(replace(TIGHT, memory="", stages=2), Invocation(tmp_path / "plain"))
    assert same_parameters(plain.path / "found", tight.path / "found") and same_parameters(plain.path, tight.path)
    pages = [write_page([one.path], tmp_path / "page.html").read_text(encoding="utf-8") for one in (plain, tight)]
    assert ["recomputed in the backward pass" in page for page in pages] == [False, True]


def test_a_run_that_goes_on_measures_each_stage_once(
    tight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind a warm-up epoch, of the first stage and of the second: what was decided there holds."""
    write, seen = search.write_checkpoint, []

    def stopping(*given: Any, **more: Any) -> None:
        write(*given, **more)
        seen.append(given)
        if len(seen) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(search, "write_checkpoint", stopping)
    for epochs in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            search_named(TIGHT, Invocation(tmp_path / "killed"))
        assert len(seen) == epochs
    again = search_named(TIGHT, Invocation(tmp_path / "killed"))
    told = [
        [{name: row[name] for name in ("stage", "epoch", "peak", "recomputed")} for row in kept(folder)]
        for folder in (tight, again)
    ]
    assert told[0] == told[1] and same_parameters(tight.path, again.path)


def test_what_a_budget_needs_holds_while_the_found_network_is_trained_anew(
    watched: tuple[Any, list[bool]], tmp_path: Path
) -> None:
    """Both where the plan has it and where it was seen in the search; the network that is delivered is a plain one."""
    planned = run_and_watch(replace(TIGHT, memory="5MiB", target="nonzero=50%"), tmp_path / "run")
    assert rows(planned[0], "stages")[0]["recomputed"] and not rows(watched[0], "stages")[0]["recomputed"]
    assert (planned[1], watched[1]) == ([True, True], [False, True])
    assert not any(regrow.load(folder.path).recomputed for folder, _ in (planned, watched))


def test_what_settings_tell_of_earlier_stages_is_planned_with() -> None:
    for given, expected in (
        ({}, 0.6),
        ({"share": 0.9}, 0.92),
        ({"regrow": 0.0}, 0.5),
        ({"levels": "weights"}, 1.0),
        ({"levels": "filters,weights"}, 1.0),
    ):
        method = find_method(MethodKind.SEARCH, "mgas").create("mgas", given)
        assert method.stage_share == pytest.approx(expected), given
    assert find_method(MethodKind.SEARCH, "blind").create("blind", {}).stage_share == 1


@pytest.mark.parametrize("more", [{"levels": "weights"}, {"share": 0.9}])
def test_where_earlier_stages_leave_much_the_budget_is_kept(more: dict[str, Any], tmp_path: Path) -> None:
    target = "nonzero=80%" if "share" in more else "nonzero=30%"
    kept(
        search_named(
            replace(TIGHT, target=target, method_settings=QUICK | more, retrain=0), Invocation(tmp_path / "run")
        )
    )


def test_a_stage_that_cannot_keep_the_budget_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def much(*_: Any) -> int:
        return BUDGET + 1024

    monkeypatch.setattr(spaces, "predict_stage_bytes", much)
    for _ in range(2):
        with pytest.raises(MemoryBudgetError, match=r"stage 2 needs 5\.342 MiB \(5601024 bytes\).*more --memory"):
            search_named(TIGHT, Invocation(tmp_path / "run"))
    found = regrow.store.run_folder.RunFolder.open_unfinished(tmp_path / "run")
    assert [row["epoch"] for row in rows(found, "epoch")] == [1, 2]
