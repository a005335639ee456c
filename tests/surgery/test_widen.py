"""Growing: unit ids, what new units hold, and an optimizer that follows."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hand
import laws
from regrow.core.axes import Axis
from regrow.core.plan import MOST_NEW_UNITS, Change, Fill, Plan, PlanError
from regrow.store.errors import StoreError
from regrow.store.ledger import read_plan
from regrow.surgery import apply
from regrow.tracing import trace
from zoo import Wired

KEY = "0.weight:0"


def net() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    model[1].running_var.uniform_(0.5, 2)
    return model, trace(model.eval(), torch.randn(2, 3, 6, 6))


def mlp() -> tuple[nn.Module, Any]:
    model, _ = hand.mlp()
    return model, trace(model, torch.randn(8, 4))


def test_a_unit_id_is_never_used_twice() -> None:
    model, axes = net()
    model, axes = apply(model, axes, Plan.keeping(axes, {KEY: range(5)}))
    model, axes = apply(model, axes, Plan.growing(axes, {KEY: 2}))
    assert axes[KEY].ids == (0, 1, 2, 3, 4, 6, 7) and axes[KEY].next_id == 8
    model, axes = apply(model, axes, Plan.keeping(axes, {KEY: (0, 6)}))
    assert axes[KEY].ids == (0, 7) and axes[KEY].next_id == 8


def test_a_plan_that_grows_survives_json() -> None:
    _, axes = net()
    plan = Plan.growing(axes, {KEY: 4}, Fill("split", seed=3))
    assert read_plan(json.loads(plan.to_json())) == plan
    assert plan.sizes(axes)[KEY] == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grow": -1}, f"grow by 0 to {MOST_NEW_UNITS}"),
        ({"grow": MOST_NEW_UNITS + 1}, f"grow by 0 to {MOST_NEW_UNITS}"),
        ({"grow": 1, "fill": Fill("luck")}, "filled by zero_out, split; got 'luck'"),
    ],
)
def test_an_impossible_growth_is_refused(change: dict[str, Any], words: str) -> None:
    _, axes = net()
    with pytest.raises(PlanError, match=words):
        Plan({KEY: Change(6, tuple(range(6)), axes[KEY].slots, **change)})


def test_an_axis_that_cannot_grow_says_why() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    axes = trace(model, torch.randn(2, 4))
    with pytest.raises(PlanError, match=r"cannot be widened: .* layer_norm in 1"):
        Plan.growing(axes, {"0.weight:0": 1})
    with pytest.raises(PlanError, match="is frozen: it is an output"):
        Plan.growing(axes, {"2.weight:0": 1})
    with pytest.raises(PlanError, match="no axis 'x'"):
        Plan.growing(axes, {"x": 1})


@pytest.mark.parametrize("rule", ["zero_out", "split"])
@pytest.mark.parametrize("groups", [3, 12])
def test_group_norms_take_whole_newborn_groups(rule: str, groups: int) -> None:
    """A new group is normed by itself, so nothing else hears it; a unit more inside a group would be heard."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(groups, 12), nn.ReLU(), nn.Conv2d(12, 4, 3), nn.Flatten(), nn.Linear(16, 2)
    )
    nn.init.normal_(model[1].weight)
    axes = trace(model, torch.randn(2, 3, 6, 6))
    whole = next(axis for axis in axes.units() if axis.size == groups and axis.key.startswith("0.weight:0"))
    laws.widening_keeps_function(model, axes, Plan.growing(axes, {whole.key: 2}, Fill(rule)))
    wide, _ = apply(copy.deepcopy(model), axes, Plan.growing(axes, {whole.key: 2}, Fill(rule)))
    assert wide[1].num_groups == groups + 2 and wide[1].num_channels == 12 + 2 * 12 // groups
    if groups == 3:
        with pytest.raises(PlanError, match=r"cannot be widened: .* group_norm in 1"):
            Plan.growing(axes, {"0.weight:0": 1})


def test_a_plan_that_compensates_does_not_grow() -> None:
    _, axes = net()
    with pytest.raises(PlanError, match="make two"):
        replace(Plan.growing(axes, {KEY: 1}), means={"4.weight": {0: 1.0}}).check(axes)


