"""A recording that is kept from cut to cut is never that of another network: changes by hand between two cuts show."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import laws
from regrow.core.axes import AxisGraph, Example
from regrow.core.plan import Plan, PlanError
from regrow.surgery import apply
from regrow.tracing import trace
from zoo import Wired, randomise

KEY = "a.weight:0"


def plain(m: Any, x: Tensor) -> Tensor:
    return m.b(m.act(m.norm(m.a(x))) * 1.0)


def sized(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.norm(m.a(x)))
    return m.b(h * (2.0 if h.shape[-1] == 12 else 1.0))


def traced(double: bool) -> tuple[nn.Module, AxisGraph, Plan]:
    """A network, in float64 where asked, which has been cut once already: its recording is kept."""
    parts = {"a": nn.Linear(5, 12), "norm": nn.BatchNorm1d(12), "act": nn.ReLU(), "b": nn.Linear(12, 3)}
    model = randomise(Wired(plain, **parts))
    axes = trace(model, torch.randn(4, 5))
    if double:
        model, axes = model.double(), replace(axes, example=Example((axes.example.args[0].double(),)))
    plan = Plan.keeping(axes, {KEY: range(6)})
    apply(deepcopy(model), axes, plan)
    return model, axes, plan


def other_epsilon(model: Any) -> None:
    model.norm.eps = 0.5


def other_module(model: Any) -> None:
    model.act = nn.Tanh()


def other_code(model: Any) -> None:
    model.wire = sized


def hook_by_size(model: Any) -> None:
    model.act.register_forward_hook(lambda module, given, out: out * (2.0 if out.shape[-1] == 12 else 1.0))


@pytest.mark.parametrize("double", [False, True], ids=["as_traced", "cast"])
def test_other_constants_are_those_of_the_present_network(double: bool) -> None:
    """A constant that was changed by hand is carried out, and the cut computes what the changed network computes."""
    model, axes, plan = traced(double)
    other_epsilon(model)
    laws.zeroed_equals_shrunk(model, axes, plan, "producers")


@pytest.mark.parametrize("double", [False, True], ids=["as_traced", "cast"])
@pytest.mark.parametrize("change", [other_module, other_code, hook_by_size])
def test_other_operations_are_refused(change: Callable[[Any], None], double: bool) -> None:
    """Other modules, code that now depends on the size, and new hooks are seen, though the shapes are as they were."""
    model, axes, plan = traced(double)
    change(model)
    with laws.untouched(model), pytest.raises(PlanError):
        apply(model, axes, plan)
