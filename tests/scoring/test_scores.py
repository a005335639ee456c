"""Metrics against their formulas, computed the long way."""

import pytest
import torch
from torch import nn

from hand import conv, graph, lm, mlp, slot, stored, texts, vectors
from regrow.core.axes import Axis, AxisGraph, Role
from regrow.core.scores import Need, Scores, Statistics
from regrow.core.sources import Batch, Source
from regrow.scoring.collect import collect
from regrow.scoring.metrics import magnitude, random, taylor, wanda_sp, wifv
from regrow.scoring.spaces import z_scores
from regrow.scoring.weights import weights_of

KV, FF = "decoder.blocks.1.q.weight:0", "decoder.blocks.1.gate.weight:0"


def measured(model: nn.Module, axes: AxisGraph, source: Source, *needs: Need) -> Statistics:
    (seen,) = collect(model, axes, [source], set(needs) or {Need.ACTIVATIONS})[source.name]
    return seen


def test_wifv_and_wanda_equal_a_direct_computation() -> None:
    model, axes = lm()
    source = texts("a")
    seen = measured(model, axes, source)
    x = stored(model, model.decoder.blocks[1].o, source)
    w = model.decoder.blocks[1].o.weight.detach().double()
    flat = x.flatten(0, 1)
    weights = weights_of(model)
    close = {"rtol": 1e-4, "atol": 1e-9}
    token = flat.var(0, unbiased=False) * w.square().sum(0)
    got = wifv(weights, axes, seen)
    torch.testing.assert_close(got[KV], token.view(3, 8).sum(1), **close)
    assert (got.metric, got.sources, got.tokens) == ("wifv/token", ("a",), 84)
    wanda = flat.square().mean(0).sqrt() * w.abs().mean(0)
    torch.testing.assert_close(wanda_sp(weights, axes, seen)[KV], wanda.view(3, 8).sum(1), **close)
    pooled = wifv(weights, axes, seen, pool="standardised")
    z = (token - token.mean()) / token.std()
    torch.testing.assert_close(pooled[KV], z.view(3, 8).mean(1), rtol=1e-3, atol=1e-5)


def test_taylor_sums_over_all_tensors_of_the_unit() -> None:
    model, axes = lm()
    seen = measured(model, axes, texts("a"), Need.GRADIENTS)
    block, n = model.decoder.blocks[1], "decoder.blocks.1"
    element = 0.0
    for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
        product = (
            block.get_submodule(name).weight.detach().double() * seen.gradients[f"{n}.{name}.weight"] / seen.tokens
        )
        element = element + product.abs().sum(1 - dim)
    weights = weights_of(model)
    torch.testing.assert_close(taylor(weights, axes, seen)[FF], element)
    assert taylor(weights, axes, seen)[KV].shape == (3,)


def test_without_statistics_each_metric_is_its_weight_factor() -> None:
    model, axes = lm()
    weights = weights_of(model)
    o = model.decoder.blocks[1].o.weight.detach().double()
    torch.testing.assert_close(wifv(weights, axes, None)[KV], o.square().sum(0).view(3, 8).sum(1))
    torch.testing.assert_close(wanda_sp(weights, axes, None)[KV], o.abs().mean(0).view(3, 8).sum(1))
    torch.testing.assert_close(magnitude(weights, axes)[KV], o.norm(dim=0).view(3, 8).sum(1))
    owned = sum(weights[f"decoder.blocks.1.{m}.weight"].double().view(3, -1).square().sum(1) for m in "qkv")
    torch.testing.assert_close(taylor(weights, axes, None)[KV], owned + o.square().sum(0).view(3, 8).sum(1))


def test_permuting_units_permutes_scores() -> None:
    model, axes = mlp(width=6)
    model = model.double()
    seen = measured(model, axes, Source("v", [Batch((b.args[0].double(),), labels=b.labels) for b in vectors()]), *Need)
    before = [metric(weights_of(model), axes, seen)["0.weight:0"] for metric in (wifv, wanda_sp, taylor, magnitude)]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[order])
        model[0].bias.copy_(model[0].bias[order])
        model[2].weight.copy_(model[2].weight[:, order])
    seen = measured(model, axes, Source("v", [Batch((b.args[0].double(),), labels=b.labels) for b in vectors()]), *Need)
    for metric, was in zip((wifv, wanda_sp, taylor, magnitude), before, strict=True):
        torch.testing.assert_close(
            metric(weights_of(model), axes, seen)["0.weight:0"], was[order], rtol=1e-6, atol=1e-12
        )