def test_what_newborn_units_hold() -> None:
    """Zero-out: rows of old numbers, statistics of a kept unit, zero readers; split: copies that share readers."""
    model, axes = net()
    old = copy.deepcopy(model)
    wide, _ = apply(copy.deepcopy(model), axes, Plan.growing(axes, {KEY: 60}))
    assert torch.equal(wide[0].weight[:6], old[0].weight)
    assert wide[0].weight[6:].std().item() == pytest.approx(old[0].weight.std().item(), rel=0.1)
    assert set(wide[0].weight[6:].flatten().tolist()) <= set(old[0].weight.flatten().tolist())
    assert set(wide[1].running_var[6:].tolist()) <= set(old[1].running_var.tolist())
    assert not wide[4].weight.view(5, 66, 16)[:, 6:].any()
    split, _ = apply(copy.deepcopy(model), axes, Plan.growing(axes, {KEY: 6}, Fill("split", seed=1)))
    donors = [int((old[0].weight == row).flatten(1).all(1).nonzero()) for row in split[0].weight[6:]]
    assert sorted(donors) == list(range(6))
    read = split[4].weight.view(5, 12, 16)
    together = read[:, :6].index_add(1, torch.tensor(donors), read[:, 6:])
    assert torch.allclose(together, old[4].weight.view(5, 6, 16), atol=1e-6)
    assert not torch.allclose(read[:, donors], read[:, 6:])
    again, _ = apply(copy.deepcopy(model), axes, Plan.growing(axes, {KEY: 6}, Fill("split", seed=1)))
    assert all(torch.equal(a, b) for a, b in zip(split.parameters(), again.parameters(), strict=True))


OPTIMISERS = {
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01),
    "plain": lambda groups: torch.optim.SGD(groups, lr=0.1),
}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimizer_follows(name: str) -> None:
    """Kept entries keep what is remembered of them; new ones start with no drift and a usual step size."""
    model, axes = mlp()
    decayed = [p for n, p in model.named_parameters() if "weight" in n]
    optimizer = OPTIMISERS[name](
        [{"params": decayed}, {"params": [p for n, p in model.named_parameters() if "bias" in n], "weight_decay": 0.0}]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for seed in range(3):
        _step(model, optimizer, seed)
        schedule.step()
    before = {n: dict(optimizer.state[p]) for n, p in model.named_parameters()}
    rates = [group["lr"] for group in optimizer.param_groups]
    plan = Plan.keeping(axes, {"0.weight:0": (0, 2, 3, 5)})
    plan = Plan({**plan.changes, **Plan.growing(axes, {"2.weight:0": 3}).changes})
    model, axes = apply(model, axes, plan, optimizers=[optimizer])
    named = dict(model.named_parameters())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(named) and all(any(p is q for q in held) for p in named.values())
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 3]
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for n, p in named.items() if "weight" in n}
    assert [group["lr"] for group in optimizer.param_groups] == rates
    for what, old in before["2.weight"].items():
        now = optimizer.state[named["2.weight"]][what]
        if not isinstance(old, torch.Tensor) or old.dim() == 0:
            assert now == old
            continue
        kept = old[:, [0, 2, 3, 5]]
        assert now.shape == (8, 4) and torch.equal(now[:5], kept)
        first = what in ("momentum_buffer", "exp_avg")
        assert torch.allclose(now[5:], torch.zeros(3, 4) if first else kept.mean(0).expand(3, 4))
    for seed in range(3, 6):
        _step(model, optimizer, seed)
        schedule.step()


def test_a_cut_optimizer_goes_on_as_if_the_cut_network_had_been_trained() -> None:
    """Units that nothing reads and that nothing moves are cut: the steps after are those without the cut."""
    model, axes = mlp()
    with torch.no_grad():
        model[2].weight[:, 4:] = 0
        model[0].weight[4:] = 0
        model[0].bias[4:] = 0
    whole, cut = copy.deepcopy(model), copy.deepcopy(model)
    runs = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (whole, cut)]
    for seed in range(3):
        for net_, optimizer in zip((whole, cut), runs, strict=True):
            _step(net_, optimizer, seed)
    cut, _ = apply(cut, axes, Plan.keeping(axes, {"0.weight:0": range(4)}), optimizers=[runs[1]])
    for seed in range(3, 6):
        for net_, optimizer in zip((whole, cut), runs, strict=True):
            _step(net_, optimizer, seed)
    assert torch.allclose(whole[4].weight, cut[4].weight, atol=1e-6)
    assert torch.allclose(whole[0].weight[:4], cut[0].weight, atol=1e-6)


def test_a_memory_of_another_shape_is_refused_and_nothing_changes() -> None:
    model, axes = mlp()
    optimizer = torch.optim.Adafactor(model.parameters())
    _step(model, optimizer, 0)
    with laws.untouched(model), pytest.raises(PlanError, match=r"row_var.*make a new optimizer"):
        apply(model, axes, Plan.growing(axes, {"0.weight:0": 2}), optimizers=[optimizer])
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_a_memory_that_is_not_known_is_refused() -> None:
    model, axes = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["secret"] = torch.zeros_like(model[0].weight)
    with pytest.raises(PlanError, match="'secret'"):
        apply(model, axes, Plan.growing(axes, {"0.weight:0": 2}), optimizers=[optimizer])


