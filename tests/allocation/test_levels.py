"""Three levels as vectors: what is masked is what is cut, and the price is what is left."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from regrow import Plan, apply, trace
from regrow.allocation.commits import (
    fit_to_budget,
    least_cost,
    limit_removal,
    protect_cheapest,
    sample_operations,
    select_removed,
)
from regrow.allocation.gates import build_gates
from regrow.allocation.latency import Latency
from regrow.core.amounts import Measure
from regrow.core.candidates import Candidates, candidate_paths
from regrow.evaluation import macs
from regrow.nets import cells, mobile
from regrow.nets.cells import Cells
from regrow.nets.mobile import Mobile
from regrow.surgery.gate import parametrize
from regrow.tracing.branches import find_placeholders
from topology import topology
from zoo import randomise

CONFIGS = {
    Cells: cells.supernet_config((3, 16, 16), 5, width=4, cells=2, nodes=2),
    Mobile: mobile.supernet_config((3, 16, 16), 5, width=4, blocks=2),
}
DESCRIBED = {Cells: cells.describe_result, Mobile: mobile.describe_result}


@pytest.fixture(scope="module", params=[Cells, Mobile])
def traced(request):
    net = randomise(request.param(CONFIGS[request.param])).double()
    example = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return net, trace(net, example), example


def found_in(net, axes, measure=Measure.NONZERO):
    parameters, keys = dict(net.named_parameters()), [axis.key for axis in axes.units()]
    return build_gates(net, axes, parameters, keys, net.required_groups(), lambda path: True, measure), parameters


def drawn_masks(found, parameters, seed):
    """Importances drawn at random against one threshold, so that about a third of each level goes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, generator=generator)  # noqa: E731
    alpha, kappa = draw(len(found.ops)), draw(found.levels.filters)
    flat = found.levels.flat(parameters)
    gone = torch.zeros(len(flat), dtype=torch.bool)
    level = (torch.full((len(found.ops),), 0.4), torch.full((len(found.spans),), 0.4))
    return found.masks((alpha, level[0]), (kappa, level[1]), (flat, gone, torch.full((len(found.ops) + 1,), 0.3)))


@pytest.mark.parametrize("seed", range(3))
def test_masked_is_cut_and_the_price_is_what_is_left(traced, seed):
    net, axes, x = copy.deepcopy(traced[0]), traced[1], traced[2]
    found, parameters = found_in(net, axes)
    masks = drawn_masks(found, parameters, seed)
    assert all(0.2 < float(mask.mean()) < 0.95 for mask in (masks.ops, masks.filters, masks.weights))
    flat = found.levels.flat(parameters)
    stood = found.levels.replace_weights({}, flat, masks.filter_scale.double(), masks.over)
    start = 0
    for path, paths in candidate_paths(net).items():
        stood[f"{path}.scale"] = parameters[f"{path}.scale"] * masks.op_scale[start : start + len(paths)]
        start += len(paths)
    with torch.no_grad(), parametrize(net, stood):
        masked = net(x)
    with torch.no_grad():
        for name, value in stood.items():
            net.get_parameter(name).copy_(value)
    drop, keep = select_removed(found, masks, axes)
    small, after = apply(net, axes, Plan.dropping(axes, drop, keep))
    assert torch.allclose(small(x), masked, rtol=0, atol=1e-10)
    kind = type(net)
    left = kind(DESCRIBED[kind](small, CONFIGS[kind], find_placeholders(small).keys()))
    assert sum(p.numel() for p in left.parameters()) == float(found.levels.size(masks.ops, masks.filters))
    state = {name: value for name, value in small.named_parameters() if not name.endswith("scale")}
    nonzero = sum(int(p.count_nonzero()) for p in state.values()) + sum(map(len, candidate_paths(left).values()))
    # A weight between filters that stand may be 0 by itself; none is here.
    assert nonzero == float(found.levels.size(masks.ops, masks.filters, masks.weights))
    with torch.no_grad():
        assert float(found_in(small, after)[0].levels.size(masks.ops, torch.ones(after_filters(small, after)))) == sum(
            p.numel() for p in left.parameters()
        )


def after_filters(net, axes):
    return found_in(net, axes)[0].levels.filters


def test_multiply_accumulates_are_those_of_the_cut_network(traced):
    net, axes = copy.deepcopy(traced[0]), traced[1]
    found, parameters = found_in(net, axes, Measure.MACS)
    ones = torch.ones(found.levels.filters)
    assert float(found.levels.size(torch.ones(len(found.ops)), ones)) == pytest.approx(macs(axes))
    masks = drawn_masks(found, parameters, 5)
    drop, keep = select_removed(found, masks, axes)
    _, after = apply(net, axes, Plan.dropping(axes, drop, keep))
    assert float(found.levels.size(masks.ops, masks.filters)) == pytest.approx(macs(after))


