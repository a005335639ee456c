"""New units fitted to data: the function stays, they are alive, and the loss falls faster."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laws
from regrow import Fill, Plan, apply, fit_new_units
from regrow.core.axes import AxisGraph
from regrow.core.plan import PlanError
from regrow.core.sources import Batch
from regrow.surgery.new_units import new_units, split_entries
from regrow.tracing import trace
from zoo import Wired

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


class Gated(nn.Module):
    """A gated MLP on a residual stream under a root-mean-square norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(6, 9), nn.RMSNorm(9, eps=1e-6), nn.Linear(9, 4)
        self.gate, self.up, self.down = nn.Linear(9, 7), nn.Linear(9, 7), nn.Linear(7, 9)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.out(self.norm(h + self.down(F.silu(self.gate(h)) * self.up(h))))


def convolutional() -> nn.Module:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    model.train()(torch.randn(64, 8, 8))
    return model


def attention() -> nn.Module:
    return Wired(
        lambda m, x: m.out(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)).transpose(0, 1)[0]),
        q=nn.Linear(6, 5),
        k=nn.Linear(6, 5),
        v=nn.Linear(6, 8),
        out=nn.Linear(8, 4),
    )


NETS: dict[str, tuple[Any, str, Tensor]] = {
    "relu": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), "0.weight:0", X),
    "conv-bn-relu-pool-conv": (convolutional, "1.weight:0", torch.randn(40, 8, 8)),
    "gated": (Gated, "gate.weight:0", X),
    "attention": (attention, "v.weight:0", X.view(8, 5, 6)),
}