def test_units_of_an_axis_are_numbered_from_0_at_birth() -> None:
    assert Axis("a", 3, ()).next_id == 3 and Axis("a", 2, (), ids=(4, 9)).next_id == 10


# --- what must be refused, since new units would be heard ---------------------------------------------------------


def stream(put: Any, **parts: Any) -> Wired:
    """A residual stream under a root-mean-square norm, with something done to it on the way."""
    torch.manual_seed(0)
    net_ = Wired(
        lambda m, x: m.out(m.norm((h := put(m, m.inp(x))) + m.down(m.up(h).relu()))),
        inp=nn.Linear(4, 6),
        up=nn.Linear(6, 7),
        down=nn.Linear(7, 6),
        norm=nn.RMSNorm(6, eps=1e-6),
        out=nn.Linear(6, 3),
    )
    for name, part in parts.items():
        setattr(net_, name, part) if isinstance(part, nn.Module | nn.Parameter) else net_.register_buffer(name, part)
    return net_


STREAMS = {
    "as it is": (lambda m, h: h, {}, True),
    "scaled": (lambda m, h: h * m.s, {"s": nn.Parameter(torch.tensor(0.3))}, True),
    "a number for all": (lambda m, h: h + m.s, {"s": nn.Parameter(torch.tensor([0.3]))}, False),
    "a constant": (lambda m, h: h + torch.tensor(0.5), {}, False),
    "a table in slices": (lambda m, h: h + m.pe[:5], {"pe": torch.randn(9, 6)}, False),
    "another function of a parameter": (lambda m, h: h + m.a.exp(), {"a": nn.Parameter(torch.randn(6))}, False),
    "ones": (lambda m, h: h + torch.ones_like(h), {}, False),
    "a softmax beside": (lambda m, h: h.softmax(0), {}, False),
    "a sum of it": (lambda m, h: h - 0.1 * h.sum(-1, keepdim=True), {}, False),
    "mixed over positions": (lambda m, h: h + m.mix(h.mT).mT, {"mix": nn.Linear(5, 5)}, False),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_widened_only_where_newborn_units_stay_0(name: str) -> None:
    put, parts, can = STREAMS[name]
    model = stream(put, **parts)
    axes = trace(model, torch.randn(5, 4))
    axis = next(axis for axis in axes if any(slot.name == "inp.weight" and slot.dim == 0 for slot in axis.slots))
    if can:
        laws.widening_keeps_function(model, axes, Plan.growing(axes, {axis.key: 2}))
    else:
        with pytest.raises(PlanError, match=r"cannot be widened|is frozen"):
            Plan.growing(axes, {axis.key: 2})


def test_readers_that_are_no_real_numbers_cannot_be_silent() -> None:
    model = Wired(lambda m, x: nn.functional.linear(m.a(x).relu(), m.q.float()), a=nn.Linear(4, 6))
    model.register_buffer("q", torch.randint(-9, 9, (3, 6), dtype=torch.int8))
    axes = trace(model, torch.randn(2, 4))
    assert not axes["a.weight:0"].free or axes["a.weight:0"].narrow


def test_two_readers_that_meet_are_no_place_for_newborn_units() -> None:
    model = Wired(
        lambda m, x: m.b(h := m.a(x)) + m.c(h) + (m.b.weight @ m.c.weight.mT).sum(),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 3),
        c=nn.Linear(6, 3),
    )
    axes = trace(model, torch.randn(2, 4))
    with pytest.raises(PlanError, match=r"cannot be widened: .* matmul in the model"):
        Plan.growing(axes, {"a.weight:0": 2}, Fill("split"))


