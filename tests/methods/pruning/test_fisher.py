"""``fisher`` compares allocations by the loss of the masked network; ``obs`` sees what can stand in for what."""

import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regrow
from hand import lm, texts
from regrow import trace
from regrow.allocation.ranked import BudgetError
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.sources import Batch, Source
from regrow.jobs.pruning_inputs import collect_evidence
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning import measured
from regrow.methods.pruning.measured import ALL, INNER, RANKED
from regrow.methods.pruning.pruner import PlannedCut, plan_cut
from regrow.scoring import spaces

MLP = Budget(0.8, only=("gate", "up", "down"))
MEASURED = {"allocation": "measured"}


@pytest.fixture(autouse=True)
def first_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of the blocks is what may stay unpruned."""
    monkeypatch.setattr(spaces, "OUTER_BLOCKS", (0.5, 0.0))


def cut(
    model: nn.Module, source: Source, method: str, budget: Budget, axes: AxisGraph | None = None, **settings: object
) -> PlannedCut:
    """The plan of a method from one source."""
    pruner = find_method(MethodKind.PRUNING, method).create(method, settings)
    axes = axes or trace(model, *source.batches[0].args)
    return plan_cut(pruner, model, axes, budget, collect_evidence(model, axes, pruner, [source]))


def test_of_two_duplicates_obs_removes_one_and_fisher_none() -> None:
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
    for method in ("fisher", "obs"):
        (change,) = cut(net, source, method, Budget(0.8, only=("0", "1")), prune_outer=True).plan.changes.values()
        gone[method] = set(range(6)) - set(change.keep)
    assert len(gone["obs"] & {0, 1}) == 1 and 5 not in gone["obs"], "its error is the largest"
    assert not gone["fisher"] & {0, 1}, "the loss depends on each of them"


def certain_texts(model: nn.Module, sharpen: float = 20.0) -> Source:
    """Texts whose labels are what a sharpened network predicts, so that any change of its outputs raises the loss."""
    with torch.no_grad():
        model.head.weight *= sharpen
        batches = [replace(one, labels=model(*one.args)[0].argmax(-1)) for one in texts("a").batches]
    return Source("a", batches)


@pytest.mark.parametrize(("inactive", "name"), [((0, 40), INNER), ((20, 20), ALL)])
def test_the_allocation_of_lower_loss_is_taken(inactive: tuple[int, int], name: str) -> None:
    """Units that add nothing are cut for free, where they are: in the inner block alone, or in both."""
    model, axes = lm(kv=3, rep=2, size=4, ff=64)
    with torch.no_grad():
        for block, many in zip(model.decoder.blocks, inactive, strict=True):
            block.down.weight[:, :many] = 0
    found = cut(model, certain_texts(model), "fisher", MLP, axes, **MEASURED)
    losses = found.findings["starts"]
    assert min(losses, key=losses.__getitem__) == name and max(losses.values()) > 1.001 * min(losses.values())
    assert {key.split(".")[2] for key in found.plan.changes} == ({"1"} if name == INNER else {"0", "1"})
    (note,) = found.plan.origin["notes"]
    assert note.index(name) < note.index(({ALL, INNER} - {name}).pop())


def test_fisher_takes_one_ranking_where_its_loss_is_lowest() -> None:
    """Units that add nothing are unequally many in both blocks."""
    model, axes = lm(kv=3, rep=2, size=4, ff=64)
    with torch.no_grad():
        for block, many in zip(model.decoder.blocks, (12, 28), strict=True):
            block.down.weight[:, :many] = 0
    source = certain_texts(model, 5.0)  # of certain predictions the Fisher information is 0
    found = cut(model, source, "fisher", MLP, axes, **MEASURED)
    losses = found.findings["starts"]
    assert set(losses) == {INNER, ALL, RANKED} and min(losses, key=losses.__getitem__) == RANKED
    assert losses[RANKED] < 0.1 * min(losses[INNER], losses[ALL])
    alone = cut(model, source, "fisher", MLP, axes, prune_outer=True, allocation="ranked")
    assert found.plan.changes == alone.plan.changes and found.plan.origin["metric"] == alone.plan.origin["metric"]
    assert found.plan.origin["settings"]["allocation"] == "measured"
    assert [64 - len(change.keep) for _, change in sorted(found.plan.changes.items())] == [12, 24]
    alike = cut(model, source, "fisher", replace(MLP, regular=True), axes, **MEASURED)
    assert not alike.findings, "every block loses as much in any allocation"


def test_what_cannot_meet_the_budget_is_left_out_of_the_comparison_and_noted() -> None:
    model, axes = lm(kv=3, rep=2, size=4, ff=64)
    given = {**MEASURED, "compensate": False}
    found = cut(model, texts("a"), "fisher", replace(MLP, keep=0.4), axes, **given)
    assert set(found.findings["starts"]) == {ALL, RANKED}
    assert f"{INNER}: cannot meet the budget" in found.plan.origin["notes"]
    with pytest.raises(BudgetError):
        cut(model, texts("a"), "fisher", replace(MLP, keep=0.01), axes, **given)


def test_batches_without_labels_are_left_out_and_without_a_loss_the_first_blocks_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, axes = lm(kv=3, rep=2, size=4, ff=64)
    batches = texts("a").batches
    none = [replace(batch, labels=torch.full_like(batch.labels, -100)) for batch in batches]
    some = Source("a", [*none[:-1], batches[-1]])
    losses = cut(model, some, "fisher", MLP, axes, **MEASURED).findings["starts"]
    assert all(math.isfinite(loss) for loss in losses.values())
    monkeypatch.setattr(measured, "_compare_losses", lambda *given: {})
    found = cut(model, some, "fisher", MLP, axes, **MEASURED)
    assert not found.findings and {key.split(".")[2] for key in found.plan.changes} == {"1"}
    assert "allocations were not compared: no batch has labels and a finite loss" in found.plan.origin["notes"]


@pytest.mark.parametrize("loss", [None, F.smooth_l1_loss, lambda output, labels: 5 + F.mse_loss(output, labels)])
def test_outputs_that_are_no_classes_are_compared_by_their_loss(loss: Any) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)) for _ in range(4)]
    net = nn.Sequential(*blocks, nn.Linear(6, 1), nn.Flatten(0))
    x = torch.randn(128, 6)
    given: dict[str, Any] = {"method": "fisher", "keep": 0.8, "settings": MEASURED, "loss": loss}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, plan = regrow.prune(net, {"a": [(x, net(x).detach())]}, **given)
    (note,) = (note for note in plan.origin["notes"] if "loss before any refit" in note)
    losses = [float(part.rsplit(" ", 1)[1]) for part in note.partition("taken: ")[2].split(", ")]
    assert losses == sorted(losses) and (losses[0] > 4) == (loss not in (None, F.smooth_l1_loss)), note
