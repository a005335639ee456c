"""Growing: birth numbers, what newborn units hold, and an optimiser that follows."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import hand
import laws
from regrow.axes import Axis
from regrow.plan import MOST, Change, Fill, Plan, PlanError
from regrow.surgery import apply
from regrow.tracing import trace

KEY = "0.weight:0"


def net() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    return model, trace(model.eval(), torch.randn(2, 3, 6, 6))


def mlp() -> tuple[nn.Module, Any]:
    model, _ = hand.mlp()
    return model, trace(model, torch.randn(8, 4))


def test_a_birth_number_is_never_used_twice() -> None:
    model, axes = net()
    model, axes = apply(model, axes, Plan.keeping(axes, {KEY: range(5)}))
    model, axes = apply(model, axes, Plan.growing(axes, {KEY: 2}))
    assert axes[KEY].ids == (0, 1, 2, 3, 4, 6, 7) and axes[KEY].born == 8
    model, axes = apply(model, axes, Plan.keeping(axes, {KEY: (0, 6)}))
    assert axes[KEY].ids == (0, 7) and axes[KEY].born == 8


def test_a_plan_that_grows_survives_json() -> None:
    _, axes = net()
    plan = Plan.growing(axes, {KEY: 4}, Fill("pair", seed=3))
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.sizes(axes)[KEY] == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grow": 3, "fill": Fill("pair")}, "3 is odd"),
        ({"grow": -1}, f"grow by 0 to {MOST}"),
        ({"grow": MOST + 1}, f"grow by 0 to {MOST}"),
        ({"grow": 1, "fill": Fill("luck")}, "filled by zero_out, split, pair; got 'luck'"),
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
    with pytest.raises(PlanError, match=r"cannot be widened: it would be taken over newborn units too \(layer_norm"):
        Plan.growing(axes, {"0.weight:0": 1})
    with pytest.raises(PlanError, match="is frozen: it is an output"):
        Plan.growing(axes, {"2.weight:0": 1})
    with pytest.raises(PlanError, match="no axis 'x'"):
        Plan.growing(axes, {"x": 1})


def test_a_plan_that_compensates_does_not_grow() -> None:
    _, axes = net()
    with pytest.raises(PlanError, match="make two"):
        Plan.growing(axes, {KEY: 1}, means={"4.weight": {0: 1.0}})


def test_what_newborn_units_hold() -> None:
    """Zero-out: drawn rows as wide as the old ones, mean statistics, zero readers; split: copies that share readers."""
    model, axes = net()
    old = copy.deepcopy(model)
    wide, _ = apply(copy.deepcopy(model), axes, Plan.growing(axes, {KEY: 60}))
    assert torch.equal(wide[0].weight[:6], old[0].weight)
    assert wide[0].weight[6:].std().item() == pytest.approx(old[0].weight.std().item(), rel=0.1)
    assert torch.allclose(wide[1].running_var[6:], old[1].running_var.mean().expand(60))
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


def _step(model: nn.Module, optimiser: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    optimiser.zero_grad()
    model(x).square().mean().backward()
    optimiser.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_follows(name: str) -> None:
    """Kept entries keep what is remembered of them; newborn ones start with no drift and a usual step size."""
    model, axes = mlp()
    decayed = [p for n, p in model.named_parameters() if "weight" in n]
    optimiser = OPTIMISERS[name](
        [{"params": decayed}, {"params": [p for n, p in model.named_parameters() if "bias" in n], "weight_decay": 0.0}]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=10)
    for seed in range(3):
        _step(model, optimiser, seed)
        schedule.step()
    before = {n: dict(optimiser.state[p]) for n, p in model.named_parameters()}
    rates = [group["lr"] for group in optimiser.param_groups]
    plan = Plan.keeping(axes, {"0.weight:0": (0, 2, 3, 5)})
    plan = Plan({**plan.changes, **Plan.growing(axes, {"2.weight:0": 3}).changes})
    model, axes = apply(model, axes, plan, optimizers=[optimiser])
    named = dict(model.named_parameters())
    held = [p for group in optimiser.param_groups for p in group["params"]]
    assert len(held) == len(named) and all(any(p is q for q in held) for p in named.values())
    assert [len(group["params"]) for group in optimiser.param_groups] == [3, 3]
    assert optimiser.param_groups[1]["weight_decay"] == 0.0
    assert {id(p) for p in optimiser.param_groups[0]["params"]} == {id(p) for n, p in named.items() if "weight" in n}
    assert [group["lr"] for group in optimiser.param_groups] == rates
    for what, old in before["2.weight"].items():
        now = optimiser.state[named["2.weight"]][what]
        if not isinstance(old, torch.Tensor) or old.dim() == 0:
            assert now == old
            continue
        kept = old[:, [0, 2, 3, 5]]
        assert now.shape == (8, 4) and torch.equal(now[:5], kept)
        first = what in ("momentum_buffer", "exp_avg")
        assert torch.allclose(now[5:], torch.zeros(3, 4) if first else kept.mean(0).expand(3, 4))
    for seed in range(3, 6):
        _step(model, optimiser, seed)
        schedule.step()


def test_a_cut_optimiser_goes_on_as_if_the_cut_network_had_been_trained() -> None:
    """Units that nothing reads and that nothing moves are cut: the steps after are those without the cut."""
    model, axes = mlp()
    with torch.no_grad():
        model[2].weight[:, 4:] = 0
        model[0].weight[4:] = 0
        model[0].bias[4:] = 0
    whole, cut = copy.deepcopy(model), copy.deepcopy(model)
    runs = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (whole, cut)]
    for seed in range(3):
        for net_, optimiser in zip((whole, cut), runs, strict=True):
            _step(net_, optimiser, seed)
    cut, _ = apply(cut, axes, Plan.keeping(axes, {"0.weight:0": range(4)}), optimizers=[runs[1]])
    for seed in range(3, 6):
        for net_, optimiser in zip((whole, cut), runs, strict=True):
            _step(net_, optimiser, seed)
    assert torch.allclose(whole[4].weight, cut[4].weight, atol=1e-6)
    assert torch.allclose(whole[0].weight[:4], cut[0].weight, atol=1e-6)


def test_a_memory_of_another_shape_is_refused_and_nothing_changes() -> None:
    model, axes = mlp()
    optimiser = torch.optim.Adafactor(model.parameters())
    _step(model, optimiser, 0)
    with laws.untouched(model), pytest.raises(PlanError, match=r"row_var.*make a new optimiser"):
        apply(model, axes, Plan.growing(axes, {"0.weight:0": 2}), optimizers=[optimiser])
    assert {id(p) for p in optimiser.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_a_memory_that_is_not_known_is_refused() -> None:
    model, axes = mlp()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    optimiser.state[model[0].weight]["secret"] = torch.zeros_like(model[0].weight)
    with pytest.raises(PlanError, match="'secret'"):
        apply(model, axes, Plan.growing(axes, {"0.weight:0": 2}), optimizers=[optimiser])


def test_units_of_an_axis_are_numbered_from_0_at_birth() -> None:
    assert Axis("a", 3, ()).born == 3 and Axis("a", 2, (), ids=(4, 9)).born == 10
