"""Branches on a batch size or length that the example does not show: the axes are frozen, or every cut is right."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow import Plan, apply, trace, verify
from regrow.core.axes import Example
from regrow.core.plan import PlanError
from regrow.tracing.trial import plan_small_cuts
from zoo import Wired, randomise

WIDTH = 12
KEY = "a.weight:0"


def width(h: Tensor) -> int:
    return h.shape[-1]


def in_batch(h: Tensor) -> Tensor:
    """Units become a part of the batch; an odd length is padded meanwhile."""
    rows = h.transpose(1, 2).reshape(-1, h.shape[1])
    rows = F.pad(rows, (0, 1)) if h.shape[1] % 2 else rows
    return rows.tanh()[:, : h.shape[1]].reshape(len(h), -1, h.shape[1]).transpose(1, 2)


DEPENDENT: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "flip above the width": lambda m, x, h: m.b(h.flip(-1) if x.shape[1] > width(h) else h),
    "factor above the width": lambda m, x, h: m.b(h * 2 if x.shape[1] > width(h) else h),
    "factor from the width on": lambda m, x, h: m.b(h * (2 if x.shape[1] >= width(h) else 1)),
    "least": lambda m, x, h: m.b(h) * min(x.shape[1], width(h)),
    "largest": lambda m, x, h: m.b(h) / max(x.shape[1], width(h)),
    "batch below the width": lambda m, x, h: m.b(h if len(x) < width(h) else h * 3),
    "flip by batch": lambda m, x, h: m.b(h if len(x) < width(h) else h.flip(-1)),
    "twice the length": lambda m, x, h: m.b(h if 2 * x.shape[1] > width(h) else h * 3),
    "batch and length": lambda m, x, h: m.b(h if len(x) + x.shape[1] > width(h) else h * 3),
    "tokens": lambda m, x, h: m.b(h if len(x) * x.shape[1] > width(h) else h * 3),
    "attribute": lambda m, x, h: m.b(h if x.shape[1] > m.a.out_features else h * 3),
    "entries": lambda m, x, h: m.b(h if x.numel() > m.a.weight.numel() else h * 3),
    "remainder": lambda m, x, h: m.b(h) + x.shape[1] % width(h),
    "quotient": lambda m, x, h: m.b(h) + x.shape[1] // width(h),
    "slice of the length": lambda m, x, h: m.b(h)[:, : width(h)],
    "reduction of the output": lambda m, x, h: m.b(h).mean(1) if x.shape[1] > width(h) else m.b(h).sum(1),
    "padding to the width": lambda m, x, h: F.pad(m.b(h), (0, 0, 0, max(0, width(h) - x.shape[1]))).sum(1),
    "difference": lambda m, x, h: m.b(h * max(1, x.shape[1] - width(h))),
}
INDEPENDENT: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "mean": lambda m, x, h: m.b(h.mean(1)),
    "divided by the length": lambda m, x, h: m.b(h) / x.shape[1],
    "a fixed length": lambda m, x, h: m.b(h * 2 if x.shape[1] > 20 else h),
    "a fixed batch": lambda m, x, h: m.b(h if len(x) < 5 else h * 3),
    "one token": lambda m, x, h: m.b(h if x.shape[1] > 1 else h * 3),
    "units in the batch": lambda m, x, h: m.b(in_batch(h)),
    "a fixed width": lambda m, x, h: m.b(h * (2 if width(h) > 10 else 1)),
}


def network(wire: Callable[[Any, Tensor, Tensor], Tensor]) -> Wired:
    net = Wired(lambda m, x: wire(m, x, m.a(x).relu()), a=nn.Linear(7, WIDTH), b=nn.Linear(WIDTH, 5))
    return randomise(net).double().eval()


@pytest.mark.parametrize("example", [(2, 3), (1, 1), (16, 20), (3, 14)])
@pytest.mark.parametrize("name", [*DEPENDENT, *INDEPENDENT])
def test_every_cut_is_right_at_any_size(name: str, example: tuple[int, int]) -> None:
    wire = {**DEPENDENT, **INDEPENDENT}[name]
    net = network(wire)
    axes = trace(net, torch.randn(*example, 7, dtype=torch.float64))
    assert axes[KEY].free or name in DEPENDENT, axes[KEY].reason
    if not axes[KEY].free:
        return
    for kept in (11, 6):
        cut, masked = network(wire), network(wire)
        for other in (cut, masked):
            other.load_state_dict(net.state_dict())
        try:
            apply(cut, axes, Plan.keeping(axes, {KEY: range(kept)}))
        except PlanError:
            continue
        with torch.no_grad():
            masked.b.weight[:, kept:] = 0
            for batch in (1, 2, 5, 7, 11, 12, 13, 30):
                for length in (1, 3, 6, 10, 11, 12, 13, 14, 25, 40):
                    x = torch.randn(batch, length, 7, dtype=torch.float64)
                    ours, theirs = masked(x), cut(x)
                    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-9, (batch, length)


def test_verify_compares_on_another_example() -> None:
    net = network(INDEPENDENT["mean"])
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    axes = trace(net, x)
    plan = Plan.keeping(axes, {KEY: range(5)})
    one = verify(net, axes, plan)
    other = verify(net, axes, plan, Example((torch.randn(4, 9, 7).double(),)))
    assert one.ok and other.ok and (one.positions, other.positions) == (2, 4)


def test_a_function_that_has_cached_the_example_leaves_axes_free() -> None:
    @lru_cache
    def factors(batch: int) -> Tensor:
        return torch.linspace(0.5, 1.5, batch, dtype=torch.float64)[:, None, None]

    net = network(lambda m, x, h: m.b(h) * factors(len(x)))
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    net(x)
    assert trace(net, x)[KEY].free


def test_an_example_of_one_number_has_no_other_size() -> None:
    net = network(lambda m, x, h: m.b(h))
    scaled = Wired(lambda m, x: m.net(x * torch.ones(2, 3, 7, dtype=torch.float64)), net=net)
    assert trace(scaled, torch.tensor(2.0, dtype=torch.float64))["net." + KEY].free


def test_a_batch_is_tried_that_is_larger_than_the_widest_axis() -> None:
    """Not only than the narrowest one."""
    net = Wired(
        lambda m, x: m.d(m.c(m.b(flipped(m.a(x).relu(), len(x)))).relu()),
        a=nn.Linear(7, WIDTH),
        b=nn.Linear(WIDTH, 5),
        c=nn.Linear(5, 4),
        d=nn.Linear(4, 3),
    )
    axes = trace(randomise(net).double().eval(), torch.randn(2, 3, 7, dtype=torch.float64))
    assert not axes[KEY].free and axes["c.weight:0"].free


def flipped(h: Tensor, batch: int) -> Tensor:
    """Units in another order where the batch is as large as their number."""
    return h if batch < width(h) else h.flip(-1)


def test_trial_cuts_take_different_numbers_of_units() -> None:
    """Two axes of one size that a network mixes up would still fit each other if they lost as many."""
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    axes = trace(net, torch.randn(2, 3))
    assert sorted(plan_small_cuts(axes, [*axes.free()]).values()) == [3, 3, 6, 7]
