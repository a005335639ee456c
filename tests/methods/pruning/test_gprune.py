"""GPrune: what its settings reduce to, what it never does, and that it can be stopped and taken up again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hand import lm, texts
from regrow.allocation.cost import Cost
from regrow.api.prune import prune
from regrow.core.budget import Budget
from regrow.core.plan import Plan
from regrow.jobs.pruning_inputs import check_pruning, collect_evidence
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning import gprune
from regrow.methods.pruning.pruner import PlannedCut, PruningContext, plan_cut
from regrow.store.tensors import open_checkpoint
from regrow.training.state import FORMAT

SIZES = {"kv": 4, "rep": 2, "size": 4, "ff": 64}


def run(
    settings: Mapping[str, Any], keep: float = 0.6, method: str = "gprune", blocks: int = 2, **more: Any
) -> tuple[Plan, PlannedCut, Any]:
    model, axes = lm(**SIZES, blocks=blocks)
    built = find_method(MethodKind.PRUNING, method).build(find_method(MethodKind.PRUNING, method).settings(**settings))
    sources = [texts(word, batches=6, seed=i) for i, word in enumerate("abc")]
    evidence = collect_evidence(model, axes, built, sources)
    check_pruning(built, axes, Budget(keep), sources)
    cut = plan_cut(built, model, axes, Budget(keep), evidence, context=PruningContext(**more))
    return cut.plan, cut, axes


@pytest.mark.parametrize("base", ["flap", "wanda_sp", "magnitude", "llm_pruner", "fisher"])
@pytest.mark.parametrize("keep", [0.85, 0.6, 0.45])
def test_without_its_stages_it_is_the_base_method_unit_for_unit(base: str, keep: float) -> None:
    degenerate = {"base": base, "partition": "layer", "switch": "never", "steps": 0, "start": "base"}
    blocks = 10 if base in ("llm_pruner", "fisher") and keep > 0.5 else 2  # of ten it spares the first and the last
    ours = run(degenerate, keep, blocks=blocks)[0]
    theirs = run({"compensate": True}, keep, base, blocks)[0]
    assert ours.changes == theirs.changes
    assert {name: sorted(row) for name, row in ours.means.items()} == {
        n: sorted(row) for n, row in theirs.means.items()
    }


def test_a_start_inside_leaves_the_outer_blocks_and_small_axes_whole() -> None:
    plan, _, axes = run({"start": "inner", "steps": 0, "partition": "layer", "switch": "never"}, 0.8, blocks=10)
    cut = {key.split(".")[2] for key in plan.changes}
    assert cut == {str(block) for block in range(1, 9)}
    assert all(axes[key].size == SIZES["ff"] for key in plan.changes)
    sizes = [len(change.keep) for change in plan.changes.values()]
    assert max(sizes) - min(sizes) <= 1


def test_a_start_inside_that_cannot_meet_the_budget_takes_the_rest_too() -> None:
    plan, _, axes = run({"start": "inner", "steps": 0}, 0.3, blocks=10)
    assert Cost(axes)(plan.sizes(axes)) <= 0.3 * Cost(axes).total
    assert any(axes[key].size < SIZES["ff"] for key in plan.changes)


def test_learning_keeps_the_budget_to_the_unit_and_the_best_of_what_it_saw() -> None:
    for keep in (0.85, 0.6, 0.45):
        plan, state, axes = run({"steps": 12, "every": 4, "shards": 2}, keep)
        cost = Cost(axes)
        left, dearest = cost(plan.sizes(axes)), max(cost.total - cost({a.key: a.size - 1}) for a in axes.units())
        cheapest = min(cost.total - cost({a.key: a.size - 1}) for a in axes.units())
        assert keep * cost.total - cheapest < left <= keep * cost.total, dearest
        losses = [row["held_out"] for row in state.findings["history"]]
        best = [row["step"] for row in state.findings["history"] if row["held_out"] == min(losses)]
        assert state.findings["best_step"] == best[0] and len(losses) == 4
        assert losses[0] == min(state.findings["starts"].values())
        most = 0.95 if state.findings["best_step"] else 1.0
        assert all(0 <= row["learned"] <= most for row in state.findings["modules"])


def test_what_is_judged_is_what_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one ranking for all sources, the loss kept is that of the cut network on the held-out windows."""
    import torch.nn.functional as F

    from regrow.surgery.gate import gate_inputs

    score_views = gprune.score_views
    monkeypatch.setattr(gprune, "score_views", lambda *given: score_views(*given)[:1] * 4)
    plan, state, axes = run({"steps": 6, "every": 3})
    model, _ = lm(**SIZES)
    built = find_method(MethodKind.PRUNING, "gprune").build(find_method(MethodKind.PRUNING, "gprune").settings())
    evidence = collect_evidence(model, axes, built, [texts(word, batches=6, seed=i) for i, word in enumerate("abc")])
    gates = {axis.key: torch.ones(axis.size) for axis in axes.units()}
    for key, change in plan.changes.items():
        gates[key][list(change.dropped)] = 0
    fills = {name: m.mean for name, m in evidence.pooled().moments.items()}
    losses = []
    for source in evidence.data.values():
        for batch in source.held_out(0.25)[1]:
            (dense,) = model(*batch.args)
            with gate_inputs(model, axes, gates, fills):
                (cut,) = model(*batch.args)
            said, truth = (F.log_softmax(x, -1).flatten(0, -2) for x in (cut, dense))
            losses.append(F.kl_div(said, truth, log_target=True, reduction="batchmean").item())
    assert sum(losses) / len(losses) == pytest.approx(
        min(row["held_out"] for row in state.findings["history"]), rel=1e-4
    )