def test_a_grouped_convolution_scores_each_groups_channels() -> None:
    model, axes = conv(groups=2)
    torch.manual_seed(3)
    source = Source("p", [Batch((torch.randn(2, 3, 5, 5),))])
    seen = measured(model, axes, source)
    x = stored(model.eval(), model[3], source).transpose(0, 1).flatten(1)
    norms = model[3].weight.detach().double().view(2, 2, 3, 9).square().sum((1, 3)).flatten()
    expected = (x.var(1, unbiased=False) * norms).view(2, 3).sum(0)
    torch.testing.assert_close(wifv(weights_of(model), axes, seen)["0.weight:0"], expected, rtol=1e-4, atol=1e-9)


def test_several_readers_add_up_and_tied_names_count_once() -> None:
    class Net(nn.Module):
        """One hidden vector read by two weights, one of which has two names."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2), nn.Linear(6, 2)
            self.d.weight = self.c.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            return self.b(h) + self.c(h) + self.d(h)

    model = Net()
    ends = [slot("a.weight", 0, Role.PRODUCES), slot("a.bias", 0, Role.PRODUCES)]
    ends += [slot(f"{m}.weight", 1, Role.CONSUMES) for m in "bcd"]
    axes = graph(model, [Axis("a.weight:0", 6, tuple(ends))], {})
    seen = measured(model, axes, vectors())
    assert set(seen.moments) == {"b.weight", "c.weight"}
    assert seen.moments["c.weight"].count == 2 * seen.moments["b.weight"].count == 20
    var = stored(model, model.a, vectors()) @ model.a.weight.detach().double().T + model.a.bias.detach().double()
    norms = sum(m.weight.detach().double().square().sum(0) for m in (model.b, model.c))
    got = wifv(weights_of(model), axes, seen)["a.weight:0"]
    torch.testing.assert_close(got, var.var(0, unbiased=False) * norms, rtol=1e-4, atol=1e-9)


def test_random_depends_on_the_axis_and_not_on_its_place() -> None:
    _, axes = lm()
    one, two = random(axes, seed=1), random(axes, units=axes.units()[::-1], seed=1)
    assert all(torch.equal(one[key], two[key]) for key in one.values)
    assert not torch.equal(one["decoder.blocks.0.gate.weight:0"], one[FF])
    assert not torch.equal(one[FF], random(axes, seed=2)[FF])


def test_an_axis_no_weight_reads_is_left_out() -> None:
    model, axes = mlp()
    axes = graph(model, [*axes, Axis("lonely", 4, (slot("0.weight", 1, Role.PRODUCES),))], {})
    assert set(random(axes).values) == set(magnitude(weights_of(model), axes).values) == {"0.weight:0", "2.weight:0"}


def test_z_scores_have_mean_0_and_deviation_1() -> None:
    scores = Scores(
        {"a": torch.tensor([4.0, 1.0, 9.0]).double(), "b": torch.tensor([2.0, 2.0]).double()}, "m", ("x",), 5
    )
    z = z_scores(scores)
    assert float(z["a"].mean()) == pytest.approx(0) and float(z["a"].std()) == pytest.approx(1)
    assert z["b"].tolist() == [0, 0] and z.metric == "m/zscore"


def test_errors_name_the_culprit() -> None:
    model, axes = mlp()
    with pytest.raises(ValueError, match=r"never reached the weight '2.weight'"):
        wifv(weights_of(model), axes, Statistics("a"))
    model[4].weight.data[0, 2] = float("inf")
    with pytest.raises(ValueError, match=r"'2.weight:0': 1 of 5 scores are not finite"):
        magnitude(weights_of(model), axes)
