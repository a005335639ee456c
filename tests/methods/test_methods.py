"""Every method of the table makes one legal plan that meets its budget."""

import json
from dataclasses import fields

import pytest
import torch

from hand import conv, lm, texts
from regrow.allocation.cost import Cost
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.plan import Plan
from regrow.core.scores import Evidence, Need
from regrow.core.sources import Batch, Source
from regrow.jobs.pruning_inputs import collect_evidence
from regrow.methods import METHODS, MethodKind, find_method
from regrow.methods.pruning.pruner import check_pruner, plan_cut
from regrow.scoring import spaces
from regrow.scoring.collect import collect
from regrow.store.ledger import read_plan


def proposed(name: str, keep: float = 0.7, **settings: object) -> tuple[Plan, AxisGraph]:
    model, axes = lm()
    row = find_method(MethodKind.PRUNING, name)
    method = row.build(row.settings(**settings))
    evidence = collect_evidence(model, axes, method, [texts(word, seed=i) for i, word in enumerate("abc")])
    check_pruner(method, axes, Budget(keep))
    return plan_cut(method, model, axes, Budget(keep), evidence).plan, axes


VARIANTS = [
    ("random", {}),
    ("random", {"compensate": True, "allocation": "ranked"}),
    ("magnitude", {}),
    ("magnitude", {"allocation": "ranked", "compensate": True}),
    ("wanda_sp", {}),
    ("wanda_sp", {"allocation": "ranked", "compensate": False}),
    ("flap", {}),
    ("flap", {"allocation": "uniform"}),
    ("llm_pruner", {}),
    ("llm_pruner", {"allocation": "ranked", "compensate": True}),
    ("fisher", {}),
    ("fisher", {"allocation": "ranked", "compensate": False}),
    ("fisher", {"allocation": "measured"}),
    ("obs", {}),
    ("obs", {"allocation": "ranked", "prune_outer": False}),
    ("gprune", {"steps": 4, "every": 2, "shards": 2}),
    ("gprune", {"steps": 0, "base": "wanda_sp", "shards": 2, "instead": "weights", "switch": "always"}),
    ("gprune", {"steps": 2, "base": "llm_pruner", "shards": 2, "partition": "random", "switch": "unreliable"}),
    ("gprune", {"steps": 2, "base": "magnitude", "shards": 1, "compensate": False}),
]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_plan_meets_its_budget_and_can_be_made_again(name: str, settings: dict[str, object]) -> None:
    plan, axes = proposed(name, **settings)
    cost = Cost(axes)
    assert 0.6 * cost.total < cost(plan.sizes(axes)) <= 0.7 * cost.total
    plan.check(axes)
    assert read_plan(json.loads(plan.to_json())) == plan
    assert proposed(name, **settings)[0] == plan
    row = find_method(MethodKind.PRUNING, name)
    full = row.settings(**settings)
    assert bool(plan.means) is full.compensate
    assert plan.origin["method"] == name and plan.origin["settings"]["compensate"] is full.compensate
    assert row.citation and row.about
    assert all(field.name in (row.settings.__doc__ or "") for field in fields(row.settings))


def test_switches_change_the_plan() -> None:
    assert proposed("random", seed=1)[0].changes != proposed("random", seed=2)[0].changes
    keeps = (0.4, 0.5, 0.6, 0.75, 0.95)
    assert any(proposed("flap", k)[0].changes != proposed("flap", k, allocation="uniform")[0].changes for k in keeps)
    assert proposed("flap")[0].changes != proposed("wanda_sp")[0].changes


def test_llm_pruner_leaves_first_and_last_blocks_unpruned(monkeypatch: pytest.MonkeyPatch) -> None:
    for outer, blocks in (((0.5, 0.0), {"1"}), ((0.0, 0.5), {"0"})):
        monkeypatch.setattr(spaces, "OUTER_BLOCKS", outer)
        assert {key.split(".")[2] for key in proposed("llm_pruner", keep=0.9)[0].changes} == blocks
    assert {key.split(".")[2] for key in proposed("llm_pruner", keep=0.7, prune_outer=True)[0].changes} == {"0", "1"}


def test_only_and_exclude_choose_axes() -> None:
    model, axes = lm()
    method = find_method(MethodKind.PRUNING, "magnitude").build(find_method(MethodKind.PRUNING, "magnitude").settings())
    for budget, part in (
        (Budget(0.8, only=("decoder.blocks.1.*",)), "blocks.1"),
        (Budget(0.8, exclude=("o",)), "gate"),
    ):
        plan = plan_cut(method, model, axes, budget).plan
        assert plan.changes and all(part in key for key in plan.changes)


def test_evidence_that_is_missing_is_asked_for() -> None:
    model, axes = lm()
    method = find_method(MethodKind.PRUNING, "flap").build(find_method(MethodKind.PRUNING, "flap").settings())
    with pytest.raises(ValueError, match="at least one --source"):
        plan_cut(method, model, axes, Budget(0.8))


def test_convolutions_work_and_padded_ones_are_not_compensated() -> None:
    for padding in (0, 1):
        model, axes = conv(padding=padding)
        source = Source("p", [Batch((torch.randn(2, 3, 5, 5),), labels=torch.tensor([0, 1]))])
        for name in METHODS.keys() - {"gprune"}:  # which compares sources
            method = find_method(MethodKind.PRUNING, name).build(find_method(MethodKind.PRUNING, name).settings())
            evidence = Evidence(collect(model, axes, [source], method.needs))
            plan = plan_cut(method, model, axes, Budget(0.7), evidence).plan
            assert len(plan.changes["0.weight:0"].keep) == 4
            assert bool(plan.means) is (padding == 0 and method.compensate is not None)


def test_an_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no method 'wanda-ps'; did you mean 'wanda_sp'\? the methods are random"):
        find_method(MethodKind.PRUNING, "wanda-ps")
    with pytest.raises(ValueError, match="no method 'zzz'; the methods are"):
        find_method(MethodKind.PRUNING, "zzz")
    with pytest.raises(ValueError, match="one of uniform, ranked, measured, got"):
        proposed("flap", allocation="best")


def test_several_words_of_a_setting_come_with_commas() -> None:
    assert (
        find_method(MethodKind.SEARCH, "mgas").create("mgas", {"levels": "operations,filters"}).settings["levels"][1]
        == "filters"
    )
    with pytest.raises(ValueError, match="levels are some of"):
        find_method(MethodKind.SEARCH, "mgas").create("mgas", {"levels": "operations,kernels"})
    assert find_method(MethodKind.SEARCH, "mgas").create("mgas", {"stages": "0,1"}).settings["stages"] == (0, 1)
    with pytest.raises(ValueError, match=r"mgas: Expected `int`, got `str` - at `\$\.stages\[0\]`"):
        find_method(MethodKind.SEARCH, "mgas").create("mgas", {"stages": "a,b"})


def test_needs_are_no_more_than_what_is_used() -> None:
    needs = {name: row.build(row.settings()).needs for name, row in METHODS.items()}
    assert Need.ACTIVATIONS not in needs["random"] | needs["magnitude"]
    assert Need.GRADIENTS in needs["llm_pruner"] and Need.GRADIENTS not in needs["flap"]
