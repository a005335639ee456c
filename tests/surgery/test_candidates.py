"""Candidates: whole operations go exactly and come back, whatever else was cut in between."""

import copy

import pytest
import torch
from torch import nn

from regrow import Candidates, Plan, UndoStore, apply, trace, verify
from regrow.core.candidates import candidate_paths
from regrow.core.plan import PlanError
from regrow.nets.cells import Cells, supernet_config
from zoo import randomise


@pytest.fixture(scope="module")
def traced():
    net = randomise(Cells(supernet_config((3, 16, 16), 5, width=4, cells=2, nodes=2))).double()
    example = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return net, trace(net, example), example


def dropped(net, every=2):
    """Every second operation of each node, and what computes the same: those operations scaled by 0."""
    paths, masked = [], copy.deepcopy(net)
    for parent, own in candidate_paths(net).items():
        paths += own[::every]
        with torch.no_grad():
            masked.get_submodule(parent).scale[::every] = 0
    return paths, masked


def test_without_candidates_a_network_computes_the_sum_of_the_others(traced):
    net, axes, x = traced
    net = copy.deepcopy(net)
    paths, masked = dropped(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net, after = apply(net, axes, Plan.dropping(axes, paths), optimizers=[optimizer])
    assert torch.allclose(net(x), masked(x), rtol=0, atol=1e-12)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
    assert not after.branches.keys() & set(paths)


def test_the_axes_after_it_are_those_of_a_new_trace_where_a_cell_stays_tied(traced):
    net, axes, x = traced
    net = copy.deepcopy(net)
    net, after = apply(net, axes, Plan.dropping(axes, dropped(net)[0]))
    fresh = {frozenset(axis.slots) for axis in trace(net, x).free()}
    for axis in after.free():
        own = frozenset(axis.slots)
        assert own in fresh or own == frozenset().union(*(one for one in fresh if one <= own))


def test_filters_are_cut_beside_candidates_that_went(traced):
    net, axes, _ = traced
    net = copy.deepcopy(net)
    paths, _ = dropped(net)
    net, after = apply(net, axes, Plan.dropping(axes, paths))
    found = verify(net, after, Plan.keeping(after, {axis.key: range(1, axis.size) for axis in after.free()}))
    assert found.ok


def test_what_went_comes_back_as_it_was(traced):
    net, axes, x = traced
    net, undo = copy.deepcopy(net), UndoStore()
    paths, _ = dropped(net)
    before = net(x)
    net, after = apply(net, axes, Plan.dropping(axes, paths), undo=undo)
    net, back = apply(net, after, Plan(back=tuple(paths)), undo=undo)
    assert torch.equal(net(x), before)
    assert {axis.key: axis.slots for axis in back.free()} == {axis.key: axis.slots for axis in axes.free()}


def test_what_comes_back_was_cut_with_the_rest(traced):
    net, axes, x = traced
    net, other, undo = copy.deepcopy(net), copy.deepcopy(net), UndoStore()
    paths, _ = dropped(net)
    net, after = apply(net, axes, Plan.dropping(axes, paths), undo=undo)
    keep = {axis.key: range(1, axis.size) for axis in after.free()}
    net, after = apply(net, after, Plan.keeping(after, keep), undo=undo)
    net, back = apply(net, after, Plan(back=tuple(paths)), undo=undo)
    other, straight = apply(other, axes, Plan.keeping(axes, keep))
    assert torch.equal(net(x), other(x))
    assert back.sizes() == straight.sizes()
    restored, _ = apply(net, back, Plan.restoring(back, {key: undo.restorable[key] for key in keep}), undo=undo)
    assert torch.equal(restored(x), traced[0](x))


def test_an_undo_store_holds_each_number_once_however_often_branches_go(traced):
    net, axes, _ = traced
    net, undo = copy.deepcopy(net), UndoStore()
    supernet_config = sum(tensor.numel() for tensor in net.state_dict().values())
    for place in (0, 1, 2, 3):
        paths = [own[place] for own in candidate_paths(net).values()]
        net, axes = apply(net, axes, Plan.dropping(axes, paths), undo=undo)
    keep = {axis.key: range(1, axis.size) for axis in axes.free()}
    net, axes = apply(net, axes, Plan.keeping(axes, keep), undo=undo)
    assert sum(tensor.numel() for tensor in undo.contents().values()) <= supernet_config


def test_one_candidate_stays(traced):
    net, axes, _ = traced
    own = next(iter(candidate_paths(net).values()))
    with pytest.raises(PlanError, match="one of them must stay"):
        apply(copy.deepcopy(net), axes, Plan.dropping(axes, own))


def test_a_name_that_modules_have_themselves_is_refused():
    with pytest.raises(ValueError, match="take another"):
        Candidates({"type": nn.Identity(), "same": nn.Identity()})


def test_a_sum_of_ones_own_is_proved_as_ever():
    class Loud(Candidates):
        def forward(self, *inputs):
            return super().forward(*inputs) + 1

    net = nn.Sequential(nn.Linear(4, 4), Loud({"a": nn.Identity(), "b": nn.ReLU()}), nn.Linear(4, 2))
    assert not trace(net, torch.ones(1, 4)).branches
