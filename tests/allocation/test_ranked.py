"""The budget is met within one unit and never exceeded, whatever the network."""

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hand import conv, graph, lm, mlp, slot, timed
from regrow.allocation.cost import Cost, cost_of
from regrow.allocation.ranked import BudgetError, rank, uniform
from regrow.core.amounts import CONTEXT_MEASURES, STEPS_PER_UNIT, Measure, Target
from regrow.core.axes import Axis, AxisGraph, Role
from regrow.core.budget import Budget
from regrow.core.plan import Plan
from regrow.scoring.metrics import random

A, B = "0.weight:0", "2.weight:0"


def drawn(axes: AxisGraph, seed: int) -> dict[str, torch.Tensor]:
    return dict(random(axes, seed=seed).values)


def groups(axes: AxisGraph, kept: dict[str, tuple[int, ...]], regular: bool) -> list[list[str]]:
    """Axes that must keep equally many units: those of one count, and in a regular budget those of one kind too."""
    found: list[list[str]] = []
    for key in kept:
        own = [
            one
            for one in found
            if any(
                (axes[other].count and axes[other].count == axes[key].count)
                or (regular and axes[other].kind == axes[key].kind)
                for other in one
            )
        ]
        found = [one for one in found if one not in own] + [[key, *(other for one in own for other in one)]]
    return found


def steps_up(
    axes: AxisGraph, kept: dict[str, tuple[int, ...]], round_to: int, regular: bool = False
) -> list[dict[str, int]]:
    """The next larger network of each axis (those that keep equally many units together)."""
    result = []
    for keys in groups(axes, kept, regular):
        size, now = axes[keys[0]].size, len(kept[keys[0]])
        step = round_to if size >= round_to else 1
        if now < size:
            result.append({key: min(size, now + step) for key in keys})
    return result


NETS = {"mlp": lambda: mlp(13, 9), "lm": lm, "conv": lambda: conv(8), "tied": lambda: mlp(9, 9)}


@given(
    st.sampled_from(list(NETS)),
    st.integers(0, 50),
    st.floats(0.25, 1.0),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([measure for measure in Measure if measure != Measure.NONZERO]),
    st.sampled_from([rank, uniform]),
    st.booleans(),
    st.sampled_from(["keep", "amount", "share"]),
)
@settings(max_examples=300, deadline=None)
def test_budget_is_never_exceeded_and_no_further_step_fits(
    net: str, seed: int, keep: float, round_to: int, measure: Measure, allocate: Any, regular: bool, limit_by: str
) -> None:
    assume(measure != Measure.CACHE or net == "lm")
    axes = NETS[net]()[1]
    if net == "tied":
        axes = replace(axes, axes={key: replace(axis, count="n") for key, axis in axes.axes.items()})
    asked = Budget(keep, measure, round_to=round_to, regular=regular, timing=timed(axes, seed))
    if limit_by == "amount":
        context = 7 if measure in CONTEXT_MEASURES else 0
        whole = cost_of(axes, replace(asked, keep=1.0, target=Target(measure, 1, context))).total / STEPS_PER_UNIT.get(
            measure, 1
        )
        assume(whole)
        asked = replace(asked, keep=1.0, target=Target(measure, keep * whole, context))
    elif limit_by == "share":
        asked = replace(asked, keep=1.0, target=Target(measure, share=keep))
    cost = cost_of(axes, asked)
    try:
        kept = allocate(axes, drawn(axes, seed), asked)
    except BudgetError as error:
        told: dict[str, Any] = {"keep": error.least}
        if asked.target:
            told = {"target": replace(asked.target, **{limit_by: error.least})}
        kept = allocate(axes, drawn(axes, seed), replace(asked, **told))
        assert cost({key: len(units) for key, units in kept.items()}) <= replace(asked, **told).limit(cost.total)
        assert asked.limit(cost.total) < replace(asked, **told).limit(cost.total)
        assert not asked.target or str(told["target"]) in str(error)
        return
    sizes = {key: len(units) for key, units in kept.items()}
    limit = asked.limit(cost.total)
    assert cost(sizes) <= limit
    if cost.total:
        assert all(cost(sizes | step) > limit for step in steps_up(axes, kept, round_to, regular))
    for key, size in sizes.items():
        assert size >= 1
        assert size == axes[key].size or size % (round_to if axes[key].size >= round_to else 1) == 0
    assert all(len({sizes[key] for key in keys}) == 1 for keys in groups(axes, kept, regular))
    Plan.keeping(axes, {key: units for key, units in kept.items() if len(units) < axes[key].size}).check(axes)


