"""Random networks: whatever tracing calls an axis must be one."""

from functools import cache

import pytest
import torch
from torch import nn

import laws
from fuzz import network
from regrow.core.axes import AxisGraph, Mark
from regrow.surgery.verify import RELATIVE_BOUND, measure_distances
from regrow.tracing import trace

CASES = 300
SILENT = {Mark.NEUTRAL}


@cache
def random_network(seed: int) -> tuple[nn.Module, AxisGraph]:
    """A random network and its axes; made once, so tests must not change it."""
    model, example = network(seed)
    return model, trace(model, *example)


@pytest.mark.parametrize("seed", range(CASES))
def test_a_random_network_is_cut_exactly(seed: int) -> None:
    """Shrunk = zeros in the uncut net's weights (neutral axes) and = masked (all axes); units have no order."""
    model, axes = random_network(seed)
    generator = torch.Generator().manual_seed(seed)
    for axis in axes.free():
        laws.permuting_units_keeps_function(model, axes, axis, seed)
    laws.zeroed_equals_shrunk(model, axes, laws.random_plan(axes, generator, marks=SILENT))
    plan = laws.random_plan(axes, generator)
    ((_, distance),) = measure_distances(model, axes, [plan])
    assert distance <= RELATIVE_BOUND
    laws.runs_with_its_ties(model, axes, plan)


def test_random_networks_have_axes() -> None:
    """Most random networks have a neutral axis, and all kinds of marks occur: freezing everything would not pass."""
    marks: dict[Mark, int] = dict.fromkeys(Mark, 0)
    for seed in range(90):
        for mark in {axis.mark for axis in random_network(seed)[1]}:
            marks[mark] += 1
    assert marks[Mark.NEUTRAL] >= 75
    assert min(marks.values()) >= 1, marks
