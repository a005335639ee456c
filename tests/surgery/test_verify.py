"""Many plans at once: what ``distances`` says of each is what ``verify`` says of it alone."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import laws
from regrow.core.plan import Change, Plan, PlanError
from regrow.surgery import verify
from regrow.surgery.compensate import PlannedTensors
from regrow.surgery.verify import RELATIVE_BOUND, measure_distances
from regrow.tracing import trace
from zoo import trace_zoo


@pytest.mark.parametrize("name", ["llama", "softmax_gate", "softmax_twice", "gpt2"])
def test_many_plans_are_compared_as_each_alone(name: str) -> None:
    model, axes = trace_zoo(name)
    generator = torch.Generator().manual_seed(2)
    plans = [laws.random_plan(axes, generator) for _ in range(3)]
    with laws.untouched(model):
        found = list(measure_distances(model, axes, plans))
    assert [plan for plan, _ in found] == plans
    for plan, distance in found:
        report = verify(model, axes, plan)
        assert distance == pytest.approx(report.max_abs_diff / (report.bound / RELATIVE_BOUND), abs=1e-12)


def test_a_widening_is_compared_with_the_network_as_it_is() -> None:
    model, axes = trace_zoo("llama")
    ((_, distance),) = measure_distances(model, axes, [laws.joint_growing_plan(axes, "zero_out")])
    assert distance <= RELATIVE_BOUND


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.factor = nn.Linear(4, 8), nn.Linear(8, 2), 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.factor * self.up(x).relu())


def test_a_network_is_compared_as_it_is_now_not_as_it_was_traced() -> None:
    model = _Scaled().eval()
    axes = trace(model, torch.ones(3, 4))
    plan = Plan.keeping(axes, {"up.weight:0": [0, 2, 5]})
    plan = replace(plan, means={"down.weight": dict.fromkeys((1, 3, 4, 6, 7), 0.25)})
    assert verify(model, axes, plan).ok
    model.factor = 3.0
    assert verify(model, axes, plan).ok


def test_another_function_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Surgery that keeps other units than planned runs, and is far from the masked network."""
    model, axes = trace_zoo("llama")
    key = next(axis.key for axis in axes.free() if "gate_proj" in axis.key)
    planned, done = Plan.keeping(axes, {key: range(5)}), Plan.keeping(axes, {key: range(5, 10)})
    module = sys.modules["regrow.surgery.verify"]
    monkeypatch.setattr(module, "PlannedTensors", lambda model, axes, plan: PlannedTensors(model, axes, done))
    ((_, distance),) = measure_distances(model, axes, [planned])
    assert distance > 1e-3


def test_a_plan_that_does_not_fit_ends_it_and_those_before_stand() -> None:
    model, axes = trace_zoo("llama")
    key = next(axis.key for axis in axes.free() if "gate_proj" in axis.key)
    good, bad = Plan.keeping(axes, {key: range(5)}), Plan({key: Change(axes[key].size + 1, (0,), axes[key].slots)})
    found = measure_distances(model, axes, [good, bad])
    assert next(found)[0] is good
    with pytest.raises(PlanError):
        next(found)


def test_random_numbers_after_it_are_those_of_the_seed() -> None:
    model, axes = trace_zoo("llama")
    plan = laws.random_plan(axes, torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    verify(model, axes, plan)
    assert torch.equal(torch.rand(3), expected)
