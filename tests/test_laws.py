"""Every law on every network of the zoo; and the referees themselves, on nets cut by hand."""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import laws
from regrow.core.axes import Axis, AxisGraph, Example, Mark, Role, Slot, size_of
from regrow.core.change import FILLS
from regrow.core.plan import Plan, PlanError
from zoo import ZOO, Hoped, Net, Wired, lying_at, randomise, trace_zoo

SEEDS = int(os.environ.get("REGROW_SEEDS", "1"))
"""Random plans per network; ``make test-all`` takes three."""
SILENT = {Mark.NEUTRAL, Mark.FOLDED}
"""The marks for which a zero stands for a missing unit."""


def some(net: Net, axes: AxisGraph, most: int = 3) -> list[Axis]:
    """One axis of each kind; a handful of them, evenly spread, where there are very many."""
    kinds = list(laws.classes(axes))
    return kinds if not net.heavy else kinds[:: -(-len(kinds) // most) or 1]


def joint(axes: AxisGraph, seed: int, marks: set[Mark]) -> Plan:
    """A random plan over all axes with the marks, that keeps something of each."""
    return laws.random_plan(axes, torch.Generator().manual_seed(seed), marks=marks)


def holds(law: Callable[[], None], net: Net) -> None:
    """Assert a law; a network whose Python looks at sizes may refuse the plan instead."""
    try:
        law()
    except PlanError:
        if not net.branches:
            raise


@dataclass(frozen=True)
class Law:
    """Something that holds of every network, or of those that ``covers`` says."""

    check: Callable[[Net, nn.Module, AxisGraph], None]
    covers: Callable[[Net], bool] = lambda net: True


def seeds(net: Net, most: int = SEEDS) -> range:
    """Seeds for random plans; one where a plan takes seconds."""
    return range(1 if net.heavy else most)


def facts_hold(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Widths, marks, ties, reasons and notes are what the network's structure says."""
    missed = [fact.missed(axes) for fact in net.expect if not isinstance(fact, Hoped)]
    assert not any(missed), [line for line in missed if line]


def axes_agree_with_the_tensors(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Shapes multiply out, slots stay inside their tensors and do not overlap, and frozen axes say why."""
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    sizes = axes.sizes()
    for tensor, dims in axes.shapes.items():
        assert tuple(state[tensor].shape) == tuple(size_of(dim, sizes) for dim in dims), tensor
    for axis in axes:
        assert bool(axis.reason) or axis.free, f"{axis.key} is frozen and does not say why"
        for slot in axis.slots:
            positions = slot.positions(axis.size).flatten()
            assert len(set(positions.tolist())) == len(positions), (axis.key, slot)
            assert 0 <= int(positions.min()) <= int(positions.max()) < state[slot.name].shape[slot.dim], (
                axis.key,
                slot,
            )
        if axis.free:
            roles = {slot.role for slot in axis.slots}
            assert Role.PRODUCES in roles, f"nothing makes the units of {axis.key}"


# --- each axis alone ------------------------------------------------------------------------------------------------


def an_axis_cut_alone_is_the_net_with_zeros(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Shrunk = zeros written into the uncut weights, for one axis of each kind."""
    for axis in some(net, axes):
        if axis.mark in SILENT:
            plan = laws.plan_for(axes, axis)
            if all(axes[key].mark in SILENT for key in plan.changes):
                holds(lambda p=plan: laws.zeroed_equals_shrunk(model, axes, p, net.zeros), net)


def units_have_no_order(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Renaming the units of an axis in all its slots leaves the function alone, for one axis of each kind."""
    for axis in some(net, axes):
        laws.permuting_units_keeps_function(model, axes, axis)


def verify_agrees_on_an_axis_cut_alone(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """``verify`` finds masked = shrunk for one axis of each kind for which no zero stands, and for one other."""
    kinds = some(net, axes)
    silent = [axis for axis in kinds if axis.mark in SILENT]
    for axis in (*silent[-1:], *(axis for axis in kinds if axis.mark not in SILENT)):
        plan = laws.plan_for(axes, axis)
        holds(lambda p=plan: laws.masked_equals_shrunk(model, axes, p), net)


# --- many axes at once ----------------------------------------------------------------------------------------------


def a_joint_plan_is_the_net_with_zeros(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Shrunk = zeros written into the uncut weights, all axes for which a zero stands at once."""
    for seed in seeds(net):
        plan = joint(axes, seed, SILENT)
        holds(lambda p=plan: laws.zeroed_equals_shrunk(model, axes, p, net.zeros), net)


def verify_agrees_on_a_joint_plan(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """``verify`` finds masked = shrunk for all free axes at once."""
    for seed in seeds(net, min(SEEDS, 2)):
        plan = joint(axes, seed, set(Mark) - {Mark.FROZEN})
        holds(lambda p=plan: laws.masked_equals_shrunk(model, axes, p), net)


def the_smallest_net_runs(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """As little as can be left of every axis at once still runs, has the planned shapes, and keeps its ties."""
    plan = laws.smallest_plan(axes)
    holds(lambda: laws.runs_with_its_ties(model, axes, plan), net)


def cuts_are_felt(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """A law on a cut that changes nothing proves nothing: cutting every axis to its smallest changes the answer."""
    silent = [axis for axis in axes.free() if axis.mark in SILENT and axis.size > 1]
    if not silent:
        assert all(axis.reason for axis in axes if not axis.free)
        return
    double = laws.in_double(model)
    plan = laws.smallest_plan(axes, SILENT)
    zeroed = laws.outputs(laws.zeroed(double, axes, plan, net.zeros), axes)
    assert laws.gap(laws.outputs(double, axes), zeroed) > 1e-4


def a_cut_of_a_cut_is_one_cut(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """The axes that a cut returns describe the cut network: cutting on gives what one cut would have given."""
    generator = torch.Generator().manual_seed(1)
    first = laws.random_plan(axes, generator)
    double = laws.in_double(model)
    half, left = laws.shrunk(double, axes, first)
    second = laws.random_plan(left, generator)
    whole = {key: change.keep for key, change in first.changes.items()}
    whole |= {key: tuple(first.changes[key].keep[i] for i in change.keep) for key, change in second.changes.items()}
    at_once, axes_at_once = laws.shrunk(double, axes, Plan.keeping(axes, whole))
    in_steps, axes_in_steps = laws.shrunk(half, left, second)
    assert laws.gap(laws.outputs(in_steps, axes), laws.outputs(at_once, axes)) <= laws.EXACT
    assert {a.key: a.ids for a in axes_in_steps} == {a.key: a.ids for a in axes_at_once}


# --- the other way ---------------------------------------------------------------------------------------------------


def widening_one_axis_keeps_the_function(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Widened = original, for one axis of each kind, by one fill after the other."""
    for axis, rule in zip(some(net, axes), cycle(FILLS), strict=False):
        if (plan := laws.growing_plan(axes, axis, rule) or laws.growing_plan(axes, axis, "zero_out")) is not None:
            holds(lambda p=plan: laws.widening_keeps_function(model, axes, p), net)


def widening_all_axes_at_once_keeps_the_function(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Every axis that can be widened, at once; and the axes that growing returns are those of a new trace."""
    plan = laws.joint_growing_plan(axes, "zero_out")
    laws.widening_keeps_function(model, axes, plan, alive=not net.heavy)
    if not net.heavy:
        laws.axes_after_a_cut_are_those_of_a_new_trace(model, axes, plan)


def what_is_cut_and_grown_at_once_is_what_is_cut(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """``verify`` finds masked = cut and widened, where one plan does both."""
    cut = laws.random_plan(axes, torch.Generator().manual_seed(3), marks={Mark.NEUTRAL, Mark.FOLDED})
    grown = laws.joint_growing_plan(axes, "zero_out")
    both = {
        key: replace(change, keep=cut.changes[key].keep) for key, change in grown.changes.items() if key in cut.changes
    }
    laws.masked_equals_shrunk(model, axes, Plan({**cut.changes, **grown.changes, **both}))


FITTED = "mlp depthwise concat flatten grouped transposed attention glu chunk_gate rmsnorm_block tied gpt2 llama gemma3"
"""One network of each build: how new units are made, and what lies between that and what reads them."""


def fitting_new_units_keeps_the_function(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Fitted on data, nothing has changed in what the network answers: not one bit."""
    laws.fitting_keeps_function(model, axes, laws.joint_growing_plan(axes, "zero_out"))


def axes_after_a_cut_are_those_of_a_new_trace(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Slots follow a cut, blocks at the front gone or not."""
    plan = laws.random_plan(axes, torch.Generator().manual_seed(2), floor=2)
    laws.axes_after_a_cut_are_those_of_a_new_trace(model, axes, plan)


# --- and back ---------------------------------------------------------------------------------------------------------


def restored_is_what_was_cut(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """Cut all axes at once, then again, then restore: the old network, bit for bit."""
    generator = torch.Generator().manual_seed(4)
    cuts = [lambda left: laws.random_plan(left, generator, marks=laws.UNFOLDED)] * (1 if net.heavy else 2)
    laws.restored_is_what_was_cut(model, axes, cuts)


def an_illegal_plan_changes_nothing(net: Net, model: nn.Module, axes: AxisGraph) -> None:
    """An illegal plan is refused with words and leaves every tensor and attribute as it was."""
    if [axis for axis in axes.free() if axis.size > 1]:
        laws.all_or_nothing(model, axes)
        return
    frozen = next(axis for axis in axes if axis.size > 1)
    with pytest.raises(PlanError, match="frozen"):
        Plan.keeping(axes, {frozen.key: (0,)})


# --- every law on every network ---------------------------------------------------------------------------------------


def _light(net: Net) -> bool:
    return not net.heavy


def _unbranched(net: Net) -> bool:
    return not net.heavy and not net.branches


# A network with a relative has a small one of the same build, which obeys the costly laws for it.
LAWS = (
    Law(facts_hold),
    Law(axes_agree_with_the_tensors),
    Law(an_axis_cut_alone_is_the_net_with_zeros, lambda net: not net.relative and net.zeros != "nowhere"),
    Law(units_have_no_order),
    Law(verify_agrees_on_an_axis_cut_alone, _light),
    Law(a_joint_plan_is_the_net_with_zeros, lambda net: net.zeros != "nowhere"),
    Law(verify_agrees_on_a_joint_plan),
    Law(the_smallest_net_runs),
    Law(cuts_are_felt, lambda net: net.zeros != "nowhere" and net.name != "size_branch"),
    Law(a_cut_of_a_cut_is_one_cut, _unbranched),
    Law(widening_one_axis_keeps_the_function, _light),
    Law(widening_all_axes_at_once_keeps_the_function, lambda net: not net.relative and not net.branches),
    Law(what_is_cut_and_grown_at_once_is_what_is_cut, _unbranched),
    Law(fitting_new_units_keeps_the_function, lambda net: net.name in FITTED.split() and not net.heavy),
    Law(axes_after_a_cut_are_those_of_a_new_trace, _unbranched),
    Law(restored_is_what_was_cut, lambda net: not net.relative and not net.branches),
    Law(an_illegal_plan_changes_nothing, _unbranched),
)


@pytest.mark.parametrize("name", ZOO)
def test_every_law_holds(name: str) -> None:
    """All laws on one trace of a network; the error names each that does not hold."""
    net, (model, axes) = ZOO[name], trace_zoo(name)
    broken: list[Exception] = []
    for law in LAWS:
        if law.covers(net):
            torch.manual_seed(0)
            try:
                law.check(net, model, axes)
            except Exception as error:
                error.add_note(f"law: {law.check.__name__}, network: {name}")
                broken.append(error)
    if broken:
        raise ExceptionGroup(", ".join(error.__notes__[-1] for error in broken), broken)


def test_unreached_heads_still_run_after_a_cut() -> None:
    """What the example did not reach is not broken by a cut: in training mode the auxiliary heads run."""
    model, axes = trace_zoo("googlenet")
    small, _ = laws.shrunk(model, axes, joint(axes, 0, set(Mark) - {Mark.FROZEN}))
    logits, second, first = small.train()(*axes.example.args)
    assert logits.shape == second.shape == first.shape == (2, 7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("name", ["mlp", "concat", "llama"])
def test_a_network_is_cut_in_another_precision_than_it_was_traced_in(name: str, dtype: torch.dtype) -> None:
    """Axes do not depend on the precision, and a cut does not change it."""
    from regrow.surgery import apply

    model, axes = trace_zoo(name)
    small, _ = apply(deepcopy(model).to(dtype), axes, joint(axes, 0, SILENT))
    assert {tensor.dtype for tensor in small.parameters()} == {dtype}


# --- ties, illegal plans, seeds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["size_branch"])
def test_a_plan_that_changes_what_python_does_is_refused_whole(name: str) -> None:
    """A branch on a size cannot be seen in one recording: cutting past it is refused, and nothing has changed."""
    model, axes = trace_zoo(name)
    axis = next(axis for axis in lying_at(axes, "stem.weight:0") if axis.size == 8)
    plan = Plan.keeping(axes, {axis.key: range(4)}) if axis.free else None
    if plan is None:
        assert axis.reason
        return
    with laws.untouched(model), pytest.raises(PlanError):
        from regrow.surgery import apply

        apply(model, axes, plan)


@pytest.mark.parametrize("name", ["mlp", "chunk_apart", "llama", "resnet18"])
def test_same_seed_same_plan(name: str) -> None:
    """A seed decides a random plan."""
    _, axes = trace_zoo(name)
    laws.same_seed_same_plan(lambda seed: laws.random_plan(axes, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", ["mlp", "conv_residual", "flatten", "llama", "chunk_gate"])
def test_permuting_units_permutes_the_plan(name: str) -> None:
    """A plan by size of weights keeps the same units, wherever they lie."""
    model, axes = trace_zoo(name)

    def largest(network: nn.Module) -> Plan:
        state = laws.tensors(network)
        keep = {}
        for axis in axes.free():
            if axis.mark is Mark.NEUTRAL and not axis.inside:
                score = torch.zeros(axis.size, dtype=torch.float64)
                for slot in axis.slots:
                    part = state[slot.name].double().abs().movedim(slot.dim, 0)
                    part = part.reshape(len(part), -1).sum(1)
                    score += part[slot.positions(axis.size)].sum(1)
                keep[axis.key] = score.topk(-(-axis.size // 2)).indices.tolist()
        return Plan.keeping(axes, keep)

    laws.permuting_units_permutes_plan(model, axes, largest)


# --- masked by hand: axes for which no zero stands ------------------------------------------------------------------


def _last(m: Any, x: Tensor, keep: Tensor) -> Tensor:
    """The rest of a net that fools, on the kept channels alone."""
    return m.head(F.conv2d(x[:, keep], m.last.weight[:, keep], m.last.bias, padding=1).relu().mean((2, 3)))


def _by_hand_softmax_gate(m: Any, x: Tensor, keep: Tensor) -> Tensor:
    x = m.norm(m.stem(x))
    seen = torch.zeros_like(x).index_copy(1, keep, x[:, keep])
    scores = torch.full((len(x), 8), -torch.inf, dtype=x.dtype).index_copy(1, keep, m.gate(seen.mean((2, 3)))[:, keep])
    return _last(m, x * scores.softmax(1)[:, :, None, None], keep)


def _by_hand_softmax(function: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def run(m: Any, x: Tensor, keep: Tensor) -> Tensor:
        return F.linear(function(m.mix(x)[:, keep]), m.out.weight[:, keep], m.out.bias)

    return run


def _by_hand(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor, Tensor], Tensor]:
    def run(m: Any, x: Tensor, keep: Tensor) -> Tensor:
        x = m.norm(m.stem(x))
        return _last(m, function(x, x[:, keep]), keep)

    return run


def _by_hand_layer_norm(m: Any, x: Tensor, keep: Tensor) -> Tensor:
    stream = m.stem(x)[..., keep]
    normed = F.layer_norm(stream, (len(keep),), m.norm.weight[keep], m.norm.bias[keep])
    hidden = F.gelu(F.linear(normed, m.fc1.weight[:, keep], m.fc1.bias))
    stream = stream + F.linear(hidden, m.fc2.weight[keep], m.fc2.bias[keep])
    return F.linear(stream, m.head.weight[:, keep], m.head.bias)


def _by_hand_group_norm_one(m: Any, x: Tensor, keep: Tensor) -> Tensor:
    kept = F.group_norm(m.norm(m.stem(x))[:, keep], 1, m.group.weight[keep], m.group.bias[keep]).relu()
    return _last(m, torch.zeros(len(x), 8, *kept.shape[2:], dtype=x.dtype).index_copy(1, keep, kept), keep)


def _by_hand_group_norm(m: Any, x: Tensor, keep: Tensor) -> Tensor:
    every = (torch.arange(3)[:, None] * 4 + keep).flatten()
    kept = F.group_norm(m.norm(m.stem(x))[:, every], 3, m.group.weight[every], m.group.bias[every]).relu()
    return _last(m, torch.zeros(len(x), 12, *kept.shape[2:], dtype=x.dtype).index_copy(1, every, kept), every)


def _by_hand_mean(values: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, kept: x - values(kept).sum(1, keepdim=True) / x.shape[1]


def _by_hand_cbam(m: Any, x: Tensor, keep: Tensor) -> Tensor:
    x = m.norm(m.stem(x))
    kept = x[:, keep]
    seen = torch.cat([kept.sum(1, keepdim=True) / x.shape[1], kept.amax(1, keepdim=True)], 1)
    return _last(m, x * m.look(seen).sigmoid(), keep)


BY_HAND: dict[str, tuple[str, int, Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "softmax_gate": ("stem.weight:0", 8, _by_hand_softmax_gate),
    "softmax_classes": ("mix.weight:0", 9, _by_hand_softmax(lambda x: x.softmax(1))),
    "log_softmax": ("mix.weight:0", 9, _by_hand_softmax(lambda x: x.log_softmax(1))),
    "softmax_twice": ("mix.weight:0", 9, _by_hand_softmax(lambda x: (2 * x.softmax(1) + 1).softmax(1))),
    "maximum": ("stem.weight:0", 8, _by_hand(lambda x, kept: x - kept.amax(1, keepdim=True))),
    "minimum": ("stem.weight:0", 8, _by_hand(lambda x, kept: x - kept.amin(1, keepdim=True))),
    "log_sum": ("stem.weight:0", 8, _by_hand(lambda x, kept: x - kept.logsumexp(1, keepdim=True))),
    "mean_over_channels": ("stem.weight:0", 8, _by_hand(_by_hand_mean(lambda x: x))),
    "mean_of_sigmoid": ("stem.weight:0", 8, _by_hand(_by_hand_mean(torch.sigmoid))),
    "size_constant": ("stem.weight:0", 8, _by_hand(lambda x, kept: x / 8**0.5)),
    "unit_length": ("stem.weight:0", 8, _by_hand(lambda x, kept: x / kept.norm(dim=1, keepdim=True))),
    "cbam": ("stem.weight:0", 8, _by_hand_cbam),
    "layernorm_block": ("stem.weight:0", 9, _by_hand_layer_norm),
    "group_norm_one": ("stem.weight:0", 8, _by_hand_group_norm_one),
    "group_norm": ("stem.weight:0", 4, _by_hand_group_norm),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_axes_masked_by_hand(name: str) -> None:
    """Where a zero is not the neutral element, the masked network is written down here; or the axis is frozen."""
    model, axes = trace_zoo(name)
    place, size, masked = BY_HAND[name]
    free = [axis for axis in lying_at(axes, place) if axis.free and axis.size == size]
    if not free:
        assert all(axis.reason for axis in lying_at(axes, place))
        return
    for units in ((0, 2, 3), (1,), tuple(range(1, size))):
        plan = Plan.keeping(axes, {free[0].key: units})
        double = laws.in_double(model)
        with torch.no_grad():
            expected = masked(double, laws.in_double(axes.example.args[0]), torch.tensor(units))
        found = laws.outputs(laws.shrunk(double, axes, plan)[0], axes)
        assert laws.gap(found, [expected]) <= laws.EXACT


# --- the referees themselves ----------------------------------------------------------------------------------------


def _chain(between: Callable[[Tensor], Tensor]) -> tuple[nn.Module, AxisGraph]:
    """Two layers with something in between, and an axis written by hand."""
    model = randomise(Wired(lambda m, x: m.two(between(m.one(x))), one=nn.Linear(4, 6), two=nn.Linear(6, 3)))
    slots = (
        Slot("one.weight", 0, 1, 1, 1, 0, Role.PRODUCES),
        Slot("one.bias", 0, 1, 1, 1, 0, Role.SCALES),
        Slot("two.weight", 1, 1, 1, 1, 0, Role.CONSUMES),
    )
    axis = Axis("one.weight:0", 6, slots)
    shapes = {"one.weight": (axis.key, 4), "one.bias": (axis.key,), "two.weight": (3, axis.key), "two.bias": (3,)}
    example = Example((torch.randn(5, 4, generator=torch.Generator().manual_seed(2)),))
    return model, AxisGraph({axis.key: axis}, shapes, frozenset(shapes), example=example)


def _cut(model: nn.Module, keep: list[int]) -> nn.Module:
    """The cut, by hand."""
    cut = laws.in_double(model)
    cut.one.weight, cut.one.bias = (nn.Parameter(p[keep]) for p in (cut.one.weight, cut.one.bias))
    cut.two.weight = nn.Parameter(cut.two.weight[:, keep])
    return cut


@pytest.mark.parametrize("between", [torch.sigmoid, torch.relu, torch.cos], ids=["sigmoid", "relu", "cos"])
def test_zeros_agree_with_a_cut_by_hand(between: Callable[[Tensor], Tensor]) -> None:
    """The referee passes what is right, whatever a function makes of 0, and feels the cut."""
    model, axes = _chain(between)
    masked = laws.outputs(laws.zeroed(laws.in_double(model), axes, Plan.keeping(axes, {"one.weight:0": (1, 4)})), axes)
    assert laws.gap(laws.outputs(_cut(model, [1, 4]), axes), masked) <= 1e-15
    assert laws.gap(laws.outputs(_cut(model, [1, 3]), axes), masked) > 1e-3
    assert laws.gap(laws.outputs(laws.in_double(model), axes), masked) > 1e-3


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(1).values,
    "norm": lambda x: F.layer_norm(x, x.shape[1:]),
}


@pytest.mark.parametrize("name", WRONG)
def test_zeros_disagree_with_a_wrong_cut(name: str) -> None:
    """The referee catches each of the classical wrong cuts that run without a complaint."""
    model, axes = _chain(WRONG[name])
    masked = laws.outputs(laws.zeroed(laws.in_double(model), axes, Plan.keeping(axes, {"one.weight:0": (1, 4)})), axes)
    assert laws.gap(laws.outputs(_cut(model, [1, 4]), axes), masked) > 1e-3


def test_renaming_units_catches_what_has_an_order() -> None:
    """Renaming passes a sum and a softmax, and catches a cumulative sum, a roll and a flip."""
    for between in (torch.sigmoid, lambda x: x.softmax(1)):
        model, axes = _chain(between)
        laws.permuting_units_keeps_function(model, axes, axes["one.weight:0"])
    for between in (lambda x: x.cumsum(1), lambda x: x.roll(1, 1), lambda x: x.flip(1)):
        model, axes = _chain(between)
        with pytest.raises(AssertionError, match="have an order"):
            laws.permuting_units_keeps_function(model, axes, axes["one.weight:0"])


def test_random_plans_are_legal_and_reach_everything() -> None:
    """Plans respect counts and the floor, and over many seeds every unit is kept and dropped."""
    slots = (Slot("w", 0, 1, 1, 1, 0, Role.PRODUCES),)
    pair = {key: Axis(key, 5, slots, count="pair") for key in ("a", "b")}
    axes = AxisGraph(
        {**pair, "c": Axis("c", 4, slots), "d": Axis("d", 3, slots, Mark.FROZEN, "it is")}, {}, frozenset()
    )
    kept: dict[str, set[int]] = {"a": set(), "b": set(), "c": set()}
    dropped: dict[str, set[int]] = {"a": set(), "b": set(), "c": set()}
    for seed in range(60):
        plan = laws.random_plan(axes, torch.Generator().manual_seed(seed), floor=2)
        assert set(plan.changes) == {"a", "b", "c"}
        assert len(plan.changes["a"].keep) == len(plan.changes["b"].keep) >= 2
        for key, change in plan.changes.items():
            kept[key] |= set(change.keep)
            dropped[key] |= set(change.dropped)
    assert kept == dropped == {"a": set(range(5)), "b": set(range(5)), "c": set(range(4))}
    alone = laws.plan_for(axes, axes["a"])
    assert set(alone.changes) == {"a", "b"}
    assert alone.changes["a"].dropped
