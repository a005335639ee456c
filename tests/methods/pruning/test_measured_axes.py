"""Calibration measures the axes that the budget lets a method cut: those, and no others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import regrow
from hand import lm, texts
from regrow.core.axes import AxisGraph, Mark
from regrow.core.budget import Budget
from regrow.core.scores import Evidence, Need, Statistics
from regrow.core.sources import Batch, Source
from regrow.data.batch_streams import BatchStream
from regrow.jobs.pruning_inputs import build_pruner, collect_evidence, divide_sources
from regrow.methods.pruning.obs import order_layers
from regrow.methods.pruning.pruner import PruningTask, plan_cut
from regrow.scoring.collect import collect

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64}
METHODS = ("flap", "fisher", "llm_pruner", "obs")
CASES = {
    "query heads in place of groups": (Budget(0.8, only=("self_attn",), exclude=("k_proj",)), "q_proj.weight:0/4"),
    "residual width": (Budget(0.9, marks=frozenset({Mark.FOLDED})), "embed_tokens.weight:1"),
    "neurons": (Budget(0.9, only=("mlp",)), "gate_proj.weight:0"),
}


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, AxisGraph, Source]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS)).eval()
    ids = torch.randint(50, (4, 12))
    return (
        model,
        regrow.trace(model, ids[:1]),
        Source("a", [Batch((one,), labels=one.roll(-1, 1)) for one in ids[:, None]]),
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_what_may_be_cut_is_measured(llama: tuple[nn.Module, AxisGraph, Source], name: str, case: str) -> None:
    model, axes, source = llama
    budget, end = CASES[case]
    pruner = build_pruner(name, {})
    evidence = collect_evidence(model, axes, pruner, [source], units=budget.units(axes))
    plan = plan_cut(pruner, model, axes, budget, evidence).plan
    assert any(key.endswith(end) for key in plan.changes)
    assert set(plan.changes) <= {axis.key for axis in budget.units(axes)}
    (sums,) = evidence.statistics["a"]
    read = {slot.name for axis in budget.units(axes) for slot in axis.consumers()}
    assert sums.moments.keys() <= {axes.ties.get(name, name) for name in read}


def test_a_call_measures_what_it_may_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow.jobs import pruning_inputs

    model, _ = lm(kv=3, rep=2, size=4, ff=24)
    data: Any = {"a": [(one.args[0], one.labels) for one in texts("a").batches]}
    measured: list[Evidence] = []

    def collect_too(*given: Any, **more: Any) -> Evidence:
        measured.append(collect_evidence(*given, **more))
        return measured[-1]

    monkeypatch.setattr(pruning_inputs, "collect_evidence", collect_too)
    _, plan = regrow.prune(model, data, method="flap", keep=0.9, only=("gate", "up", "down"))
    assert plan.changes
    assert {name.split(".")[-2] for name in measured[0].statistics["a"][0].moments} == {"down"}


def test_the_marks_of_a_budget_are_in_its_record() -> None:
    assert Budget().record().keys() == Budget(only=("mlp",)).record().keys()
    assert Budget(marks=frozenset({Mark.FOLDED, Mark.NEUTRAL})).record()["marks"] == ["folded", "neutral"]


class Recurrent(nn.Module):
    """One axis that only a recurrent layer reads, where inputs cannot be watched, and one that a linear layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.memory = nn.Linear(6, 16), nn.LSTM(16, 8, batch_first=True)
        self.wide, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.memory(self.lift(x))[0][:, -1]
        answer: torch.Tensor = self.head(self.wide(hidden).relu())
        return answer


def test_units_that_a_recurrent_layer_reads_are_scored_alone() -> None:
    torch.manual_seed(0)
    data: Any = (torch.randn(32, 5, 6), torch.randint(3, (32,)))
    _, plan = regrow.prune(Recurrent(), data, method="obs", keep=0.6)
    assert {"lift.weight:0", "wide.weight:0"} <= set(plan.changes)


def test_a_weight_that_no_batch_reaches_is_named(llama: tuple[nn.Module, AxisGraph, Source]) -> None:
    model, axes, source = llama
    evidence = Evidence(data={"a": source})
    task = PruningTask(model, axes, dict(model.named_parameters()), axes.units(("mlp",)), Budget(0.5), evidence)
    with pytest.raises(ValueError, match=r"never reached the weight 'model.layers.0.mlp.down_proj.weight', or not"):
        order_layers(task, Statistics("a"), ridge=0.01, centre=True)
    known = collect(model, axes, [source], {Need.ACTIVATIONS})["a"][0]
    with pytest.raises(ValueError, match="reads the data itself, got none; give Evidence with data="):
        order_layers(replace(task, evidence=Evidence()), known, ridge=0.01, centre=True)


def test_parts_of_a_loader_that_shuffles_do_not_overlap() -> None:
    class Shuffled(list[Batch]):
        def __iter__(self) -> Any:
            return iter([self[i] for i in torch.randperm(len(self)).tolist()])

    one = Source("a", Shuffled([Batch((torch.tensor([i]),)) for i in range(12)]))
    parts, notes = divide_sources(build_pruner("gprune", {}), [one])
    assert [part.name for part in parts] == ["a/1", "a/2", "a/3"] and "'a' was split into 3 parts" in notes[0]
    assert sorted(int(batch.args[0]) for part in parts for batch in part) == list(range(12))
    stream = Source("a", BatchStream(DataLoader(torch.arange(12.0)[:, None], batch_size=1, shuffle=True), "a"))
    read = divide_sources(build_pruner("gprune", {"shards": 4}), [stream, stream, stream])[0][0]
    assert [batch.args[0] for batch in read] == [batch.args[0] for batch in read], "read once"


@pytest.mark.parametrize("name", ["gprune", "depth"])
def test_methods_that_compare_classes_refuse_other_outputs(name: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))
    data = {key: [(torch.randn(8, 6), torch.randn(8)) for _ in range(8)] for key in "abc"}
    with pytest.raises(ValueError, match=f"{name} compares probabilities of classes, got regression; use another"):
        regrow.prune(net, data, method=name, keep=0.8, out=tmp_path / "run")
    assert net[0].out_features == 16 and not (tmp_path / "run").exists()


def test_windows_that_cannot_be_fitted_are_refused_before_the_cut() -> None:
    model, _ = lm(kv=3, rep=2, size=4, ff=24)
    data = {"a": [(torch.randint(11, (1, n)), torch.randint(11, (1, n))) for n in (6, 7)] * 2}
    with pytest.raises(ValueError, match="windows of one length"):
        regrow.prune(model, {"a": data["a"]}, method="flap", keep=0.9, only=("gate", "up", "down"), reconstruct=True)
    assert model.decoder.blocks[0].gate.out_features == 24


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("flap", {"allocation": "even"}),
        ("magnitude", {"allocation": "rows"}),
        ("obs", {"ridge": 0.0}),
        ("random", {"allocation": "even"}),
        ("gprune", {"lr": 0.0}),
        ("gprune", {"switch_most": 2.0}),
    ],
)
def test_settings_are_checked_before_anything_is_measured(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        build_pruner(name, settings)
