"""Fisher OBS: it cuts what others can stand in for or the loss does not depend on, in the better of two allocations."""

import pytest
import torch
from torch import nn

from hand import lm, texts
from regrow import trace
from regrow.axes import AxisGraph
from regrow.budget import Budget
from regrow.commands.pruning import collect_evidence
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.outer_blocks import ALL, INNER
from regrow.methods.pruning.pruner import Cut, plan_cut
from regrow.sources import Batch, Source


def cut(
    model: nn.Module, source: Source, method: str, budget: Budget, axes: AxisGraph | None = None, **settings: object
) -> Cut:
    """The plan of a method from one source."""
    pruner = find_method(MethodKind.PRUNING, method).made(method, settings)
    axes = axes or trace(model, *source.batches[0].args)
    return plan_cut(pruner, model, axes, budget, collect_evidence(model, axes, pruner, [source]))


def test_of_two_duplicates_one_goes_and_so_does_what_the_loss_does_not_depend_on() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[0] *= 3  # units 0 and 1 are strong duplicates
        net[0].weight[1], net[0].bias[1] = net[0].weight[0], net[0].bias[0]
        net[0].weight[5] *= 10  # unit 5 is large, but is written where nothing reads it
        net[1].weight[:, 5] = torch.tensor([0.0, 0.0, 0.0, 5.0])
        net[2].weight[:, 3] = 0
    source = Source("noise", [Batch((torch.randn(256, 6),), labels=torch.randint(3, (256,)))])
    gone = {}
    for method in ("fisher", "obs", "fisher_obs"):
        settings = {} if method == "obs" else {"spare_first": 0.0, "spare_last": 0.0}
        (change,) = cut(net, source, method, Budget(0.8, only=("0", "1")), **settings).plan.changes.values()
        gone[method] = set(range(6)) - set(change.keep)
    assert len(gone["fisher_obs"] & {0, 1}) == 1 and 5 in gone["fisher_obs"]
    assert 5 not in gone["obs"], "its error is the largest"
    assert not gone["fisher"] & {0, 1}, "the loss depends on each of them"


@pytest.mark.parametrize(("inactive", "name"), [((0, 40), INNER), ((20, 20), ALL)])
def test_the_allocation_that_diverges_less_is_taken(inactive: tuple[int, int], name: str) -> None:
    """Units that add nothing are cut for free, where they are: in the inner block alone, or in both."""
    model, axes = lm(kv=3, rep=2, size=4, ff=64)
    with torch.no_grad():
        for block, many in zip(model.decoder.blocks, inactive, strict=True):
            block.down.weight[:, :many] = 0
    found = cut(
        model,
        texts("a"),
        "fisher_obs",
        Budget(0.8, only=("gate", "up", "down")),
        axes,
        spare_first=0.5,
        spare_last=0.0,
    )
    losses = found.findings["starts"]
    assert min(losses, key=losses.__getitem__) == name and losses[name] < 1e-6 < max(losses.values())
    assert {key.split(".")[2] for key in found.plan.changes} == ({"1"} if name == INNER else {"0", "1"})
    (note,) = found.plan.origin["notes"]
    assert note.index(name) < note.index(({ALL, INNER} - {name}).pop())


def test_a_budget_that_the_inner_blocks_cannot_meet_takes_all() -> None:
    model, axes = lm(kv=3, rep=2, size=4, ff=64)
    found = cut(
        model, texts("a"), "fisher_obs", Budget(0.4, only=("gate", "up", "down")), axes, spare_first=0.5, spare_last=0.0
    )
    assert not found.findings and {key.split(".")[2] for key in found.plan.changes} == {"0", "1"}
