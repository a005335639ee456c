"""Latency tables: what is timed, and that it adds up, whatever the time."""

import pytest
import torch
from torch import nn

from regrow.core.candidates import Candidates
from regrow.core.sources import Batch
from regrow.evaluation.timing import measure_latency


class Unused(nn.Module):
    """Has candidates that never run."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = nn.Linear(4, 4)
        self.spare = Candidates({"a": nn.Linear(4, 4), "b": nn.Identity()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.runs(x)


def inner() -> nn.Module:
    return nn.Sequential(Candidates({"x": nn.Linear(4, 4), "y": nn.Identity()}), nn.ReLU())


@pytest.mark.parametrize(
    ("net", "ops", "layers"),
    [
        (
            nn.Sequential(nn.Linear(4, 4), Candidates({"a": inner(), "b": nn.Linear(4, 4)})),
            {"1.ops.a", "1.ops.b"},
            {"0"},
        ),
        (Candidates({"a": nn.Linear(4, 4), "b": nn.Identity()}), {"ops.a", "ops.b"}, set()),
        (Unused(), {"spare.ops.a", "spare.ops.b"}, {"runs"}),
    ],
)
def test_parts_are_no_more_than_the_whole(net: nn.Module, ops: set[str], layers: set[str]) -> None:
    """Nested candidates are a part of what they lie in, a root that is candidates is one sum, what never runs is 0."""
    table = measure_latency(net, Batch((torch.randn(64, 4),)), repeats=3)
    assert (set(table.ops), set(table.layers)) == (ops, layers)
    parts = [*table.ops.values(), *table.sums.values(), *table.layers.values()]
    assert min(parts) >= 0 and sum(parts) + table.rest == pytest.approx(table.total)
    if isinstance(net, Unused):
        assert table.ops["spare.ops.a"] == 0 < table.layers["runs"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