def test_gradients_are_the_same_every_time_on_several_threads():
    net = randomise(Cells(cells.supernet_config((3, 16, 16), 5, width=16, cells=3, nodes=2)))
    found, parameters = found_in(net, trace(net, torch.randn(2, 3, 16, 16)))
    flat = found.levels.flat(parameters).detach()
    gone, levels = torch.zeros(len(flat), dtype=torch.bool), (len(found.ops), len(found.spans), len(found.ops) + 1)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(n, generator=generator) for n in (len(found.ops), found.levels.filters)]
    given += [torch.full((n,), 0.4) for n in levels]
    for one in given:
        one.requires_grad_()
    a, b, ops, filters, weights = given

    def gradients():
        masks = found.masks((a, ops), (b, filters), (flat, gone, weights))
        total = found.levels.size(masks.ops, masks.filters, masks.weights) / len(flat)
        made = found.levels.flat(found.levels.replace_weights({}, flat, masks.filter_scale, masks.over))
        total = total + made.square().sum()
        return torch.autograd.grad(total, given)

    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        first, *others = (gradients() for _ in range(12))
    finally:
        torch.set_num_threads(threads)
    assert len(flat) > 50_000 and all(bool(one.any()) for one in first)
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def curves_of(net):
    """Invented times: of layers at no and at all entries, of other modules at half and at full width."""
    sums = candidate_paths(net)
    held = {}
    for name, parameter in net.named_parameters():
        if (path := name.rpartition(".")[0]) not in sums:
            held[path] = held.get(path, 0) + parameter.numel()
    layers = {path: ((0.0, 0.1), (float(n), 0.5 + 0.01 * i)) for i, (path, n) in enumerate(held.items())}
    ops = [op for paths in sums.values() for op in paths if op not in held]
    return Latency(layers | {path: ((0.5, 0.2), (1.0, 0.3 + 0.01 * i)) for i, path in enumerate([*ops, *sums, ""])})


def timed_in(net, axes, latency):
    keys = [axis.key for axis in axes.units()]
    parameters, every = dict(net.named_parameters()), net.required_groups()
    return build_gates(net, axes, parameters, keys, every, lambda path: True, Measure.TIME, latency)


def test_the_predicted_time_is_the_measured_one_at_full_width_and_falls_with_every_axis_and_operation(traced):
    net, axes, _ = traced
    latency = curves_of(net)
    found, sums = timed_in(net, axes, latency), candidate_paths(net)
    ops, filters = torch.ones(len(found.ops)), torch.ones(found.levels.filters)
    whole = float(found.levels.size(ops, filters))
    assert whole == pytest.approx(latency.total)
    for base, size, least in found.spans:
        narrow = filters.clone()
        narrow[base + least : base + size] = 0.0
        assert float(found.levels.size(ops, narrow)) < whole
    first, paths = next(iter(sums.items()))
    inside = sum(curve[-1][1] for path, curve in latency.curves.items() if f"{path}.".startswith(f"{paths[0]}."))
    shared = latency.curves[first][-1][1] / len(paths)
    one = ops.index_fill(0, torch.tensor([0]), 0.0)
    assert whole - float(found.levels.size(one, filters)) == pytest.approx(inside + shared)
    assert float(found.prices()[0]) == pytest.approx(inside + shared)
    assert float(found.levels.size(ops, filters, torch.zeros(len(found.levels.reads)))) == whole, "zeros take time, too"


def test_the_predicted_time_of_a_cut_network_is_that_under_its_masks(traced):
    net, axes, _ = traced
    latency = curves_of(net)
    found = timed_in(net, axes, latency)
    masks = drawn_masks(found, dict(net.named_parameters()), 0)
    drop, keep = select_removed(found, masks, axes)
    small, after = apply(copy.deepcopy(net), axes, Plan.dropping(axes, drop, keep))
    left = timed_in(small, after, latency)
    assert bool(drop) and bool(keep)
    size = left.levels.size(left.alive.float(), torch.ones(left.levels.filters))
    assert float(size) == pytest.approx(float(found.levels.size(masks.ops, masks.filters)))


