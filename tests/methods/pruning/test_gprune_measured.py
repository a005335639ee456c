"""Measured allocation in GPrune: exact replay, the budget, the comparison with the starts, and resuming."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hand import lm, texts
from regrow.allocation import Cost
from regrow.axes import AxisGraph
from regrow.budget import Budget
from regrow.commands.pruning import collect_evidence
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.gprune import measured
from regrow.methods.pruning.pruner import Cut, plan_cut
from regrow.methods.pruning.replay import Predictions, Replay, largest_stack, shorten
from regrow.sources import Batch
from regrow.store.tensors import open_checkpoint
from regrow.training.checkpoint import FORMAT

SIZES = {"kv": 4, "rep": 2, "size": 4, "ff": 64}
MEASURED = {"allocation": "measured", "level_tokens": 8, "exchanges": 2, "shards": 2}


def run(
    settings: dict[str, Any],
    model: nn.Module | None = None,
    keep: float = 0.7,
    batches: Sequence[int] = (6, 6, 6),
    budget: Budget | None = None,
    **more: Any,
) -> tuple[Cut, Any]:
    own, axes = lm(**SIZES, blocks=4)
    chosen = find_method(MethodKind.PRUNING, "gprune")
    built = chosen.build(chosen.settings(**MEASURED | settings))
    sources = [texts(word, batches=many, seed=i) for i, (word, many) in enumerate(zip("abc", batches, strict=True))]
    evidence = collect_evidence(model or own, axes, built, sources)
    return plan_cut(built, model or own, axes, budget or Budget(keep), evidence, **more), axes


def test_a_replay_gives_the_logits_of_a_whole_pass() -> None:
    model, axes = lm(**SIZES, blocks=4)
    batch = texts("a", batches=1).batches[0]
    replay = Replay.of(model, axes, batch, 1.0)
    assert len(replay.blocks) == 4 and largest_stack(model)[0] == "decoder.blocks"
    whole = Replay(model, axes, 0.0)
    keys = [axis.key for axis in axes.units()]
    before = {keys[1]: (torch.arange(axes[keys[1]].size) % 2).float()}
    (logits,), (cached,) = replay.record([batch], [(before, {})])
    assert torch.equal(logits, whole.run(batch, before, {}))
    for key in keys:
        gates = {**before, key: (torch.arange(axes[key].size) % 3 > 0).float()}
        if (first := replay.first_block(key)) >= replay.first_block(keys[1]):
            assert torch.equal(replay.run(batch, gates, {}, cached, first), whole.run(batch, gates, {}))
    assert {replay.first_block(key) for key in keys} == {0, 1, 2, 3}
    assert not any("forward" in vars(module) for module in model.modules())
    assert replay.record([batch], [({}, {})])[1] != [None]
    assert Replay.of(model, axes, batch, 0.0).record([batch], [({}, {})])[1] == [None]


def test_a_network_whose_blocks_share_a_state_runs_whole() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for block in self.blocks:
                y = y.add_(block(y))  # the output of no block is what the next one reads
            return y @ self.blocks[0].weight

    axes = AxisGraph({}, {}, frozenset())
    replay = Replay.of(Counted(), axes, Batch((torch.ones(2, 4),)), 1.0)
    assert not replay.blocks and replay.memory == 0


def test_compact_predictions_bound_the_divergence_from_below() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = (3 * torch.randn(5, 700, generator=generator) for _ in range(2))
    logs = [one.log_softmax(-1) for one in (dense, other)]
    exact = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    assert 0.5 * exact < Predictions.of(dense).divergence(other) <= exact + 1e-5
    assert Predictions.of(dense).divergence(dense) == pytest.approx(0, abs=1e-5)
    p, q = dense[:, :100].log_softmax(-1), other[:, :100].log_softmax(-1)
    assert Predictions.of(p).divergence(q) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)


def test_windows_are_shortened_where_all_inputs_are_sequences() -> None:
    batch = texts("a", batches=1).batches[0]
    assert shorten(batch, 3).labels.shape[1] == 3 and shorten(batch, 0) is batch and shorten(batch, 10**6) is batch


def test_measured_allocation_keeps_the_budget_and_is_no_worse_than_any_start() -> None:
    for keep, base in ((0.85, "flap"), (0.6, "fisher")):
        cut, axes = run({"base": base}, keep=keep)
        cost = Cost(axes)
        cheapest = min(cost.total - cost({a.key: a.size - 1}) for a in axes.units())
        assert keep * cost.total - cheapest < cost(cut.plan.sizes(axes)) <= keep * cost.total
        losses = cut.findings["starts"]
        assert set(losses) >= {"base", "measured"} and losses[cut.findings["allocation"]] == min(losses.values())
        for row in cut.findings["levels"]:
            change = cut.plan.changes.get(row["axis"])
            assert row["chosen"] == pytest.approx(len(change.dropped) / axes[row["axis"]].size if change else 0)


def test_it_finds_the_blocks_that_should_stay() -> None:
    model, axes = lm(**SIZES, blocks=4)
    with torch.no_grad():
        model.decoder.blocks[0].down.weight.mul_(20)
        model.decoder.blocks[3].down.weight.mul_(20)
    settings = {"partition": "layer", "switch": "never", "base": "magnitude", "exchanges": 0}
    cut, axes = run(settings, model, keep=0.8)
    rows = {row["axis"]: row for row in cut.findings["levels"] if axes[row["axis"]].size == SIZES["ff"]}
    outer = [row["measured"] for key, row in rows.items() if ".0." in key or ".3." in key]
    inside = [row["measured"] for key, row in rows.items() if ".1." in key or ".2." in key]
    assert max(outer) < 0.5 * min(inside)


def test_a_search_that_was_stopped_ends_as_if_it_had_not(tmp_path: Path) -> None:
    whole, _ = run({})
    findings = lambda cut: {k: v for k, v in cut.findings.items() if k != "seconds"}  # noqa: E731
    for stop in (3, 12, 18):

        def stopping(done: int, total: int, what: str, stop: int = stop) -> None:
            assert 0 <= done < total
            if done == stop and what != "forming modules":
                raise KeyboardInterrupt

        path = tmp_path / f"{stop}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            run({}, checkpoint=path, header=lambda: {"key": "k"}, progress=stopping)
        assert len(open_checkpoint(path, "k", FORMAT)["divergences"]) == stop
        seen: list[int] = []
        report = lambda done, total, what, seen=seen: seen.append(done) if what != "forming modules" else None  # noqa: E731
        again, _ = run({}, checkpoint=path, header=lambda: {"key": "k"}, progress=report)
        assert seen[0] == stop and again.plan == whole.plan and findings(again) == findings(whole)


def test_held_out_windows_count_once_where_sources_differ_in_length(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def improves(before: torch.Tensor, after: torch.Tensor, margin: float) -> bool:
        counts.extend((len(before), len(after)))
        return False

    monkeypatch.setattr(measured, "improves", improves)
    run({"exchanges": 0, "held_out": 0.25}, batches=(4, 8, 12))
    assert counts == [1 + 2 + 3] * 2


def test_a_single_axis_has_no_exchange_and_is_cut_all_the_same() -> None:
    cut, _ = run({}, budget=Budget(0.95, only=("blocks.1",), exclude=("q",)))
    assert set(cut.plan.changes) == {"decoder.blocks.1.gate.weight:0"} and cut.findings["exchanges"] == []


def test_ratios_of_a_measured_allocation_are_not_said_to_be_learned() -> None:
    cut, _ = run({"exchanges": 0})
    assert all("chosen" in row and "learned" not in row for row in cut.findings["modules"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"allocation": "measured", "lr": 0.2}, "allocation=measured does not use lr, got 0.2"),
        ({"allocation": "measured", "steps": 7}, "does not use steps, got 7; leave steps out, or give allocation="),
        ({"exchanges": 0}, "allocation=learned does not use exchanges, got 0; .* or give allocation=measured"),
    ],
)
def test_settings_of_the_other_allocation_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_method(MethodKind.PRUNING, "gprune").settings(**given)


def test_settings_of_measured_allocation_are_recorded_where_it_is_given() -> None:
    entry, own = find_method(MethodKind.PRUNING, "gprune"), {"levels", "level_windows", "level_tokens", "risk"}
    own |= {"exchanges", "exchange_windows"}
    assert not own & entry.defaults({"base"}).keys()
    recorded = entry.defaults({"allocation", "levels"})
    assert own - {"levels"} <= recorded.keys() and recorded["exchanges"] == 2
    assert not {"levels", "margin", "exact_start"} & recorded.keys()