def grown(name: str, units: int = 3, fill: Fill | None = None) -> tuple[nn.Module, AxisGraph, Plan, list[Batch]]:
    build, key, x = NETS[name]
    torch.manual_seed(0)
    model = build().eval()
    axes = trace(model, x)
    plan = Plan.growing(axes, {key: units}, fill)
    model, left = apply(model, axes, plan)
    labels = torch.arange(len(model(x))) % 4
    return (
        model,
        left,
        plan,
        [Batch((part,), labels=own) for part, own in zip(x.chunk(2), labels.chunk(2), strict=False)],
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    answer = model(*batch.args)
    return F.cross_entropy(answer, batch.labels[: len(answer)])


@pytest.mark.parametrize("name", NETS)
def test_fitting_keeps_the_function_bit_for_bit(name: str) -> None:
    model, axes, plan, batches = grown(name)
    nn.Module.train(model)
    dropped = {module: module.training for module in model.modules()}
    said = [copy.deepcopy(model).train(train)(NETS[name][2]) for train in (False, True)]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit_new_units(model, axes, plan, batches)
    for train, answer in zip((False, True), said, strict=True):
        assert torch.equal(copy.deepcopy(model).train(train)(NETS[name][2]), answer)
    assert {module: module.training for module in model.modules()} == dropped
    key = NETS[name][1]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    made = {slot.name for slot in axes[key].slots if slot.role == "produces" and slot.name.endswith("weight")}
    assert made <= changed <= made | {name.replace("weight", "bias") for name in made}
    old = axes[key].size - 3
    assert all(torch.equal(model.get_parameter(n)[:old], before[n][:old]) for n in changed), "old units stay"
    assert all(p.grad is None for p in model.parameters())


def test_newborn_units_get_the_spread_of_the_old_and_the_statistics_of_the_data() -> None:
    model, axes, plan, batches = grown("conv-bn-relu-pool-conv")
    x = torch.cat([batch.args[0] for batch in batches])
    fit_new_units(model, axes, plan, batches)
    out = model[1](model[0](x)).detach().double()
    spread = out.std((0, 2, 3))
    assert torch.allclose(spread[5:], spread[:5].median().expand(3), rtol=1e-5)
    assert torch.allclose(model[2].running_mean[5:].double(), out.mean((0, 2, 3))[5:], atol=1e-6)
    assert torch.allclose(model[2].running_var[5:].double(), out.var((0, 2, 3))[5:], rtol=1e-5)


def test_a_newborn_unit_that_the_data_leave_silent_is_negated_and_no_other() -> None:
    model, axes, plan, batches = grown("relu", 2)
    (new,) = new_units(model, axes, plan).values()
    with torch.no_grad():
        model[0].bias[new] = torch.tensor([-100.0, 100.0])
    fit_new_units(model, axes, plan, batches)
    assert bool((model[0].bias[new] > 0).all())


@pytest.mark.parametrize("name", NETS)
def test_no_newborn_unit_is_dead(name: str) -> None:
    model, axes, plan, batches = grown(name)
    fit_new_units(model, axes, plan, batches)
    loud, mute = split_entries(model, axes, new_units(model, axes, plan))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved = []
    for _ in range(2):
        optimizer.zero_grad()
        sum(loss(model, batch) for batch in batches).backward()
        moved.append([one.of(model.get_parameter(one.name).grad) for one in (*mute, *loud)])
        optimizer.step()
    for one, first, second in zip((*mute, *loud), *moved, strict=True):
        both = (first.abs() + second.abs()).movedim(one.dim, 0).flatten(1).sum(1)
        assert bool((both > 0).all()), f"{one.name}: a new unit has no gradient in two steps"


def test_on_a_residual_stream_there_is_no_spread_to_fit() -> None:
    """Nothing writes new units there."""
    torch.manual_seed(0)
    model = Gated()
    axes = trace(model, X)
    key = next(axis.key for axis in axes.free() if axis.size == 9)
    plan = Plan.growing(axes, {key: 2})
    model, left = apply(model, axes, plan)
    batches = [Batch((X,), labels=torch.arange(len(X)) % 4)]
    with laws.untouched(model), pytest.raises(PlanError, match="nothing writes its new units yet"):
        fit_new_units(model, left, plan, batches)


def test_what_cannot_be_fitted_is_refused_by_name_and_nothing_changes() -> None:
    model, axes, plan, batches = grown("relu", 2, Fill("split"))
    with laws.untouched(model), pytest.raises(PlanError, match="added by 'split' are read already"):
        fit_new_units(model, axes, plan, batches)
    model, axes, plan, batches = grown("relu")
    with pytest.raises(PlanError, match="adds no units"):
        fit_new_units(model, axes, Plan.keeping(axes, {"0.weight:0": range(3)}), batches)
    _, later = apply(copy.deepcopy(model), axes, Plan.growing(axes, {"0.weight:0": 1}))
    with pytest.raises(PlanError, match="not as this plan left it"):
        fit_new_units(model, later, plan, batches)
    with torch.no_grad():
        model[2].weight += 0.1
    with laws.untouched(model), pytest.raises(PlanError, match=r"2\.weight already uses its new units"):
        fit_new_units(model, axes, plan, batches)


def test_an_axis_that_no_layer_makes_is_refused() -> None:
    model = Wired(lambda m, x: m.out(m.table(x)), table=nn.Embedding(9, 6), out=nn.Linear(6, 3))
    ids = torch.arange(9)
    axes = trace(model, ids)
    (axis,) = axes.free()
    plan = Plan.growing(axes, {axis.key: 2})
    model, left = apply(model, axes, plan)
    with laws.untouched(model), pytest.raises(PlanError, match="no linear layer or convolution makes its units"):
        fit_new_units(model, left, plan, [Batch((ids,))])


def test_on_real_digits_the_loss_falls_at_least_as_fast() -> None:
    """Five draws of a network on handwritten digits, grown in the middle of training, 60 steps more."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)
    after: dict[str, list[float]] = {"zero_out": [], "fitted": []}
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 10))
        axes = trace(_trained(model, x, y, seed, 100), x[:9])
        plan = Plan.growing(axes, {"2.weight:0": 12}, Fill(seed=seed))
        model, left = apply(model, axes, plan)
        batches = [Batch((x[i : i + 64],), labels=y[i : i + 64]) for i in range(0, 256, 64)]
        for name in after:
            net = copy.deepcopy(model)
            if name == "fitted":
                fit_new_units(net, left, plan, batches)
            after[name].append(float(F.cross_entropy(_trained(net, x, y, 50 + seed, 60)(x), y).detach()))
    mean = {name: sum(values) / len(values) for name, values in after.items()}
    assert mean["fitted"] < mean["zero_out"], mean


def _trained(model: nn.Module, x: Tensor, y: Tensor, seed: int, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model
