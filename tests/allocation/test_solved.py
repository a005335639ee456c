"""Shares that always meet the budget, and their gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow.allocation.ranked import removal_ratios, soft_step


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-6, 6), min_size=1, max_size=9), st.floats(0.01, 0.94), st.integers(0, 99))
def test_the_budget_is_met_and_no_module_is_emptied(values: list[float], share: float, seed: int) -> None:
    costs = torch.rand(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 9 + 1
    removed = share * float(costs.sum())
    p = removal_ratios(torch.tensor(values, dtype=torch.float64), costs, removed)
    assert float((p * costs).sum()) == pytest.approx(removed, rel=1e-9)
    assert float(p.min()) >= 0 and float(p.max()) <= 0.95


def test_equal_logits_give_equal_shares_and_a_shift_changes_nothing() -> None:
    costs = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    p = removal_ratios(torch.zeros(3, dtype=torch.float64), costs, 2.0)
    assert torch.allclose(p, torch.full((3,), 0.25, dtype=torch.float64))
    some = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    assert torch.allclose(removal_ratios(some, costs, 2.0), removal_ratios(some + 7, costs, 2.0), atol=1e-12)


def test_the_gradient_is_that_of_shares_under_the_budget() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([1.0, 2.0, 5.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: removal_ratios(a, costs, 3.0), logits)


def test_what_cannot_be_removed_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be removed"):
        removal_ratios(torch.zeros(2), torch.ones(2), 1.95)


def test_a_step_is_hard_forwards_and_soft_backwards() -> None:
    places = torch.tensor([0.125, 0.375, 0.625, 0.875])
    share = torch.full((4,), 0.5, requires_grad=True)
    mask = soft_step(places, share, 0.05)
    assert mask.tolist() == [0, 0, 1, 1]
    mask.sum().backward()
    assert share.grad is not None and bool((share.grad < 0).all())
    assert float(share.grad[1]) < float(share.grad[0]), "felt most at the edge"
