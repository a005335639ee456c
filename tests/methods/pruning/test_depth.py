"""Depth pruning: budgets, modules whose absence changes nothing, resuming, refusals, and saved networks."""

import copy
import weakref
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regrow import apply, load, trace
from regrow.allocation.cost import Cost
from regrow.allocation.ranked import BudgetError
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.errors import RefusedError
from regrow.core.scores import Evidence
from regrow.core.sources import Batch, Source, labelled_logits
from regrow.jobs.pruning_inputs import build_pruner, check_pruning, collect_evidence
from regrow.methods.pruning import depth
from regrow.methods.pruning.depth import find_modules, predictions
from regrow.methods.pruning.pruner import PlannedCut, PruningContext, plan_cut, with_droppable_modules
from regrow.store import save
from regrow.surgery import verify
from regrow.tracing.branches import PlaceholderModule

WORDS, BLOCKS = 50, 4


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=WORDS, num_hidden_layers=BLOCKS, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).eval()


def traced(model: Any) -> AxisGraph:
    axes = trace(model, input_ids=torch.ones(1, 5, dtype=torch.int64))
    return with_droppable_modules(build_pruner("depth", {}), model, axes)


def prepared(model: Any, axes: AxisGraph, **settings: Any) -> tuple[Any, AxisGraph, Evidence]:
    pruner = build_pruner("depth", {"unit": "any", "tokens": 32, "prune_outer": True, **settings})
    generator = torch.Generator().manual_seed(1)
    batches = [
        Batch(kwargs={"input_ids": ids}, labels=ids.roll(-1, 1))
        for ids in torch.randint(WORDS, (6, 1, 16), generator=generator)
    ]
    sources = [Source("a", batches[:3]), Source("b", batches[3:])]
    return pruner, axes, collect_evidence(model, axes, pruner, sources)


@pytest.fixture(scope="module")
def known() -> tuple[Any, AxisGraph]:
    model = llama()
    return model, traced(model)


def test_unit_types_are_the_modules_of_the_decoder(known: tuple[Any, AxisGraph]) -> None:
    _, axes = known
    of = {unit: [*find_modules(axes, unit)] for unit in ("attention", "mlp", "block", "any")}
    layers = [f"model.layers.{i}" for i in range(BLOCKS)]
    assert of["attention"] == [f"{one}.self_attn" for one in layers[1:]]  # the first counts the cached tokens
    assert of["mlp"] == [f"{one}.mlp" for one in layers] and of["block"] == layers[1:]
    assert sorted(of["any"]) == sorted(of["attention"] + of["mlp"])


@pytest.mark.parametrize("settings", [{}, {"unit": "block", "fill": "none"}], ids=str)
def test_the_budget_is_met_and_the_cut_network_is_the_masked_one(
    known: tuple[Any, AxisGraph], settings: dict[str, Any]
) -> None:
    network, _ = known
    pruner, axes, evidence = prepared(*known, **settings)
    before, total = copy.deepcopy(network.state_dict()), Cost(axes).total
    cut = plan_cut(pruner, known[0], axes, Budget(0.55), evidence)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    small, after = apply(copy.deepcopy(network), axes, cut.plan)
    assert cut.plan.drop and verify(network, axes, cut.plan).ok
    left = Cost(after).total / total
    assert left == pytest.approx(sum(small.get_parameter(name).numel() for name in after.counted) / total)
    if "fill" in settings:
        assert not cut.plan.changes and left <= 0.55
    else:
        assert 0.55 - 3 * 24 * BLOCKS / total < left <= 0.55
        counts = {row["modules"]: row["divergence"] for row in cut.findings["depth"]["counts"]}
        assert counts[len(cut.plan.drop)] == min(counts.values())
        assert {0, len(cut.findings["depth"]["path"])} <= {*counts}


def test_modules_that_add_nothing_are_dropped_first() -> None:
    model, idle = llama(), {"model.layers.2.self_attn", "model.layers.1.mlp"}
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    pruner, axes, evidence = prepared(model, traced(model))
    cut = plan_cut(pruner, model, axes, Budget(0.6), evidence)
    path = cut.findings["depth"]["path"]
    assert {one["module"] for one in path[:2]} == idle <= {*cut.plan.drop}
    assert path[1]["divergence"] == pytest.approx(0, abs=1e-6) and path[2]["divergence"] > 1e-4


