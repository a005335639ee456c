"""Undo: what was cut comes back as it was, whatever happened in between."""

import copy
import json
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import laws
from regrow import UndoStore
from regrow.core.axes import AxisGraph, Example
from regrow.core.plan import Change, Plan, PlanError
from regrow.store.errors import StoreError
from regrow.store.ledger import read_plan
from regrow.surgery import apply
from regrow.tracing import trace
from zoo import Wired, trace_zoo

A, B = "0.weight:0", "2.weight:0"


def mlp() -> tuple[nn.Module, AxisGraph]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    return model, trace(model, torch.randn(8, 4))


def stream() -> tuple[nn.Module, AxisGraph]:
    """A residual stream under a root-mean-square norm."""
    torch.manual_seed(0)
    model = Wired(
        lambda m, x: m.out(m.norm((h := m.inp(x)) + m.down(m.up(h).relu()))),
        inp=nn.Linear(4, 7),
        up=nn.Linear(7, 5),
        down=nn.Linear(5, 7),
        norm=nn.RMSNorm(7),
        out=nn.Linear(7, 3),
    )
    return model, trace(model, torch.randn(5, 4))


def shaken(model: nn.Module, seed: int = 0) -> None:
    """Every parameter moves, as in a step of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_a_part_comes_back_with_what_it_held_and_the_rest_stays_as_trained() -> None:
    model, axes = mlp()
    old, undo = copy.deepcopy(model), UndoStore()
    model, axes = apply(model, axes, Plan.keeping(axes, {A: (0, 1, 2, 5)}), undo=undo)
    shaken(model, 1)
    between = copy.deepcopy(model)
    model, axes = apply(model, axes, Plan.keeping(axes, {A: (1, 3)}), undo=undo)
    shaken(model, 2)
    late = copy.deepcopy(model)
    assert undo.restorable == {A: (0, 2, 3, 4)} and axes[A].ids == (1, 5)
    model, axes = apply(model, axes, Plan.restoring(axes, {A: (2, 3)}), undo=undo)
    assert axes[A].ids == (1, 2, 3, 5) and undo.restorable == {A: (0, 4)}
    rows = [late[0].weight[0], between[0].weight[2], old[0].weight[3], late[0].weight[1]]
    assert torch.equal(model[0].weight, torch.stack(rows))
    assert torch.equal(model[0].bias[1:3], torch.stack([between[0].bias[2], old[0].bias[3]]))
    columns = [late[2].weight[:, 0], between[2].weight[:, 2], old[2].weight[:, 3], late[2].weight[:, 1]]
    assert torch.equal(model[2].weight, torch.stack(columns, 1))
    assert torch.equal(model[2].bias, late[2].bias), "what no cut reached keeps its present numbers"


def test_entries_where_two_cut_axes_cross_are_those_of_the_first_cut() -> None:
    """(unit 0 of B, unit 1 of A): A's unit goes first, its entry is not in the tensor that B's cut finds."""
    model, axes = mlp()
    old, undo = copy.deepcopy(model), UndoStore()
    model, axes = apply(model, axes, Plan.keeping(axes, {A: (0, 2, 3, 4, 5)}), undo=undo)
    shaken(model)
    trained = copy.deepcopy(model)
    model, axes = apply(model, axes, Plan.keeping(axes, {B: (1, 2, 3, 4)}), undo=undo)
    for first, second in ((A, B), (B, A)):
        again, left, store = copy.deepcopy(model), axes, copy.deepcopy(undo)
        again, left = apply(again, left, Plan.restoring(left, {first: undo.restorable[first]}), undo=store)
        again, left = apply(again, left, Plan.restoring(left, {second: undo.restorable[second]}), undo=store)
        assert torch.equal(again[2].weight[:, 1], old[2].weight[:, 1])
        assert torch.equal(again[2].weight[:, [0, 2, 3, 4, 5]], trained[2].weight)


@pytest.mark.parametrize("store", [True, False], ids=["with the store", "without it"])
@pytest.mark.parametrize("what", ["means", "width"])
def test_a_plan_that_rewrites_what_stays_ends_what_can_be_restored(what: str, store: bool) -> None:
    """One that adds means to a bias, or changes the size under a norm: weights stored before would not fit."""
    model, axes = stream()
    width, inner = (next(axis.key for axis in axes.free() if axis.size == n) for n in (7, 5))
    undo = UndoStore()
    model, axes = apply(model, axes, Plan.keeping(axes, {inner: range(4)}), undo=undo)
    if what == "means":
        plan = Plan.keeping(axes, {inner: range(3)}, means={"down.weight": {3: 0.5}})
    else:
        plan = Plan.keeping(axes, {width: range(5)})
    plain, _ = apply(copy.deepcopy(model), axes, plan)
    model, left = apply(model, axes, plan, undo=undo if store else None)
    laws.same_network(model, plain)
    assert bool(undo.restorable) is not store
    with laws.untouched(model), pytest.raises(PlanError, match="rewrote"):
        apply(model, left, Plan.restoring(left, {inner: (4,)}), undo=undo)
    if store:
        before = copy.deepcopy(model)
        model, left = apply(model, left, Plan.keeping(left, {inner: range(2)}), undo=undo)
        model, left = apply(model, left, Plan.restoring(left, undo.restorable), undo=undo)
        laws.same_network(model, before)


@pytest.mark.parametrize("name", ["mlp", "conv_residual", "flatten", "concat", "llama", "chunk_gate"])
def test_units_born_meanwhile_are_not_heard_by_those_restored(name: str) -> None:
    """Cut, grow, restore: the function of the network that only grew, whose new units are silent."""
    model, axes = trace_zoo(name)
    double, undo = laws.in_double(model), UndoStore()
    left = replace(axes, example=Example(*laws.in_double((axes.example.args, dict(axes.example.kwargs)))))
    cut = laws.random_plan(left, torch.Generator().manual_seed(5), floor=2, marks=laws.UNFOLDED)
    net, left = apply(copy.deepcopy(double), left, cut, undo=undo)
    wider = laws.joint_growing_plan(left, "zero_out")
    wider = Plan({key: change for key, change in wider.changes.items() if left[key].mark in laws.UNFOLDED})
    net, left = apply(net, left, wider, undo=undo)
    born = {axis.key: axis.next_id for axis in left}
    net, left = apply(net, left, Plan.restoring(left, undo.restorable), undo=undo)
    assert laws.gap(laws.outputs(net, axes), laws.outputs(double, axes)) <= laws.EXACT
    for axis in left:
        assert list(axis.ids) == sorted(set(axis.ids)) and axis.next_id == born[axis.key]
    assert any(axis.size > axes[axis.key].size for axis in left)


def test_a_restored_head_learns_to_use_a_size_born_without_it() -> None:
    """Head 2 was gone when heads became larger: its new entries are as in new units, not 0 on both sides."""
    torch.manual_seed(0)

    def wire(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.o((m.v(x).unflatten(-1, (m.num_heads, -1)) * m.s).relu().flatten(-2))

    model = Wired(wire, v=nn.Linear(3, 20), o=nn.Linear(20, 2))
    model.s, model.num_heads = nn.Parameter(torch.rand(4, 5) + 0.5), 4
    axes = trace(model, torch.randn(6, 3))
    heads, size = (next(axis for axis in axes.free() if axis.size == n) for n in (4, 5))
    undo = UndoStore()
    model, left = apply(model, axes, Plan.keeping(axes, {heads.key: (0, 1, 3)}), undo=undo)
    model, left = apply(model, left, Plan.growing(left, {size.key: 1}), undo=undo)
    model, left = apply(model, left, Plan.restoring(left, {heads.key: (2,)}), undo=undo)
    model(torch.randn(50, 3)).sum().backward()
    assert model.o.weight.grad.view(2, 4, 6)[:, 2, 5].any()


def entries(model: nn.Module, axes: AxisGraph) -> dict[tuple, float]:
    """Every number by the tensor and the births along its dimensions, read from the slots alone."""
    found = {}
    for name, tensor in laws.tensors(model).items():
        births: list[list[Any]] = [list(range(n)) for n in tensor.shape]
        for axis in axes.free():
            for slot in axis.slots:
                if slot.name == name:
                    for unit, own in zip(axis.ids, slot.positions(axis.size).tolist(), strict=True):
                        for nth, at in enumerate(own):
                            births[slot.dim][at] = (axis.key, unit, nth)
        for at, value in zip(product(*births), tensor.flatten().tolist(), strict=True):
            found[name, *at] = value
    return found


@pytest.mark.parametrize("name", ["mlp", "flatten", "conv_residual", "glu"])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_cutting_growing_training_and_restoring(name: str, seed: int) -> None:
    """Restored entries are what they last were, all others what they are: as a book of all entries has it."""
    model, axes = trace_zoo(name)
    model, generator, undo = copy.deepcopy(model), torch.Generator().manual_seed(seed), UndoStore()
    book: dict[tuple, float] = {}
    moves = []
    for _ in range(10):
        shaken(model, int(torch.randint(99, (), generator=generator)))
        book |= entries(model, axes)
        free = [axis for axis in axes.free() if not axis.count]
        axis = free[int(torch.randint(len(free), (), generator=generator))]
        move = int(torch.randint(3, (), generator=generator))
        if move == 0 and axis.size > 1:
            plan = laws.random_plan(axes, generator, keys=(axis.key,))
        elif move == 1 and not axis.narrow:
            plan = Plan.growing(axes, {axis.key: 1})
        elif undo.restorable:
            some = {key: ids[: 1 + len(ids) // 2] for key, ids in undo.restorable.items()}
            plan, move = Plan.restoring(axes, some), 2
        else:
            continue
        model, axes = apply(model, axes, plan, undo=undo)
        moves.append(move)
        cuts = any(change.dropped for change in plan.changes.values())
        now = entries(model, axes)
        known = now.keys() & book.keys()
        assert {at: now[at] for at in known} == {at: book[at] for at in known}, moves
        assert len(known) == len(now) or not cuts
    assert len(set(moves)) > 1


@pytest.mark.parametrize("make", [lambda p: torch.optim.Adam(p), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_restored_entries_start_without_drift(make: Any) -> None:
    model, axes = mlp()
    undo, optimizer = UndoStore(), make(model.parameters())
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    model, axes = apply(model, axes, Plan.keeping(axes, {A: (0, 1, 3, 5)}), undo=undo, optimizers=[optimizer])
    memory = {what: value.clone() for what, value in optimizer.state[model[0].weight].items() if value.dim()}
    model, axes = apply(model, axes, Plan.restoring(axes, {A: (2, 4)}), undo=undo, optimizers=[optimizer])
    for what, old in memory.items():
        now = optimizer.state[model[0].weight][what]
        assert torch.equal(now[[0, 1, 3, 5]], old)
        first = what in ("exp_avg", "momentum_buffer")
        assert torch.allclose(now[[2, 4]], torch.zeros(2, 4) if first else old.mean(0).expand(2, 4))
    optimizer.step()


def test_the_function_survives_a_plan_that_swaps_units() -> None:
    model, axes = mlp()
    old, undo = copy.deepcopy(model), UndoStore()
    model, axes = apply(model, axes, Plan.keeping(axes, {A: (0, 1, 2)}), undo=undo)
    swap = replace(Plan.restoring(axes, {A: (5,)}).changes[A], keep=(0, 2))
    model, axes = apply(model, axes, Plan({A: swap}), undo=undo)
    straight, _ = apply(old, trace(old, torch.randn(8, 4)), Plan.keeping(trace(old, torch.randn(8, 4)), {A: (0, 2, 5)}))
    laws.same_network(model, straight)
    assert undo.restorable == {A: (1, 3, 4)}


def test_a_plan_that_restores_survives_json() -> None:
    model, axes = mlp()
    _, axes = apply(model, axes, Plan.keeping(axes, {A: (0, 2)}))
    plan = Plan.restoring(axes, {A: (5, 1)})
    assert plan.changes[A].restore == (1, 5) and plan.sizes(axes)[A] == 4
    assert read_plan(json.loads(plan.to_json())) == plan
    lacking, bad = json.loads(plan.to_json()), json.loads(plan.to_json())
    del lacking["changes"][A]["restore"]
    bad["changes"][A]["restore"] = [1.5]
    for data in (lacking, bad):
        with pytest.raises(StoreError, match="restore"):
            read_plan(data)


def test_what_cannot_be_restored_is_refused_by_name_and_nothing_changes() -> None:
    model, axes = mlp()
    undo = UndoStore()
    model, axes = apply(model, axes, Plan.keeping(axes, {A: (0, 1, 2, 3)}), undo=undo)
    with pytest.raises(PlanError, match="unit 3 is alive; only units that were cut"):
        Plan.restoring(axes, {A: (3,)})
    with pytest.raises(PlanError, match="no unit 9 ever existed; its units are numbered from 0 to 5"):
        Plan.restoring(axes, {A: (9,)})
    with pytest.raises(PlanError, match="each once"):
        Plan({A: Change(4, (0, 1, 2, 3), axes[A].slots, axes[A].ids, restore=(5, 4))})
    with pytest.raises(PlanError, match=r"no axis 'x'"):
        Plan.restoring(axes, {"x": (1,)})
    plan = Plan.restoring(axes, {A: (4,)})
    with laws.untouched(model), pytest.raises(PlanError, match=r"in no undo store; give the one .*Plan\.growing"):
        apply(model, axes, plan)
    with pytest.raises(PlanError, match="make two"):
        Plan({**plan.changes, **Plan.growing(axes, {B: 2}).changes}).check(axes)
    stranger = UndoStore()
    with laws.untouched(model), pytest.raises(PlanError, match="unit 4 is not in the undo store"):
        apply(model, axes, plan, undo=stranger)
    model, axes = apply(model, axes, Plan.keeping(axes, {A: (0, 1, 2)}))
    before = copy.deepcopy(undo)
    with (
        laws.untouched(model),
        pytest.raises(PlanError, match="unit 3 is not in the undo store, it was cut without it"),
    ):
        apply(model, axes, Plan.restoring(axes, {A: (3, 5)}), undo=undo)
    assert undo.restorable == before.restorable and undo.contents().keys() == before.contents().keys()
    again = trace(model, torch.randn(8, 4))
    with pytest.raises(PlanError, match=r"of this one before it was traced anew"):
        apply(model, again, Plan.keeping(again, {A: (0, 1)}), undo=undo)
    with pytest.raises(PlanError, match=r"numbers the units of axis .* otherwise"):
        apply(model, again, Plan.keeping(again, {A: (0, 1)}), undo=replace(undo, network=""))


@pytest.mark.parametrize("restored", [True, False])
def test_the_undo_store_of_another_network_is_refused(restored: bool) -> None:
    """Two of one form that were cut alike; whether it would be read or written to."""
    (one, axes), (other, others) = mlp(), mlp()
    undo, own = UndoStore(), UndoStore()
    one, axes = apply(one, axes, Plan.keeping(axes, {A: (0, 1, 2)}), undo=undo)
    other, others = apply(other, others, Plan.keeping(others, {A: (0, 1, 2)}), undo=own)
    plan = Plan.restoring(others, undo.restorable) if restored else Plan.keeping(others, {B: (0, 1)})
    with laws.untouched(other), pytest.raises(PlanError, match="cut out of another network") as caught:
        apply(other, others, plan, undo=undo)
    assert "\n" not in str(caught.value)
    shaken(other)
    other, others = apply(other, others, plan, undo=own)
    apply(one, axes, Plan.restoring(axes, undo.restorable), undo=undo)


def test_a_network_may_be_cast_in_between() -> None:
    model, axes = mlp()
    undo = UndoStore()
    model, axes = apply(model, axes, laws.random_plan(axes, torch.Generator().manual_seed(1)), undo=undo)
    model, axes = apply(model.to(torch.bfloat16), axes, Plan.restoring(axes, undo.restorable), undo=undo)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
