"""Cost is the size of the network that the plan leaves."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hand import conv, graph, lm, mlp
from regrow.allocation.cost import Cost
from regrow.core.amounts import Measure
from regrow.core.axes import Axis, AxisGraph, Product, Sum, size_of


def long_way(axes: AxisGraph, names: tuple[str, ...], sizes: dict[str, int]) -> int:
    sizes = axes.sizes() | sizes
    total = 0
    for name in names:
        entries = 1
        for dim in axes.shapes[name]:
            entries *= size_of(dim, sizes)
        total += entries
    return total


def test_parameters_are_those_of_the_network() -> None:
    model, axes = lm()
    every = Cost(axes, Measure.PARAMETERS).total
    assert every == sum(p.numel() for p in model.parameters()), "the tied head counts once"
    assert Cost(axes, Measure.BYTES).total == 4 * every
    cost = Cost(axes)
    one = cost.total - cost({"decoder.blocks.0.q.weight:0": 2})
    assert one == (2 * 2 + 2) * 8 * 4, "a key-value group costs (2g+2)·d·d_h"


def test_macs_follow_the_traced_work() -> None:
    _, axes = mlp(width=6, second=5)
    cost = Cost(axes, Measure.MACS)
    assert cost.total == 4 * 6 + 6 * 5 + 5 * 3
    assert cost({"0.weight:0": 2}) == 4 * 2 + 2 * 5 + 5 * 3


@given(st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_costs_multiply(a: int, b: int) -> None:
    _, axes = mlp(width=9, second=8)
    cost = Cost(axes)
    sizes = {"0.weight:0": a, "2.weight:0": b}
    assert cost(sizes) == long_way(axes, axes.counted, sizes)
    vector = np.array([*((axes.sizes() | sizes)[key] for key in cost.index), 1])
    assert cost.at(vector) == cost(sizes)


def test_sums_and_products_of_dimensions() -> None:
    model, _ = conv()
    axes = graph(model, [Axis("x", 3, ()), Axis("y", 4, ())], {})
    dim = Product((2, Sum(("x", 1, Product(("x", "y"))))))
    axes = AxisGraph(axes.axes, {"w": (dim, Sum(("x", "y")))}, frozenset({"w"}), ("w",))
    for x, y in ((3, 4), (1, 2), (2, 0)):
        assert Cost(axes)({"x": x, "y": y}) == 2 * (x + 1 + x * y) * (x + y)


def test_large_networks_do_not_overflow() -> None:
    axes = AxisGraph(
        {"a": Axis("a", 28672, ())}, {f"{i}": ("a", 8192) for i in range(240)}, frozenset(), tuple(map(str, range(240)))
    )
    assert Cost(axes).total == 240 * 28672 * 8192
    assert torch.iinfo(torch.int64).max > Cost(axes).total