@given(st.integers(0, 50), st.sampled_from([1, 4]), st.sampled_from([rank, uniform]))
@settings(max_examples=30, deadline=None)
def test_a_regular_plan_keeps_the_best_units_of_each_block(seed: int, round_to: int, allocate: Any) -> None:
    _, axes = lm(kv=4, rep=2, size=4, ff=24, blocks=3)
    scores = drawn(axes, seed)
    kept = allocate(axes, scores, Budget(0.7, round_to=round_to, regular=True))
    assert len({axes[key].kind for key in kept}) == 2 and len(kept) == 6
    for kind in {axes[key].kind for key in kept}:
        assert len({len(kept[key]) for key in kept if axes[key].kind == kind}) == 1
    for key, units in kept.items():
        assert set(units) == set(scores[key].argsort(descending=True)[: len(units)].tolist())
    assert any(len(units) < axes[key].size for key, units in kept.items())


def test_a_kind_that_one_block_cannot_give_of_is_cut_nowhere_in_a_regular_plan() -> None:
    _, axes = lm(kv=4, rep=2, size=4, ff=24, blocks=3)
    scores = drawn(axes, 0)
    first = next(key for key in scores if "gate" in key)
    some = {key: value for key, value in scores.items() if key != first}
    kept = rank(axes, some, Budget(0.8, regular=True))
    assert all(len(units) == 24 for key, units in kept.items() if "gate" in key)
    assert {len(units) for key, units in kept.items() if "gate" not in key} <= {1, 2, 3}
    with pytest.raises(BudgetError, match="in every block or in none"):
        rank(axes, some, Budget(0.3, regular=True))
    rank(axes, some, Budget(0.5))
    uneven = replace(axes, axes={key: replace(a, size=20) if key == first else a for key, a in axes.axes.items()})
    assert uneven[first].kind != axes[first].kind, "axes of unequal size are of unequal kinds"


def test_axes_that_cost_nothing_of_a_measure_stay_whole() -> None:
    _, axes = lm()
    budget = Budget(target=Target(Measure.CACHE, 2 * 2 * 2 * 4 * 4 * 100, 100))  # two groups of three in both blocks
    kept = rank(axes, drawn(axes, 0), budget)
    assert all(len(units) == axes[key].size for key, units in kept.items() if "gate" in key)
    assert sum(len(units) for key, units in kept.items() if "gate" not in key) == 4


def test_the_best_units_stay_within_and_across_axes() -> None:
    _, axes = mlp(6, 5)
    scores = {A: torch.tensor([9.0, 1, 8, 2, 7, 6]).double(), B: torch.tensor([10.0, 11, 12, 13, 14]).double()}
    kept = rank(axes, scores, Budget(0.75))
    assert kept[B] == (0, 1, 2, 3, 4)
    assert kept[A] == (0, 2, 4, 5)


def test_permuting_units_permutes_what_is_kept() -> None:
    _, axes = lm()
    scores = drawn(axes, 3)
    kept = rank(axes, scores, Budget(0.6))
    for key in scores:
        order = torch.randperm(len(scores[key]))
        moved = rank(axes, scores | {key: scores[key][order]}, Budget(0.6))
        assert {int(order[unit]) for unit in moved[key]} == set(kept[key])
        assert all(moved[other] == kept[other] for other in scores if other != key)


def test_ties_are_cut_in_the_order_of_keys_whatever_the_order_of_axes() -> None:
    _, axes = lm()
    scores = {key: torch.ones(axes[key].size).double() for key in axes.axes}
    backwards = replace(axes, axes=dict(reversed(axes.axes.items())))
    one, two = rank(axes, scores, Budget(0.8)), rank(backwards, dict(reversed(scores.items())), Budget(0.8))
    assert one == two
    assert len(one[min(scores)]) < axes[min(scores)].size