def test_learning_moves_what_is_cut_to_where_it_costs_least() -> None:
    """One layer's neurons are made useless: learning finds that from a uniform start, ranking inside layers cannot."""
    model, axes = lm(**SIZES)
    with torch.no_grad():
        model.decoder.blocks[1].down.weight.mul_(1e-3)
        model.decoder.blocks[0].down.weight.mul_(30)
    built = find_method(MethodKind.PRUNING, "gprune").build(
        find_method(MethodKind.PRUNING, "gprune").settings(
            base="wanda_sp", partition="layer", switch="never", start="uniform", steps=40, lr=0.3
        )
    )
    sources = [texts(word, batches=6, seed=i) for i, word in enumerate("abc")]
    budget = Budget(0.8, only=("gate", "up", "down"))
    state = plan_cut(built, model, axes, budget, collect_evidence(model, axes, built, sources))
    first, second = (row["learned"] for row in state.findings["modules"])
    assert second > first + 0.3
    history = state.findings["history"]
    assert min(row["held_out"] for row in history) < 0.7 * history[0]["held_out"]


class KilledError(Exception):
    """Ends learning as a kill does: nothing is written any more."""


@pytest.mark.parametrize("how", [KilledError, KeyboardInterrupt])
def test_a_run_stopped_while_learning_ends_as_if_it_had_not(how: type[BaseException], tmp_path: Path) -> None:
    settings, header = {"steps": 8, "every": 3, "shards": 2}, lambda: {"key": "k"}
    whole, cut, _ = run(settings)
    assert [row["step"] for row in cut.findings["history"]] == [0, 3, 6, 8]
    for stop in (1, 3, 5, 8):

        def stopping(done: int, total: int, what: str, stop: int = stop) -> None:
            if what.startswith("learning") and done == stop:
                raise how

        place = tmp_path / f"{stop}.safetensors"
        with pytest.raises(how):
            run(settings, checkpoint=place, checkpoint_header=header, progress=stopping)
        assert open_checkpoint(place, "k", FORMAT)["starts"] == cut.findings["starts"]
        seen: list[str] = []
        again, other, _ = run(
            settings,
            checkpoint=place,
            checkpoint_header=header,
            progress=lambda done, total, what, seen=seen: seen.append(what),
        )
        learned = [what for what in seen if what.startswith("learning")]
        assert len(learned) == 8 - (stop if how is KeyboardInterrupt else (stop - 1) // 3 * 3)
        assert not [what for what in seen if what.startswith("evaluating the start")]
        assert again == whole and other.findings == cut.findings
        assert all(torch.equal(row, cut.scores.values[key]) for key, row in other.scores.values.items())
    place.write_bytes(place.read_bytes()[:-7])
    assert run(settings, checkpoint=place, checkpoint_header=header)[0] == whole
    assert open_checkpoint(place, "another", FORMAT) == {} and not place.exists()


def test_the_same_seed_gives_the_same_plan() -> None:
    for how in ("thresholds", "random"):
        settings = {"steps": 4, "every": 2, "partition": how, "seed": 3}
        assert run(settings)[0] == run(settings)[0]


def test_one_source_is_split_and_the_reader_is_told() -> None:
    model, axes = lm(**SIZES)
    built = find_method(MethodKind.PRUNING, "gprune").build(
        find_method(MethodKind.PRUNING, "gprune").settings(steps=0, shards=2)
    )
    evidence = collect_evidence(model, axes, built, [texts("only", batches=6)])
    assert list(evidence.statistics) == ["only/1", "only/2", "only/3"]
    assert "at least 3 kinds of text and got 1" in evidence.notes[0]
    state = plan_cut(built, model, axes, Budget(0.7), evidence)
    assert state.findings["notes"] == list(evidence.notes)


def test_what_it_saw_is_plain_data() -> None:
    import json

    _, state, _ = run({"steps": 2, "every": 1})
    told = json.loads(json.dumps(state.findings))
    assert told == state.findings
    assert sum(row["units"] for row in told["modules"]) == 2 * (4 + 64)
    assert {row["label"] for row in told["spectrum"]} == {"gate, up → down", "q, k, v → o (blocks of 8)"}
    assert set(told["robust_among_cut"]) == {"base", "gprune"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base": "obd"}, "base must be one of flap, wanda_sp"),
        ({"instead": "luck"}, "instead must be one of"),
        ({"start": "top"}, "start must be one of"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"shards": 0}, "shards must be at least 1"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
        ({"partition": "cube"}, "partition must be one of thresholds"),
        ({"switch": "maybe"}, "switch must be one of"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_method(MethodKind.PRUNING, "gprune").build(find_method(MethodKind.PRUNING, "gprune").settings(**settings))


def test_a_source_that_is_split_is_told() -> None:
    model, _ = lm(**SIZES)
    with pytest.warns(UserWarning, match="'a' was split into 3 parts"):
        _, plan = prune(
            model, method="gprune", keep=0.6, data=[texts("a", batches=6)], settings={"steps": 0, "shards": 1}
        )
    assert "Give more kinds" in plan.origin["notes"][0] and plan.changes
