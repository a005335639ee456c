"""Measured times as a cost: what axes save, and which axes pay for what."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hand import lm, mlp, timed
from regrow.allocation.cost import cost_of, find_paying_axes
from regrow.core.amounts import Measure, Target
from regrow.core.budget import Budget, Timing

A, B = "0.weight:0", "2.weight:0"


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 8), st.integers(0, 4), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_wider_is_never_faster(seed: int, a: int, b: int, da: int, db: int) -> None:
    _, axes = mlp(width=13, second=12)
    cost = cost_of(axes, Budget(measure=Measure.TIME, timing=timed(axes, seed)))
    assert cost.at(np.array([*({A: a, B: b}[key] for key in cost.index), 1])) == cost({A: a, B: b})
    assert cost({A: a + da, B: b}) - cost({A: a, B: b}) >= 0
    assert cost({A: a + db, B: b + db}) - cost({A: a, B: b}) >= 0
    assert cost({}) == cost.total == timed(axes, seed).total
    assert 0 <= cost({A: 1, B: 1}) <= cost.total


def test_time_is_linear_between_widths_and_level_below_the_least() -> None:
    _, axes = mlp(width=9, second=8)
    timing = Timing("none", 1, 1000, {"k": ((3, 100), (5, 300), (9, 340))}, {A: "k"})
    cost = cost_of(axes, Budget(measure=Measure.TIME, timing=timing))
    assert [cost({A: n}) for n in (9, 7, 5, 4, 3, 1)] == [1000, 980, 960, 860, 760, 760]
    assert cost({B: 1}) == 1000, "what has no curve saves nothing"
    cut = replace(axes, axes={**axes.axes, A: replace(axes[A], size=5, ids=())})
    assert cost_of(cut, Budget(measure=Measure.TIME, timing=timing)).total == 960, (
        "the same times hold for the network that was cut"
    )


@given(st.integers(1, 3), st.integers(1, 10), st.integers(0, 2), st.integers(0, 4))
@settings(max_examples=40, deadline=None)
def test_a_bias_costs_once_an_input_of_its_weight_is_dropped(kv: int, ff: int, more: int, wider: int) -> None:
    model, axes = lm()
    n = "decoder.blocks.0"
    down, out = f"{n}.down.weight", f"{n}.o.weight"
    budget = Budget(target=Target(Measure.BYTES, 10), compensated=(down, out))
    cost, plain = cost_of(axes, budget), cost_of(axes, replace(budget, compensated=()))
    keys = f"{n}.q.weight:0", f"{n}.gate.weight:0"
    sizes = dict(zip(keys, (kv, ff), strict=True))
    width = model.head.in_features
    assert cost(sizes) == plain(sizes) + 4 * width * ((kv < 3) + (ff < 10))
    assert cost(sizes | {keys[1]: ff + wider}) - cost(sizes) >= 0
    assert cost.total == plain.total and cost_of(axes, replace(budget, keep=0.5, target=None)).total == plain.total


def test_only_what_costs_something_pays() -> None:
    _, axes = lm()
    everything = {axis.key for axis in axes}
    cache = Budget(target=Target(Measure.CACHE, 1000, 8))
    assert {axis.key for axis in find_paying_axes(axes, Budget(0.5))} == everything
    assert {axis.key for axis in find_paying_axes(axes, cache)} == {key for key in everything if "gate" not in key}
    one = Budget(0.5, only=("blocks.1",))
    assert {axis.key for axis in find_paying_axes(axes, one)} == {key for key in everything if "blocks.1" in key}
    bound = replace(axes, axes={key: replace(a, count="n" * ("blocks.0" in key)) for key, a in axes.axes.items()})
    found = {axis.key for axis in find_paying_axes(bound, cache)}
    assert found == {key for key in everything if "gate" not in key or "blocks.0" in key}, "what is bound to one is in"


def test_what_a_target_counts() -> None:
    model, axes = mlp()
    every = Budget(target=Target(Measure.PARAMETERS, 10))
    assert cost_of(axes, every).total == sum(p.numel() for p in model.parameters())
    assert cost_of(axes, Budget(1.0)).total == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert cost_of(axes, Budget(0.5, Measure.PARAMETERS)).total == cost_of(axes, every).total
    assert cost_of(axes, Budget(target=Target(Measure.WEIGHTS, share=0.5))).total == cost_of(axes, Budget(1.0)).total
    _, axes = lm()
    cache = cost_of(axes, Budget(target=Target(Measure.CACHE, 10, 100)))
    assert cache.total == 2 * 2 * 3 * 4 * 4 * 100, "blocks · (keys, values) · groups · head size · bytes · tokens"
    assert cache.total == 100 * cost_of(axes, Budget(0.5, Measure.CACHE)).total
    with pytest.raises(ValueError, match="no kv_cache"):
        cost_of(mlp()[1], Budget(target=Target(Measure.CACHE, 10, 100)))
    with pytest.raises(ValueError, match="not measured"):
        cost_of(axes, Budget(0.5, Measure.TIME))