def test_axes_of_one_count_lose_equally_many_their_own_worst() -> None:
    _, axes = mlp(6, 6)
    axes = replace(axes, axes={key: replace(axis, count="half") for key, axis in axes.axes.items()})
    scores = {A: torch.tensor([1.0, 2, 3, 4, 5, 6]).double(), B: torch.tensor([60.0, 50, 40, 30, 20, 10]).double()}
    kept = rank(axes, scores, Budget(0.5))
    many = len(kept[A])
    assert 1 <= many < 6
    assert kept[A] == tuple(range(6 - many, 6)) and kept[B] == tuple(range(many))
    with pytest.raises(BudgetError, match="least reachable keep is 1"):
        rank(axes, {A: scores[A]}, Budget(0.9))  # its partner may not be cut, so neither may it


def test_rounding_is_part_of_the_allocation() -> None:
    _, axes = lm(kv=3, rep=2, size=4, ff=20)
    budget = Budget(0.7, round_to=8)
    kept = rank(axes, drawn(axes, 0), budget)
    for key, units in kept.items():
        assert len(units) in ({20, 16, 8} if "gate" in key else {1, 2, 3})
    cost = Cost(axes)
    assert cost({key: len(units) for key, units in kept.items()}) <= 0.7 * cost.total


def test_an_infeasible_budget_names_the_least_keep() -> None:
    _, axes = mlp(20, 10)
    with pytest.raises(BudgetError, match=r"keep 0.01 of weights .*least reachable keep is 0.0259") as info:
        rank(axes, drawn(axes, 0), Budget(0.01))
    assert info.value.least == 0.0259  # (4 + 1 + 3) of 310, rounded up
    rank(axes, drawn(axes, 0), Budget(info.value.least))
    with pytest.raises(BudgetError, match="no axis is left to cut"):
        rank(axes, {}, Budget(0.9))
    assert rank(axes, {}, Budget(1.0)) == {}
    assert all(len(units) == axes[key].size for key, units in rank(axes, drawn(axes, 0), Budget(1.0)).items())


def test_scores_that_do_not_fit_are_refused() -> None:
    _, axes = mlp(6, 5)
    with pytest.raises(ValueError, match="do not fit"):
        rank(axes, {A: torch.zeros(5)}, Budget(0.9))
    with pytest.raises(ValueError, match=f"scores of '{A}' hold NaN"):
        uniform(axes, {A: torch.full((6,), float("nan"))}, Budget(0.9))


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
    kept = rank(net, scores, Budget(0.8))
    assert time.perf_counter() - start < 0.5
    cost = Cost(net)
    left = 0.8 * cost.total - cost({key: len(units) for key, units in kept.items()})
    assert 0 <= left < 3 * d


def test_an_axis_of_as_many_units_as_sizes_are_rounded_to_stays_whole() -> None:
    _, axes = lm(kv=3, rep=2, size=4, ff=8)
    scores = {key: score - 9 if "gate" in key else score for key, score in drawn(axes, 0).items()}
    kept = rank(axes, scores, Budget(0.7, round_to=8))
    assert {len(units) for key, units in kept.items() if "gate" in key} == {8}


def test_what_is_left_of_a_budget_goes_to_the_best_removed_unit() -> None:
    """A group of heads costs as much as eight neurons: once it is cut, one of the two neurons before it fits again."""
    _, axes = lm()
    first, second, heads = (f"decoder.blocks.{name}.weight:0" for name in ("0.gate", "1.gate", "0.q"))
    scores = {axis.key: torch.full((axis.size,), 100.0, dtype=torch.float64) for axis in axes.free()}
    scores[first][0], scores[second][0], scores[heads][0] = 1.0, 1.5, 3.0
    cost = Cost(axes)
    one = cost.total - cost({first: axes[first].size - 1})
    kept = rank(axes, scores, Budget((cost.total - cost.total + cost({heads: 2}) - one / 2) / cost.total))
    assert len(kept[heads]) == 2 and 0 not in kept[first] and 0 in kept[second]
