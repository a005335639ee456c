"""Times of widths: measured where an axis lies, one curve for axes of one kind, and never below nothing."""

import pytest
import torch
from torch import nn

from hand import lm, texts
from regrow import trace
from regrow.allocation.cost import cost_of, find_paying_axes
from regrow.core.amounts import Measure, Target
from regrow.core.budget import Budget
from regrow.core.scores import Evidence
from regrow.core.sources import Batch
from regrow.evaluation.timing import fastest_pass, set_row_length, time_widths
from regrow.jobs.pruning import build_pruner, with_timing
from regrow.methods.pruning.pruner import plan_cut
from regrow.surgery import apply


class Deep(nn.Module):
    """Wide and narrow layers on one stream, the same in each block."""

    def __init__(self, wide: int = 768, narrow: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"wide": mlp(64, wide), "narrow": mlp(64, narrow)}) for _ in range(3))
        self.head = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["wide"](x) + block["narrow"](x)
        return self.head(x)


def mlp(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


def test_kinds_share_a_curve_and_wide_ones_save_more() -> None:
    model, x = Deep(), torch.randn(64, 64)
    axes = trace(model, x)
    units = [axis for axis in axes.units() if axis.size in (768, 48)]
    found = time_widths(model, axes, units, Batch((x,)), repeats=15)
    assert set(found.names) == {axis.key for axis in units} and len(found.curves) == 2
    wide, narrow = (next(c for c in found.curves.values() if c[-1][0] == n) for n in (768, 48))
    assert [width for width, _ in wide] == [1, 191, 383, 575, 768], "inner widths are odd where nobody rounds"
    for curve in (wide, narrow):
        assert [t for _, t in curve] == sorted(t for _, t in curve)
    assert wide[-1][1] - wide[0][1] > 3 * (narrow[-1][1] - narrow[0][1])
    least = cost_of(axes, Budget(measure=Measure.TIME, timing=found))({axis.key: 1 for axis in units})
    assert 0 <= least < 0.7 * found.total
    rounded = time_widths(model, axes, units, Batch((x,)), round_to=32, repeats=1)
    assert all(width % 32 == 0 or width in (48, 768) for curve in rounded.curves.values() for width, _ in curve)


def test_modules_are_timed_with_what_they_get_in_the_network() -> None:
    model, axes = lm(kv=3, rep=2, size=4, ff=64)
    batch = set_row_length(Batch(texts("a").batches[0].args), 32)
    found = time_widths(model, axes, axes.units(), batch, repeats=2)
    assert found.positions == batch.args[0].numel() == 3 * 32
    assert [len(curve) for curve in found.curves.values()] == [3, 5]
    assert not model.training or model.head_ran, "the network itself ran"


def test_a_time_target_is_met_as_predicted_and_nearly_in_truth() -> None:
    model, x = Deep(), torch.randn(256, 64)
    axes = trace(model, x)
    before = fastest_pass(model, Batch((x,)), repeats=25)
    budget = with_timing(model, axes, Budget(target=Target(Measure.TIME, before * 0.6 / 1e6)))
    plan = plan_cut(build_pruner("magnitude", {}), model, axes, budget, Evidence()).plan
    apply(model, axes, plan)
    cost = cost_of(axes, budget)
    assert cost(plan.sizes(axes)) <= budget.limit(cost.total)
    assert fastest_pass(model, Batch((x,)), repeats=25) < 0.85 * before, "a loose bound: other processes are about"


def test_what_cannot_be_timed_is_said() -> None:
    with pytest.raises(ValueError, match="no rows of tokens"):
        set_row_length(Batch((torch.ones(2, 3),)), 9)
    assert set_row_length(Batch((), {"ids": torch.tensor([[1, 2]])}), 5).kwargs["ids"].tolist() == [[1, 2, 1, 2, 1]]
    _, axes = lm()
    with pytest.raises(ValueError, match="not measured"):
        find_paying_axes(axes, Budget(0.5, Measure.TIME))
