"""The budget is met within one unit and never exceeded, whatever the network."""

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hand import conv, graph, lm, mlp, slot
from regrow.allocation import BudgetError, Cost, allocation, ranked, uniform
from regrow.axes import Axis, AxisGraph, Role
from regrow.method import Budget, Measure
from regrow.plan import Plan
from regrow.scoring import random

A, B = "0.weight:0", "2.weight:0"


def drawn(axes: AxisGraph, seed: int) -> dict[str, torch.Tensor]:
    return dict(random(axes, seed=seed).values)


def steps_up(axes: AxisGraph, kept: dict[str, tuple[int, ...]], round_to: int) -> list[dict[str, int]]:
    """The next larger network of each axis (axes with one count together)."""
    lanes: dict[str, list[str]] = {}
    for key in kept:
        lanes.setdefault(axes[key].count or key, []).append(key)
    result = []
    for keys in lanes.values():
        size, now = axes[keys[0]].size, len(kept[keys[0]])
        step = round_to if size >= round_to else 1
        if now < size:
            result.append({key: min(size, now + step) for key in keys})
    return result


@given(
    st.sampled_from(["mlp", "lm", "conv", "tied"]),
    st.integers(0, 50),
    st.floats(0.25, 1.0),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(list(Measure)),
    st.sampled_from([ranked, uniform]),
)
@settings(max_examples=120, deadline=None)
def test_budget_is_never_exceeded_and_no_further_step_fits(
    net: str, seed: int, keep: float, round_to: int, measure: Measure, allocate: object
) -> None:
    axes = {"mlp": lambda: mlp(13, 9), "lm": lm, "conv": lambda: conv(8), "tied": lambda: mlp(9, 9)}[net]()[1]
    if net == "tied":
        axes = axes.with_axes({key: replace(axis, count="n") for key, axis in axes.axes.items()})
    budget = Budget(keep, measure, round_to=round_to)
    cost = Cost(axes, measure)
    try:
        kept = allocate(axes, drawn(axes, seed), budget)  # type: ignore[operator]
    except BudgetError as error:
        least = allocate(axes, drawn(axes, seed), Budget(error.least, measure, round_to=round_to))  # type: ignore[operator]
        assert keep < error.least
        assert cost({key: len(units) for key, units in least.items()}) <= error.least * cost.total
        return
    sizes = {key: len(units) for key, units in kept.items()}
    limit = keep * cost.total * (1 + 1e-12)
    assert cost(sizes) <= limit
    if cost.total:
        assert all(cost(sizes | step) > limit for step in steps_up(axes, kept, round_to))
    for key, size in sizes.items():
        assert size >= 1
        assert size == axes[key].size or size % (round_to if axes[key].size >= round_to else 1) == 0
    Plan.keeping(axes, {key: units for key, units in kept.items() if len(units) < axes[key].size}).check(axes)


def test_the_best_units_stay_within_and_across_axes() -> None:
    _, axes = mlp(6, 5)
    scores = {A: torch.tensor([9.0, 1, 8, 2, 7, 6]).double(), B: torch.tensor([10.0, 11, 12, 13, 14]).double()}
    kept = ranked(axes, scores, Budget(0.75))
    assert kept[B] == (0, 1, 2, 3, 4)
    assert kept[A] == (0, 2, 4, 5)


def test_permuting_units_permutes_what_is_kept() -> None:
    _, axes = lm()
    scores = drawn(axes, 3)
    kept = ranked(axes, scores, Budget(0.6))
    for key in scores:
        order = torch.randperm(len(scores[key]))
        moved = ranked(axes, scores | {key: scores[key][order]}, Budget(0.6))
        assert {int(order[unit]) for unit in moved[key]} == set(kept[key])
        assert all(moved[other] == kept[other] for other in scores if other != key)


def test_ties_are_cut_in_the_order_of_keys_whatever_the_order_of_axes() -> None:
    _, axes = lm()
    scores = {key: torch.ones(axes[key].size).double() for key in axes.axes}
    backwards = axes.with_axes(dict(reversed(axes.axes.items())))
    one, two = ranked(axes, scores, Budget(0.8)), ranked(backwards, dict(reversed(scores.items())), Budget(0.8))
    assert one == two
    assert len(one[min(scores)]) < axes[min(scores)].size