def test_what_also_scales_its_units_is_not_shared() -> None:
    model = Wired(lambda m, x: m.b((h := m.a(x)) * m.w) + (h @ m.w)[:, None], a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    model.w = nn.Parameter(torch.randn(6))
    axes = trace(model, torch.randn(2, 4))
    (axis,) = axes.free()
    with pytest.raises(PlanError, match="does something else with them"):
        Plan.growing(axes, {axis.key: 2}, Fill("split"))
    laws.widening_keeps_function(model, axes, Plan.growing(axes, {axis.key: 2}))


def test_a_number_that_depends_on_a_larger_size_is_found() -> None:
    model = Wired(lambda m, x: m.b(h := m.a(x).relu()) / max(8, h.shape[-1]), a=nn.Linear(4, 8), b=nn.Linear(8, 3))
    axes = trace(model, torch.randn(2, 4))
    with laws.untouched(model), pytest.raises(PlanError, match=r"a number in div .* depends on the size"):
        apply(model, axes, Plan.growing(axes, {"a.weight:0": 2}))


def test_tied_weights_that_are_all_there_is_would_be_dead() -> None:
    model = Wired(
        lambda m, x: nn.functional.linear(m.norm(m.e(x)), m.e.weight), e=nn.Embedding(9, 6), norm=nn.RMSNorm(6)
    )
    axes = trace(model, torch.randint(9, (2, 4)))
    (axis,) = axes.free()
    with pytest.raises(PlanError, match="get no gradient"):
        Plan.growing(axes, {axis.key: 2})


# --- births -----------------------------------------------------------------------------------------------------------


def test_seeds_and_later_births_draw_other_numbers() -> None:
    model, axes = net()
    one, two = (
        apply(copy.deepcopy(model), axes, Plan.growing(axes, {KEY: 2}, Fill(seed=seed)))[0][0].weight[6:]
        for seed in (0, 1)
    )
    assert not torch.equal(one, two)
    twice, left = apply(model, axes, Plan.growing(axes, {KEY: 2}))
    twice, _ = apply(twice, left, Plan.growing(left, {KEY: 2}))
    assert not torch.equal(twice[0].weight[6:8], twice[0].weight[8:])


def test_a_layer_that_starts_at_0_gets_units_that_do_not() -> None:
    model, axes = net()
    nn.init.zeros_(model[0].weight)
    wide, _ = apply(model, axes, Plan.growing(axes, {KEY: 2}))
    assert bool(wide[0].weight[6:].flatten(1).any(1).all())


def test_slots_follow_where_a_loop_around_them_grows() -> None:
    """Rows lie as heads × (repeats × size ‖ more): a third repeat has its own rows."""

    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        rows = m.a(x).unflatten(-1, (4, -1))
        first = rows[..., :10].unflatten(-1, (2, 5)) * m.s[:, None, :]
        return m.r(torch.cat([m.b(first).flatten(-2), rows[..., 10:]], -1).flatten(-2))

    torch.manual_seed(0)
    model = Wired(wire, a=nn.Linear(3, 52), b=nn.Linear(5, 2), r=nn.Linear(28, 3))
    model.s = nn.Parameter(torch.randn(4, 5))
    axes = trace(model, torch.randn(2, 3))
    for axis in axes.free():
        if (plan := laws.growing_plan(axes, axis, "zero_out")) is not None:
            laws.widening_keeps_function(model, axes, plan)
            laws.axes_after_a_cut_are_those_of_a_new_trace(model, axes, plan)


def test_an_optimizer_that_holds_all_in_one_piece_is_refused() -> None:
    model, axes = mlp()
    with pytest.raises(PlanError, match="LBFGS keeps all parameters in one piece"):
        apply(model, axes, Plan.growing(axes, {KEY: 2}), optimizers=[torch.optim.LBFGS(model.parameters())])


def test_a_bias_that_compensation_adds_is_trained_with_its_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    axes = trace(model, torch.randn(2, 4))
    optimizer = torch.optim.SGD([{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()]}], lr=0.1)
    plan = Plan.keeping(axes, {KEY: range(5)}, means={"2.weight": {5: 0.5}})
    model, _ = apply(model, axes, plan, optimizers=[optimizer])
    assert any(one is model[2].bias for one in optimizer.param_groups[1]["params"])


@pytest.mark.parametrize("value", ['"2"', "true", "2.5", "Infinity", str(2**70), "null"])
def test_only_whole_numbers_are_read_from_a_plan(value: str) -> None:
    _, axes = net()
    text = Plan.growing(axes, {KEY: 4}).to_json()
    for field in ('"grow": 4', '"seed": 0'):
        with pytest.raises((PlanError, StoreError), match=r"whole number|Expected `int`|grow by 0 to"):
            read_plan(json.loads(text.replace(field, f"{field.split(':')[0]}: {value}")))


def test_an_average_of_the_weights_follows() -> None:
    """The plan fits a moving average as well: each keeps its own numbers, and averaging goes on."""
    model, axes = mlp()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for seed in range(3):
        _step(model, optimizer, seed)
        average.update_parameters(model)
    x = torch.randn(8, 4)
    answer, first = average(x), average.module[0].weight.clone()
    plan = Plan.growing(axes, {"0.weight:0": 3, "2.weight:0": 2})
    model, after = apply(model, axes, plan, optimizers=[optimizer])
    apply(average.module, axes, plan)
    assert torch.allclose(average(x), answer, atol=1e-6) and torch.equal(average.module[0].weight[:6], first)
    _step(model, optimizer, 4)
    average.update_parameters(model)
    now = average.module[0].weight[:6]
    assert torch.allclose(now, 0.75 * first + 0.25 * model[0].weight[:6], atol=1e-6)
    cut = Plan.keeping(after, {"0.weight:0": range(2, 8)})
    model, _ = apply(model, after, cut, optimizers=[optimizer])
    apply(average.module, after, cut)
    average.update_parameters(model)
    assert average(x).shape == answer.shape
