"""What the network's own forward pass may change, and what a comparison with it must see or allow."""

import copy
import sys
from itertools import count

import pytest
import torch
from torch import Tensor, nn

import laws
from regrow import Plan, apply, trace, verify
from regrow.core.axes import AxisGraph, Example
from regrow.core.axes.operations import Tracer
from regrow.core.plan import PlanError
from regrow.tracing.capture import TraceError, capture
from regrow.tracing.own_run import DeviationError, compare_with_recording
from zoo import Wired, randomise

X = torch.randn(3, 4)
CALLS = count()


def mlp(wire: object = None) -> Wired:
    return randomise(Wired(wire or (lambda m, x: m.two(m.one(x).relu())), one=nn.Linear(4, 8), two=nn.Linear(8, 3)))


def test_renormalised_embeddings_are_restored_bit_for_bit() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 6, max_norm=0.5)
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.down(self.up(self.table(ids)).relu())

    net, ids = Tokens().eval(), torch.tensor([[1, 2, 3]])
    before = net.table.weight.detach().clone()
    axes = trace(net, ids)
    assert torch.equal(net.table.weight, before)
    plan = Plan.keeping(axes, {"up.weight:0": range(3)})
    assert verify(net, axes, plan).ok
    apply(net, axes, plan)
    assert torch.equal(net.table.weight, before)


def test_a_counter_is_where_it_was_and_does_not_differ() -> None:
    class Counts(Wired):
        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.two(self.one(x).relu()) * self.seen

    net = Counts(None, one=nn.Linear(4, 8), two=nn.Linear(8, 3)).eval()
    net.register_buffer("seen", torch.zeros(1))
    axes = trace(net, X)
    apply(net, axes, Plan.keeping(axes, {"one.weight:0": range(3)}))
    assert net.seen.item() == 0


def test_random_operations_get_the_same_numbers() -> None:
    net = mlp(lambda m, x: m.two(m.one(x).relu()) + torch.rand(3, 3))
    axes = trace(net, X)
    assert axes.tracer is Tracer.RECORD and not axes.unproven
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    trace(net, X)
    assert torch.equal(torch.rand(1), expected)


def test_a_network_that_changes_from_run_to_run_is_unproven() -> None:
    net = mlp(lambda m, x: m.two(m.one(x).relu()) + next(CALLS))
    axes = trace(net, X)
    assert "other outputs" in axes.unproven


def test_a_network_without_numbers_is_unproven() -> None:
    net = mlp().to("meta")
    axes = trace(net, X.to("meta"))
    assert "no numbers" in axes.unproven
    plan = Plan.keeping(axes, {"one.weight:0": range(3)})
    assert "no numbers" in apply(net, axes, plan)[1].unproven
    assert not trace(mlp(), X).unproven


def test_a_small_difference_behind_a_large_output_is_seen() -> None:
    """A branch scaled by 1e-6, as in networks with layer scale, changes but the last digits of float32 outputs."""
    net = mlp(lambda m, x: m.two(m.one(x)) * 1e-6 * (2 if type(x) is Tensor else 1) + x[:, :3])
    with pytest.raises(TraceError, match="does not run as it is recorded"):
        trace(net, X)


def test_rounding_of_other_kernels_is_none() -> None:
    """The recording of a network in channels-last format, say, runs other kernels: no more than rounding differs."""
    net = mlp()
    recorded = capture(net, Example((X,)))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.two.weight.mul_(1 + 1e-3)
    assert compare_with_recording(net, recorded, Example((X,))) == ""
    true = nn.functional.linear
    try:
        nn.functional.linear = lambda x, w, b=None: (x.double() @ w.double().T + b.double()).to(x.dtype)
        assert compare_with_recording(net, recorded, Example((X,))) == ""
        nn.functional.linear = lambda x, w, b=None: true(x, w, b) * (1 + 1e-5)
        with pytest.raises(DeviationError, match="outputs differ by"):
            compare_with_recording(net, recorded, Example((X,)))
    finally:
        nn.functional.linear = true


def test_a_refused_change_leaves_network_and_optimizer_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp()
    axes = trace(net, X)
    optimizer = torch.optim.Adam(net.parameters())
    net(X).sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    group = [id(p) for p in optimizer.param_groups[0]["params"]]
    monkeypatch.setattr(type(net.two), "forward", lambda m, x: nn.functional.linear(x, m.weight, m.bias) * x.shape[-1])
    with laws.untouched(net), pytest.raises(PlanError):
        apply(net, axes, Plan.keeping(axes, {"one.weight:0": range(3)}), optimizers=[optimizer])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == group == [id(p) for p in net.parameters()]
    left = optimizer.state_dict()["state"]
    assert all(torch.equal(left[i]["exp_avg"], state["state"][i]["exp_avg"]) for i in left)


def test_a_change_that_fails_its_last_comparison_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: nn.Module, axes: AxisGraph) -> AxisGraph:
        assert model.one.weight.shape == (3, 4)  # it is cut by now
        raise PlanError("the network does not run as recorded")

    net = mlp()
    axes = trace(net, X)
    monkeypatch.setattr(sys.modules["regrow.surgery.apply"], "check_own_run", refuse)
    with laws.untouched(net), pytest.raises(PlanError, match="as recorded"):
        apply(net, axes, Plan.keeping(axes, {"one.weight:0": range(3)}))
