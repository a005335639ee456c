"""What a network does in training alone, behind ``if self.training``."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.core.axes import Mark
from regrow.core.plan import Plan, PlanError
from regrow.surgery import apply
from regrow.tracing import trace
from zoo import Wired, randomise

KEY = "up.weight:0"
Act = Callable[[Any, Tensor], Tensor]

BY_SIZE: Mapping[str, tuple[Act, str]] = {
    "factor": (lambda m, h: h * h.shape[-1], "in training, a number in mul in the model depends on the size"),
    "centred": (lambda m, h: h - h.mean(-1, keepdim=True), "mean in the model"),
}
MARKED: Mapping[str, tuple[Act, Mark]] = {
    "layer norm": (lambda m, h: F.layer_norm(h, (h.shape[-1],)), Mark.RESTATED),
    "softmax": (lambda m, h: h.softmax(-1), Mark.COMPETED),
    "normalised": (lambda m, h: F.normalize(h, dim=-1), Mark.NEUTRAL),
}


def net(act: Act) -> nn.Module:
    """Two linear layers, 4 → 8 → 3, with something in between that only training does."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.up(x).relu()
        return m.down(act(m, h) if m.training else h)

    model = Wired(run, up=nn.Linear(4, 8), down=nn.Linear(8, 3))
    model.register_buffer("scales", torch.rand(8))
    return randomise(model)


@pytest.mark.parametrize("name", BY_SIZE)
def test_an_axis_whose_size_training_alone_computes_with_is_frozen(name: str) -> None:
    act, reason = BY_SIZE[name]
    axis = trace(net(act), torch.randn(6, 4))[KEY]
    assert not axis.free and reason in axis.reason


@pytest.mark.parametrize("name", MARKED)
def test_an_axis_that_training_alone_reduces_is_marked_and_not_widened(name: str) -> None:
    act, mark = MARKED[name]
    model = net(act)
    axes = trace(model, torch.randn(6, 4))
    assert axes[KEY].free and axes[KEY].mark == mark
    with pytest.raises(PlanError, match="in training"):
        apply(model, axes, Plan.growing(axes, {KEY: 4}))


def test_a_buffer_that_training_alone_reads_is_cut_and_widened() -> None:
    model, x = net(lambda m, h: h * m.scales), torch.randn(6, 4)
    axes = trace(model, x)
    before = model.train()(x)
    model, axes = apply(model, axes, Plan.growing(axes, {KEY: 4}))
    torch.testing.assert_close(model.train()(x), before)
    model, _ = apply(model, axes, Plan.keeping(axes, {KEY: range(5)}))
    assert model.scales.shape == (5,) and model(x).shape == (6, 3)


@pytest.mark.parametrize("act", [lambda m, h: F.dropout(h, 0.5, m.training), lambda m, h: h])
def test_dropout_alone_is_not_followed(act: Act) -> None:
    axes = trace(net(act), torch.randn(6, 4))
    assert axes[KEY].free and not axes.trained