@pytest.mark.parametrize("measure", [Measure.PARAMETERS, Measure.MACS])
def test_a_large_network_is_priced_and_masked_by_tensors_as_a_small_one_is_by_entries(traced, measure, monkeypatch):
    net, axes, _ = traced
    found, parameters = found_in(net, axes, measure)
    results = []
    for most in (2**24, 0):
        monkeypatch.setattr("regrow.allocation.levels.ENTRYWISE", most)
        generator = torch.Generator().manual_seed(0)
        ops, filters = (torch.rand(n, generator=generator).double() for n in (len(found.ops), found.levels.filters))
        masks = [one.requires_grad_() for one in (ops, filters)]
        size = found.levels.size(*masks)
        flat = found.levels.flat(parameters) if found.levels.entrywise else None
        masked = {**parameters, **found.levels.replace_weights(parameters, flat, filters, None)}
        total = size + sum((value**2).sum() for name, value in masked.items() if name in found.levels.weights)
        results.append((size, *torch.autograd.grad(total, masks)))
    assert all(torch.allclose(one, other, rtol=1e-10) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("measure", [Measure.PARAMETERS, Measure.MACS, Measure.BYTES])
def test_large_tensors_are_priced_to_the_unit_as_their_entries_are(traced, measure, monkeypatch):
    net, axes, _ = traced
    found, _ = found_in(net, axes, measure)
    generator, sizes = torch.Generator().manual_seed(0), []
    masks = [(torch.rand(n, generator=generator) > 0.4).float() for n in (len(found.ops), found.levels.filters)]
    for most in (0, 2**24):
        monkeypatch.setattr("regrow.allocation.levels._LARGE", most)
        sizes.append(float(found.levels.size(*masks)))
        assert ("makes" in vars(found.levels)) == (most > 0), "vectors of all entries are made where they are needed"
    assert sizes[0] == sizes[1] > 0


def test_a_needed_operation_and_a_last_filter_stay(traced):
    net, axes, _ = traced
    found, _ = found_in(net, axes)
    low = torch.full((len(found.ops),), -9.0), torch.zeros(len(found.ops)) + 0.5
    masks = found.masks(low, (torch.full((found.levels.filters,), -9.0), torch.zeros(len(found.spans)) + 0.5), None)
    assert all(float(masks.ops[one].sum()) >= 1 for one in found.needed)
    assert all(float(masks.filters[base : base + size].sum()) == min(least, size) for base, size, least in found.spans)


@pytest.mark.parametrize("levels", [(True, True, True), (True, True, False), (True, False, False)])
def test_what_a_target_asks_for_goes_and_no_more(traced, levels):
    net, axes, _ = traced
    found, parameters = found_in(net, axes)
    n, flat = len(found.ops), found.levels.flat(parameters)
    weights = (flat, torch.zeros(len(flat), dtype=torch.bool), torch.zeros(n + 1)) if levels[2] else None
    filters = (torch.randn(found.levels.filters), torch.zeros(len(found.spans))) if levels[1] else None
    masks = found.masks((torch.randn(n), torch.zeros(n)), filters, weights)
    relative = found.levels.relative(flat, torch.ones(len(flat), dtype=torch.bool))
    whole_size = float(found.levels.size(masks.ops, masks.filters))
    mask_o, mask_f, gone = fit_to_budget(found, masks, relative, 0.7 * whole_size)
    left = float(found.levels.size(mask_o, mask_f, (~gone).float()))
    assert left <= 0.7 * whole_size
    if levels[2]:
        assert left > 0.7 * whole_size - 1
    with pytest.raises(ValueError, match="the target 1 "):
        fit_to_budget(found, masks, relative, 1.0)


def test_where_one_operation_of_each_sum_is_left_and_that_is_too_much_it_is_a_cheaper_one(traced):
    """Widths that are not searched do not pay."""
    net, axes, _ = traced
    found, parameters = found_in(net, axes)
    alpha = found.prices() / found.prices().max()  # what is most expensive is most important
    masks = found.masks((alpha, torch.zeros(len(alpha))), None, None)
    target = least_cost(found, ("operations",)) + 10
    left, units, _ = fit_to_budget(found, masks, found.levels.flat(parameters), target)
    assert torch.equal(units, masks.filters) and all(int(left[one].sum()) >= 1 for one in found.needed)
    assert target - 10 <= float(found.levels.size(left, masks.filters)) <= target
    with pytest.raises(ValueError, match="search filters or weights too"):
        fit_to_budget(found, masks, found.levels.flat(parameters), target - 11)


def test_what_is_cheapest_where_a_choice_holds_in_two_places_is_cheapest_in_both():
    """At 16 channels a 1 × 1 convolution has fewer weights than 5 × 5 per channel; at 64, and in both, it has more."""

    def choice(n):
        deep = nn.Conv2d(n, n, 5, padding=2, groups=n, bias=False)
        return Candidates({"deep": deep, "one": nn.Conv2d(n, n, 1, bias=False)}, tied="both")

    net = nn.Sequential(choice(16), nn.Conv2d(16, 64, 1), choice(64))
    axes, sums, parameters = (
        trace(net, torch.randn(2, 16, 8, 8)),
        candidate_paths(net),
        dict(net.named_parameters()),
    )
    keys = [axis.key for axis in axes.units()]
    found = build_gates(net, axes, parameters, keys, [*sums.values()], lambda _: True, Measure.PARAMETERS)
    sizes = []
    for deep in (1.0, 0.0):
        one = torch.tensor([deep, 1 - deep] * 2)
        sizes.append(float(found.levels.size(one, torch.ones(found.levels.filters))))
    assert least_cost(found, ("operations",)) == sizes[0] < sizes[1]
    masks = found.masks((torch.tensor([-9.0, 9.0] * 2), torch.zeros(4)), None, None)
    assert fit_to_budget(found, masks, found.levels.flat(parameters), sizes[0])[0].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_commit_keeps_what_a_target_will_need_and_no_more(traced):
    net, axes, _ = traced
    found, parameters = found_in(net, axes)
    alpha = found.prices() / found.prices().max()
    masks = found.masks((alpha, torch.full_like(alpha, 0.99)), None, None)  # of each sum the most expensive stands
    fewest, most = (least_cost(one, ("operations",)) for one in (found, replace(found, alive=masks.ops > 0)))
    halfway = (fewest + most) / 2
    many = []
    for target in (fewest, halfway, most):
        left = protect_cheapest(found, masks, target, ("operations",))
        assert bool((left.ops >= masks.ops).all())
        there = replace(found, alive=left.ops > 0)
        assert least_cost(there, ("operations",)) <= target
        many.append(int((left.ops - masks.ops).sum()))
        later = there.masks((alpha, torch.full_like(alpha, 0.99)), None, None)
        ops, _, _ = fit_to_budget(there, later, found.levels.flat(parameters), target)
        assert float(found.levels.size(ops, masks.filters)) <= target and bool((left.ops >= ops).all())
        # What stood and could have stayed did.
        assert all(
            float(found.levels.size(ops.index_fill(0, at, 1.0), masks.filters)) > target
            for at in (later.ops > ops).nonzero()
        )
    assert many[0] > many[1] > many[2] == 0


def test_what_comes_back_is_drawn_by_kind_and_cell():
    alive = [f"cells.{c}.nodes.0.ops.{kind}_0" for c in (0, 1) for kind in ("sep3", "skip")]
    dead = [f"cells.{c}.nodes.0.ops.{kind}_1" for c in (0, 1) for kind in ("sep3", "skip")]
    strong = {path: 1.0 if "cells.1" in path and "sep3" in path else 1e-9 for path in alive}
    found = sample_operations(dead, alive, strong, strong, 40, torch.Generator().manual_seed(0))
    assert found == ["cells.1.nodes.0.ops.sep3_1"]  # further draws there are lost
    even = dict.fromkeys(alive, 1.0)
    assert sorted(sample_operations(dead, alive, even, even, 60, torch.Generator().manual_seed(0))) == sorted(dead)


def test_what_is_tied_stands_and_falls_together():
    net = randomise(topology(3, 4))
    axes, sums, parameters = (
        trace(net, torch.randn(2, 3, 8, 8)),
        candidate_paths(net),
        dict(net.named_parameters()),
    )
    keys, needed = [axis.key for axis in axes.units()], [*sums.values()]
    found = build_gates(net, axes, parameters, keys, needed, lambda path: True, Measure.PARAMETERS)
    alpha = torch.randn(len(found.ops), generator=torch.Generator().manual_seed(3)).requires_grad_()
    masks = found.masks((alpha, torch.full_like(alpha, 0.5)), None, None)
    per_cell = masks.ops.detach().view(3, 30)
    assert 5 < int(per_cell[0].sum()) < 25 and bool((per_cell == per_cell[0]).all())
    found.levels.size(masks.ops, masks.filters).backward()
    assert bool((alpha.grad[30:] == 0).all()) and int((alpha.grad[:30] != 0).sum()) > 0  # the first cell decides
    size = float(found.levels.size(masks.ops, masks.filters).detach())
    masks = replace(masks, ops=masks.ops.detach())
    dear = found.masks((found.prices() / 1e4, torch.full_like(alpha, 0.99)), None, None)
    fewest = least_cost(found, ("operations",))
    spares = [masks, limit_removal(found, masks, 1.05 * size), protect_cheapest(found, dear, fewest, ("operations",))]
    assert int(spares[2].ops.sum()) > int(dear.ops.sum())
    flat = found.levels.flat(parameters)
    spares.append(replace(masks, ops=fit_to_budget(found, masks, flat.abs(), 0.8 * size)[0]))
    spares.append(replace(masks, ops=fit_to_budget(found, dear, flat.abs(), fewest)[0]))
    sizes = [float(found.levels.size(one.ops, one.filters).detach()) for one in spares]
    assert sizes[0] <= sizes[1] <= 1.05 * size and sizes[3] <= 0.8 * size and sizes[4] == fewest
    for one in spares:
        assert bool((one.ops.view(3, 30) == one.ops[:30]).all())
        assert all(int(one.ops[own].sum()) >= 1 for own in found.needed)
