"""Which axes grow by how much, and what an increase may be."""

import pytest

from regrow.allocation.widening import classify_axes, plan_widening
from regrow.core.amounts import Increase
from zoo import trace_zoo


def test_increases_are_numbers_or_shares() -> None:
    assert [Increase.parse(text).of(10) for text in ("+25%", "25 %", "+3", "3", 3)] == [3, 3, 3, 3, 3]
    for text in ("", "0", "-1", "0%", "1.5", "x", True, None):
        with pytest.raises(ValueError, match="an increase is above 0"):
            Increase.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "parts"), [("llama_tied", {"heads", "mlp"}), ("conv_residual", {"channels"}), ("layernorm_block", {"mlp"})]
)
def test_axes_are_recognised_from_the_network(name: str, parts: set[str]) -> None:
    _, axes = trace_zoo(name)
    found = classify_axes(axes)
    assert {*found.values()} == parts
    assert not any(axes[axes[key].inside].key in found for key in found if axes[key].inside)


def test_widths_are_refused_with_the_reason() -> None:
    _, axes = trace_zoo("layernorm_block")
    under = next(axis.key for axis in axes if "layer_norm" in (axis.reason + axis.narrow) or axis.narrow)
    with pytest.raises(ValueError, match="cannot be widened"):
        plan_widening(axes, {}, {under: Increase(units=1)})
    with pytest.raises(ValueError, match="no attention heads"):
        plan_widening(axes, {"heads": Increase(units=1)}, {})
    with pytest.raises(ValueError, match="no axis fits"):
        plan_widening(axes, {}, {"nothing*": Increase(units=1)})