@pytest.mark.parametrize("bad", ["one", "every", "dense"])
def test_modules_without_which_predictions_are_not_finite_stay(bad: str) -> None:
    model = llama()
    pruner, axes, evidence = prepared(model, traced(model))

    def spoil(network: Any, given: object, answer: Any) -> None:
        gone = [path for path, one in network.named_modules() if isinstance(one, PlaceholderModule)]
        if bad == "dense" or (bad == "every" and gone) or (bad == "one" and "model.layers.0.mlp" in gone):
            answer.logits[..., 0] = float("nan")

    model.register_forward_hook(spoil)
    if bad == "one":
        cut = plan_cut(pruner, model, axes, Budget(0.6), evidence)
        assert cut.plan.drop and "model.layers.0.mlp" not in cut.plan.drop
    else:
        with pytest.raises(RefusedError, match="hold NaN or infinity; try float32 or bfloat16"):
            plan_cut(pruner, model, axes, Budget(0.6), evidence)


def test_rises_that_cannot_be_the_smallest_are_not_measured_again(known: tuple[Any, AxisGraph]) -> None:
    pruner, axes, evidence = prepared(*known, fill="none", unit="mlp")
    found = plan_cut(pruner, known[0], axes, Budget(0.6), evidence).findings["depth"]
    assert len(found["path"]) == 3 and BLOCKS + 2 <= found["measured"] < BLOCKS + 3 + 2


def test_an_interrupted_search_goes_on_from_what_it_measured(
    known: tuple[Any, AxisGraph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner, axes, evidence = prepared(*known)
    place = {"checkpoint": tmp_path / "learned.safetensors"}

    def run(stop: int) -> PlannedCut:
        steps = iter(range(stop))

        def progress(*_: object) -> None:
            if next(steps, None) is None:
                raise KeyboardInterrupt

        return plan_cut(
            pruner, known[0], axes, Budget(0.6), evidence, context=PruningContext(progress=progress, **place)
        )

    monkeypatch.setattr(predictions, "SECONDS", 0.0)
    whole = plan_cut(pruner, known[0], axes, Budget(0.6), evidence)
    with pytest.raises(KeyboardInterrupt):
        run(stop=9)
    again = run(stop=10**6)
    assert again.plan == whole.plan
    assert again.findings == whole.findings


def test_logits_of_one_batch_at_a_time_are_in_memory(
    known: tuple[Any, AxisGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def counted(*given: Any) -> torch.Tensor:
        logits = labelled_logits(*given)
        alive.append(weakref.ref(logits))
        counts.append(sum(one() is not None for one in alive))
        return logits

    monkeypatch.setattr(predictions, "labelled_logits", counted)
    monkeypatch.setattr(depth, "POSITIONS", 16)
    pruner, axes, evidence = prepared(*known)
    plan_cut(pruner, known[0], axes, Budget(0.6), evidence)
    assert len(counts) > 4 * BLOCKS and max(counts) <= 2


def test_a_source_is_read_no_further_than_needed_and_named_if_it_is_short(known: tuple[Any, AxisGraph]) -> None:
    endless: Any = (Batch(labels=torch.ones(1, 16, dtype=torch.int64)) for _ in count())
    assert [*map(len, predictions.first_batches(Source("a", endless), 40))] == [2, 5]
    for tokens, short in ((32, False), (48, True)):
        pruner, axes, evidence = prepared(*known, tokens=tokens)
        notes = plan_cut(pruner, known[0], axes, Budget(0.6), evidence).plan.origin["notes"]
        assert any("no further ones of a, b; give more data" in note for note in notes) == short


def test_a_saved_network_without_modules_answers_the_same(known: tuple[Any, AxisGraph], tmp_path: Path) -> None:
    pruner, axes, evidence = prepared(*known, unit="any", fill="none")
    small, _ = apply(copy.deepcopy(known[0]), axes, plan_cut(pruner, known[0], axes, Budget(0.6), evidence).plan)
    ids = torch.arange(12)[None]
    save(small, tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "small", model=llama)(input_ids=ids).logits, small(input_ids=ids).logits)
        more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(small.generate(ids, **more), small.generate(ids, use_cache=False, **more))


def test_what_cannot_be_planned_is_refused_with_a_remedy(known: tuple[Any, AxisGraph]) -> None:
    for settings, budget, why in (
        ({"unit": "attention", "fill": "none"}, Budget(0.5), "without every module .* 7.* stays; use keep 0.7"),
        ({}, Budget(0.8, regular=True), "leave out regular, or set fill=none"),
        ({}, Budget(0.5, only=("self_attn",)), "without every module .* use keep 0.7"),
    ):
        pruner, axes, evidence = prepared(*known, **settings)
        with pytest.raises(BudgetError if "keep" in why else ValueError, match=why):
            check_pruning(pruner, axes, budget, [*evidence.data.values()])
    with pytest.raises(ValueError, match="unit must be one of block, attention, mlp, any"):
        build_pruner("depth", {"unit": "head"})
