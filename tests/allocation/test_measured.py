"""Measured allocation: curves, their optimum under a budget, and exchanges judged on the whole network."""

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hand import lm
from regrow.allocation import Cost, module_costs, rank
from regrow.allocation.measured import Curves, exchange, fit_curves, propose_exchange
from regrow.axes import AxisGraph
from regrow.budget import Budget

BUDGET = Budget(0.7)


def network() -> tuple[AxisGraph, dict[str, Tensor], Tensor]:
    """The axes of a language model, the place of each unit, and the cost of each axis."""
    _, axes = lm(kv=8, rep=1, size=4, ff=64, blocks=4)
    places = {a.key: (torch.arange(a.size) + 0.5).double() / a.size for a in axes.units()}
    one = {key: torch.full((len(place),), i) for i, (key, place) in enumerate(places.items())}
    return axes, places, module_costs(axes, one, len(places), BUDGET)[0]


def ratios(axes: AxisGraph, places: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> Tensor:
    kept = rank(axes, scores, BUDGET)
    assert Cost(axes)({key: len(one) for key, one in kept.items()}) <= BUDGET.keep * Cost(axes).total
    return torch.tensor([1 - len(kept[key]) / len(place) for key, place in places.items()], dtype=torch.float64)


def some_curves(n: int) -> Curves:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(n, generator=generator, dtype=torch.float64)  # noqa: E731
    return Curves((6 * draw() - 3).exp(), 2 + 2 * draw())


def test_curves_are_those_that_were_measured() -> None:
    curves, at = some_curves(8), [[0.2, 0.4]] * 8
    measured = [[float(s * p**q) for p in row] for row, s, q in zip(at, curves.scale, curves.power, strict=True)]
    fitted = fit_curves(at, measured)
    torch.testing.assert_close(fitted.scale, curves.scale)
    torch.testing.assert_close(fitted.power, curves.power)
    noisy = fit_curves([[0.2, 0.4], [0.2, 0.4], [0.3]], [[0.1, 0.05], [-1e-3, 0.0], [0.09]])
    assert bool((noisy.scale > 0).all()) and bool((noisy.power >= 2).all())
    assert float(noisy.scale[2]) == pytest.approx(1.0)


def test_a_sum_of_curves_is_solved_at_once() -> None:
    """No exchange of units of about equal cost between two axes is an improvement."""
    axes, places, costs = network()
    curves = some_curves(len(costs))
    now = ratios(axes, places, curves.scores(places, costs))
    sizes = torch.tensor([len(place) for place in places.values()], dtype=torch.float64)
    loss = lambda p: float(curves.rise(torch.zeros_like(p), p).sum())  # noqa: E731
    unit = costs / sizes
    for i in range(len(sizes)):
        for j in range(len(sizes)):
            other = now.clone()
            other[i] -= 1 / sizes[i]
            other[j] += (unit[i] / unit[j]).ceil() / sizes[j]
            if i != j and other[i] >= 0 and other[j] < 1:
                assert loss(other) >= loss(now)
    even = torch.full_like(now, float((now * costs).sum() / costs.sum()))
    assert loss(now) < 0.5 * loss(even)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_exchanges_find_what_axes_alone_do_not_show(noise: float) -> None:
    """Cuts in the first and last block multiply the divergence of all others, which no axis alone shows."""
    axes, places, costs = network()
    n = len(costs)
    alone = Curves(torch.ones(n, dtype=torch.float64), torch.full((n,), 2.0, dtype=torch.float64))
    outer = torch.tensor([i in (0, 1, n - 2, n - 1) for i in range(n)])
    generator = torch.Generator().manual_seed(1)

    def loss(p: Tensor) -> Tensor:
        each = p**2
        return each.sum() * (1 + 20 * each[outer].sum())

    def order(offset: Tensor) -> Tensor:
        return ratios(axes, places, alone.scaled(offset).scores(places, costs))

    def propose(offset: Tensor) -> Tensor:
        now, curves = order(offset), alone.scaled(offset)
        steps = [torch.eye(n, dtype=torch.float64)[i] * 0.2 for i in range(n)]
        rises = torch.stack([loss(now + step) - loss(now) for step in steps])[:, None]
        rises = rises + noise * torch.randn(n, 4, generator=generator, dtype=torch.float64)
        return propose_exchange(curves.rise(now, now + 0.2), rises)

    shifts = torch.tensor([0.0, 0.01, -0.01, 0.02])
    start = torch.zeros(n, dtype=torch.float64)
    end, trials = exchange(
        start, propose, lambda offset, many: loss(order(offset)) + shifts[:many], rounds=6, windows=[2, 4]
    )
    before, after = loss(order(start)), loss(order(end))
    assert after < 0.6 * before
    assert order(end)[outer].mean() < 0.5 * order(start)[outer].mean()
    accepted = [trial for trial in trials if trial.accepted]
    assert accepted and all(trial.after < trial.before and trial.windows == 4 for trial in accepted)
    assert all(one.before == pytest.approx(other.after) for other, one in pairwise(accepted))


def test_noise_proposes_no_exchange() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.full((40,), 0.05, dtype=torch.float64)
    noise = 0.05 * torch.randn(40, 4, generator=generator, dtype=torch.float64)
    exact = predicted * torch.linspace(0.5, 2.0, 40, dtype=torch.float64)
    assert propose_exchange(predicted, predicted[:, None] + noise).abs().mean() < 0.15
    proposed = propose_exchange(predicted, exact[:, None].expand(-1, 4))
    torch.testing.assert_close(proposed, (exact / exact.mean()).log())
    assert not propose_exchange(predicted, -predicted[:, None].expand(-1, 4)).any()
    assert propose_exchange(predicted[:1], exact[:1, None].expand(-1, 4)).tolist() == [0.0]


def test_exchanges_end_without_an_improvement_and_are_never_worse() -> None:
    start = torch.zeros(3, dtype=torch.float64)
    judged: list[int] = []

    def evaluate(offset: Tensor, many: int) -> Tensor:
        judged.append(many)
        return offset.abs().sum() + torch.zeros(many)

    end, trials = exchange(start, torch.ones_like, evaluate, rounds=5, windows=[1, 4])
    assert torch.equal(end, start) and judged == [4, 1, 1, 1]
    assert [trial.round for trial in trials] == [1, 1, 1] and not any(trial.accepted for trial in trials)
    assert exchange(start, torch.ones_like, evaluate, rounds=0, windows=[1]) == (start, ())
    judged.clear()
    assert exchange(start, torch.zeros_like, evaluate, rounds=5, windows=[1, 4]) == (start, ()) and judged == [4]


def test_a_trial_has_the_number_of_windows_that_were_judged() -> None:
    start = torch.zeros(3, dtype=torch.float64)
    _, trials = exchange(
        start, torch.ones_like, lambda offset, many: -offset.sum() + torch.zeros(min(many, 2)), rounds=1, windows=[1, 4]
    )
    assert [(trial.windows, trial.accepted) for trial in trials] == [(1, False), (2, True)]