def test_axes_of_one_count_lose_equally_many_their_own_worst() -> None:
    _, axes = mlp(6, 6)
    axes = axes.with_axes({key: replace(axis, count="half") for key, axis in axes.axes.items()})
    scores = {A: torch.tensor([1.0, 2, 3, 4, 5, 6]).double(), B: torch.tensor([60.0, 50, 40, 30, 20, 10]).double()}
    kept = ranked(axes, scores, Budget(0.5))
    many = len(kept[A])
    assert 1 <= many < 6
    assert kept[A] == tuple(range(6 - many, 6)) and kept[B] == tuple(range(many))
    with pytest.raises(BudgetError, match="least reachable keep is 1"):
        ranked(axes, {A: scores[A]}, Budget(0.9))  # its partner may not be cut, so neither may it


def test_rounding_is_part_of_the_allocation() -> None:
    _, axes = lm(kv=3, rep=2, size=4, ff=20)
    budget = Budget(0.7, round_to=8)
    kept = ranked(axes, drawn(axes, 0), budget)
    for key, units in kept.items():
        assert len(units) in ({20, 16, 8} if "gate" in key else {1, 2, 3})
    cost = Cost(axes)
    assert cost({key: len(units) for key, units in kept.items()}) <= 0.7 * cost.total


def test_minimum_and_share_hold() -> None:
    _, axes = mlp(20, 10)
    scores = {A: torch.arange(20).double(), B: 100 + torch.arange(10).double()}
    assert len(ranked(axes, scores, Budget(0.4))[A]) < 8
    assert len(ranked(axes, scores, Budget(0.5), share=0.4)[A]) == 8
    assert len(ranked(axes, scores, Budget(0.5), minimum=9)[A]) == 9


def test_an_infeasible_budget_names_the_least_keep() -> None:
    _, axes = mlp(20, 10)
    with pytest.raises(BudgetError, match=r"keep 0.01 of params .*least reachable keep is 0.0259") as info:
        ranked(axes, drawn(axes, 0), Budget(0.01))
    assert info.value.least == 0.0259  # (4 + 1 + 3) of 310, rounded up
    ranked(axes, drawn(axes, 0), Budget(info.value.least))
    with pytest.raises(BudgetError, match="no axis is left to cut"):
        ranked(axes, {}, Budget(0.9))
    assert ranked(axes, {}, Budget(1.0)) == {}
    assert all(len(units) == axes[key].size for key, units in ranked(axes, drawn(axes, 0), Budget(1.0)).items())


def test_scores_that_do_not_fit_are_refused() -> None:
    _, axes = mlp(6, 5)
    with pytest.raises(ValueError, match="do not fit"):
        ranked(axes, {A: torch.zeros(5)}, Budget(0.9))
    with pytest.raises(ValueError, match=f"scores of '{A}' hold NaN"):
        uniform(axes, {A: torch.full((6,), float("nan"))}, Budget(0.9))
    with pytest.raises(ValueError, match="ranked, uniform"):
        allocation("best")


def test_uniform_takes_the_same_share_everywhere() -> None:
    _, axes = lm(kv=3, rep=2, size=4, ff=50)
    scores = {key: value * (1000 if "blocks.0" in key else 1) for key, value in drawn(axes, 1).items()}
    kept = uniform(axes, scores, Budget(0.75))
    shares = [len(units) / axes[key].size for key, units in kept.items() if "gate" in key]
    assert max(shares) - min(shares) <= 1 / 50
    for key, units in kept.items():
        worst = scores[key].argsort()[: axes[key].size - len(units)].tolist()
        assert not set(worst) & set(units)


def test_forty_six_thousand_units_take_well_under_a_second() -> None:
    layers, d, ff = 30, 576, 1536
    model = torch.nn.ParameterDict()
    axes, shapes = [], {}
    for i in range(layers):
        ends = (slot(f"{i}.up", 0, Role.PRODUCES), slot(f"{i}.down", 1, Role.CONSUMES))
        axes.append(Axis(f"{i}.up:0", ff, ends))
        shapes |= {f"{i}.gate": (f"{i}.up:0", d), f"{i}.up": (f"{i}.up:0", d), f"{i}.down": (d, f"{i}.up:0")}
        shapes[f"{i}.attention"] = (d, 3 * d)
    net = replace(graph(model, axes, {}), shapes=shapes, counted=tuple(shapes), parameters=frozenset(shapes))
    scores = drawn(net, 0)
    start = time.perf_counter()
    kept = ranked(net, scores, Budget(0.8))
    assert time.perf_counter() - start < 0.5
    cost = Cost(net)
    left = 0.8 * cost.total - cost({key: len(units) for key, units in kept.items()})
    assert 0 <= left < 3 * d
