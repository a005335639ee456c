"""Latency tables: what is timed, and that it adds up, whatever the time."""

import pytest
import torch
from torch import nn

from regrow.core.candidates import Candidates
from regrow.core.sources import Batch
from regrow.evaluation.timing import measure_latency
from regrow.tracing import trace


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
def test_own_times_add_up_to_the_whole(net: nn.Module, ops: set[str], layers: set[str]) -> None:
    """A module's time is that beside the modules in it, what never runs takes none, and no width below is slower."""
    x = torch.randn(64, 4)
    table = measure_latency(net, trace(net, x[:2]), Batch((x,)), repeats=3)
    assert ops | layers <= table.curves.keys()
    for curve in table.curves.values():
        sizes, times = zip(*curve, strict=True)
        assert list(sizes) == sorted({*sizes}) and list(times) == sorted(times) and min(times) >= 0
    assert table.total > 0
    if isinstance(net, Unused):
        assert table.curves["spare.ops.a"][-1][1] == 0 < table.curves["runs"][-1][1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_layers_are_timed_at_several_widths() -> None:
    net = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 2))
    x = torch.randn(2048, 8)
    table = measure_latency(net, trace(net, x[:2]), Batch((x,)), round_to=8, repeats=3)
    assert [int(size) for size, _ in table.curves["0"]] == [9 * width for width in (8, 16, 48, 72, 88, 100)]
    assert [size for size, _ in table.curves[""]][-1] == 1.0
    assert table.curves["0"][0][1] < table.curves["0"][-1][1]
