"""Plans as users write them."""

from typing import Any

import numpy as np
import pytest
import torch

from regrow.core.plan import Plan, PlanError
from zoo import trace_zoo


@pytest.mark.parametrize(
    "units", [[0.9, 1.9], [False, True], "12", torch.tensor([True, False]), np.array([True]), torch.tensor([0.5])]
)
def test_what_is_no_position_is_no_unit(units: Any) -> None:
    _, axes = trace_zoo("mlp")
    key = axes.free()[0].key
    with pytest.raises(PlanError, match=r"a unit is a whole number, got .*mask\.nonzero"):
        Plan.keeping(axes, {key: units})


@pytest.mark.parametrize("units", [(1, 0), torch.tensor([0, 1]), np.array([1, 0]), range(2), {0, 1}])
def test_positions_may_come_in_any_order_and_kind(units: Any) -> None:
    _, axes = trace_zoo("mlp")
    key = axes.free()[0].key
    assert Plan.keeping(axes, {key: units}).changes[key].keep == (0, 1)
