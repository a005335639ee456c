"""Declared axes: what cannot be traced is cut exactly where the declaration is right, and told where it is wrong."""

from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import laws
import regrow
from regrow.core.axes import AxisGraph, Example, Mark, Role
from regrow.core.plan import Fill, Plan, PlanError
from regrow.core.sources import Batch, Source
from regrow.store import load, save
from regrow.surgery import DeclarationError, UndoStore, declare
from regrow.tracing import TraceError
from zoo import Wired, lying_at, randomise

HIDDEN = {"hidden": "fc1.weight:0 fc1.bias:0 -> fc2.weight:1"}


def elsewhere(function):
    """A function of numpy on tensors: nothing that records tensors sees it."""
    return lambda *tensors: torch.from_numpy(np.asarray(function(*(x.detach().numpy() for x in tensors))))


TANH = elsewhere(np.tanh)


def net(wire, **parts) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Wired(wire, **parts))


def two(between=TANH, head=nn.Linear) -> nn.Module:
    return net(lambda m, x: m.fc2(between(m.fc1(x))), fc1=nn.Linear(4, 10), fc2=head(10, 3))


def two_and_axes(between=TANH) -> tuple[nn.Module, AxisGraph]:
    model = two(between)
    return model, declare(model, HIDDEN, torch.randn(5, 4))


def test_tracing_finds_nothing_here() -> None:
    """What goes through numpy is a constant in a recording: all is frozen."""
    assert not regrow.trace(two(), torch.randn(5, 4)).free()


def test_a_right_declaration_is_proved_and_cut() -> None:
    """In float64 the cut network is the whole one with zeros; module integers follow, and nothing else has moved."""
    model, axes = two_and_axes()
    assert (axes.recorded, axes.declared, axes["hidden"].size) == ("not", ("hidden",), 10)
    assert [slot.role for slot in axes["hidden"].slots] == [Role.PRODUCES, Role.SHIFTS, Role.CONSUMES]
    plan = Plan.keeping(axes, {"hidden": (0, 3, 4, 8)})
    laws.masked_equals_shrunk(model, axes, plan)
    laws.zeroed_equals_shrunk(model, axes, plan)
    laws.runs_with_its_ties(model, axes, plan)
    laws.all_or_nothing(model, axes)
    small, left = regrow.apply(model, axes, plan)
    assert (small.fc1.out_features, small.fc2.in_features, left["hidden"].ids) == (4, 4, (0, 3, 4, 8))
    laws.masked_equals_shrunk(small, left, Plan.keeping(left, {"hidden": (1, 2)}))


def test_a_plan_of_declared_axes_is_data_like_any_other() -> None:
    _, axes = two_and_axes()
    plan = Plan.keeping(axes, {"hidden": (1, 2)})
    assert Plan.from_json(plan.to_json()) == plan


def test_a_cut_network_is_saved_and_loaded(tmp_path) -> None:
    model, axes = two_and_axes()
    small, _ = regrow.apply(model, axes, Plan.keeping(axes, {"hidden": (0, 3, 4, 8)}))
    save(small, tmp_path)
    again = load(tmp_path, model=two)
    assert torch.equal(again(*axes.example.args), small(*axes.example.args))
    assert again.fc1.out_features == 4


def test_it_grows_and_comes_back() -> None:
    model, axes = two_and_axes()
    for rule in ("zero_out", "split", "pair"):
        laws.masked_equals_shrunk(model, axes, Plan.growing(axes, {"hidden": 4}, Fill(rule)))
        laws.widening_keeps_function(model, axes, Plan.growing(axes, {"hidden": 4}, Fill(rule)), alive=False)
    laws.restored_is_what_was_cut(model, axes, [lambda left: Plan.keeping(left, {"hidden": (1, 4, 7)})])
    assert not UndoStore().restorable


def test_pruning_takes_declared_axes_and_their_means_are_proved() -> None:
    model, axes = two_and_axes()
    source = Source("x", [Batch(axes.example.args)])
    whole = deepcopy(model)
    _, plan = regrow.prune(model, method="flap", keep=0.5, data=[source], axes=axes)
    assert plan.means and model.fc1.out_features < 10
    report = regrow.verify(whole, axes, plan)
    assert report.ok
    other = Plan(plan.changes, {"fc2.weight": {k: v + 0.1 for k, v in plan.means["fc2.weight"].items()}})
    gone, _ = regrow.apply(deepcopy(whole), axes, other)
    assert not torch.allclose(gone(*axes.example.args), model(*axes.example.args), atol=1e-4), "means are felt"


def test_what_no_recording_shows_has_no_known_work() -> None:
    model, axes = two_and_axes()
    with pytest.raises(ValueError, match=r"declared axes hidden cost is not known.*params or bytes"):
        regrow.prune(model, method="random", target="macs=50%", axes=axes)


# --- blocks, concatenations, integers -------------------------------------------------------------------------------


def attend(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(len(x), -1, 3, m.heads, 4).permute(2, 0, 3, 1, 4)
    seen = elsewhere(lambda s: np.exp(s) / np.exp(s).sum(-1, keepdims=True))(q @ k.mT) @ v
    return m.out(seen.transpose(1, 2).flatten(2))


HEADS = "qkv.weight:0=3*heads*4 qkv.bias:0=3*heads*4 :heads -> out.weight:1=heads*4"


def test_heads_of_a_fused_projection_are_declared_in_blocks() -> None:
    model = net(attend, qkv=nn.Linear(5, 36), out=nn.Linear(12, 5), heads=3)
    axes = declare(model, {"heads": HEADS}, torch.randn(2, 6, 5))
    slots = {(s.name, s.outer, s.stride, s.inner, s.offset) for s in axes["heads"].slots}
    assert slots == {("qkv.weight", 3, 12, 4, 0), ("qkv.bias", 3, 12, 4, 0), ("out.weight", 1, 12, 4, 0)}
    plan = Plan.keeping(axes, {"heads": (0, 2)})
    laws.masked_equals_shrunk(model, axes, plan)
    small, left = regrow.apply(model, axes, plan)
    assert (small.heads, small.qkv.out_features, small.out.in_features) == (2, 24, 8)
    laws.masked_equals_shrunk(small, left, Plan.keeping(left, {"heads": (1,)}))


def test_blocks_in_another_order_are_told() -> None:
    """Declared as heads × (q ‖ k ‖ v) where the network has q ‖ k ‖ v: it runs, and rewires heads."""
    model = net(attend, qkv=nn.Linear(5, 36), out=nn.Linear(12, 5), heads=3)
    wrong = HEADS.replace("3*heads*4", "heads*3*4")
    axes = declare(model, {"heads": wrong}, torch.randn(2, 6, 5))
    assert not regrow.verify(model, axes, Plan.keeping(axes, {"heads": (0, 2)})).ok


def test_a_concatenation_is_a_sum_of_axes() -> None:
    model = net(
        lambda m, x: m.mix(TANH(torch.cat([m.a(x), m.b(x)], 1))),
        a=nn.Linear(4, 6),
        b=nn.Linear(4, 5),
        mix=nn.Linear(11, 2),
    )
    axes = declare(
        model,
        {
            "left": "a.weight:0, a.bias:0 -> mix.weight:1=left+right",
            "right": "b.weight:0, b.bias:0 -> mix.weight:1=left+right",
        },
        torch.randn(3, 4),
    )
    plan = Plan.keeping(axes, {"left": (1, 2, 5), "right": (0, 4)})
    laws.masked_equals_shrunk(model, axes, plan)
    assert regrow.apply(model, axes, plan)[0].mix.in_features == 5


def test_channels_of_all_kinds_of_convolutions_follow() -> None:
    parts = {
        "stem": nn.Conv2d(2, 6, 3, padding=1),
        "each": nn.Conv2d(6, 6, 3, padding=1, groups=6),
        "norm": nn.BatchNorm2d(6),
        "up": nn.ConvTranspose2d(6, 4, 2),
    }
    model = net(lambda m, x: m.up(TANH(m.norm(m.each(m.stem(x))))), **parts)
    own = "stem.weight:0 stem.bias:0 each.weight:0 each.bias:0 norm.weight:0 norm.bias:0 norm.running_mean:0"
    axes = declare(model, {"c": f"{own} norm.running_var:0 -> up.weight:0"}, torch.randn(1, 2, 5, 5))
    plan = Plan.keeping(axes, {"c": (0, 2, 3)})
    laws.masked_equals_shrunk(model, axes, plan)
    small, _ = regrow.apply(model, axes, plan)
    assert (small.stem.out_channels, small.each.in_channels, small.each.groups, small.up.in_channels) == (3, 3, 3, 3)
    assert small.norm.num_features == 3


def test_a_padded_batch_of_sequences_can_be_declared() -> None:
    """What tracing refuses of recurrent layers, packed sequences, a user can say."""

    def run(m, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.head(pad_packed_sequence(m.rnn(packed)[0], batch_first=True)[0])

    model = net(run, rnn=nn.LSTM(3, 6, batch_first=True), head=nn.Linear(6, 2))
    with pytest.raises(TraceError, match=r"name its axes: regrow\.declare"):
        regrow.trace(model, torch.randn(3, 5, 3), torch.tensor([5, 2, 4]))
    rows = " ".join(f"rnn.{kind}_{part}_l0:0=4*h" for kind in ("weight", "bias") for part in ("ih", "hh"))
    given = (torch.randn(3, 5, 3), torch.tensor([5, 2, 4]))
    axes = declare(model, {"h": f"{rows} -> rnn.weight_hh_l0:1 head.weight:1"}, *given)
    plan = Plan.keeping(axes, {"h": (0, 2, 5)})
    laws.masked_equals_shrunk(model, axes, plan)
    assert regrow.apply(model, axes, plan)[0].rnn.hidden_size == 3


def test_tied_tensors_are_declared_under_any_name() -> None:
    def tied() -> nn.Module:
        model = net(lambda m, i: m.head(TANH(m.words(i))), words=nn.Embedding(7, 5), head=nn.Linear(5, 7, bias=False))
        model.head.weight = model.words.weight
        return model

    axes = declare(tied(), {"width": "words.weight:1 -> head.weight:1"}, torch.tensor([1, 3, 6]))
    plan = Plan.keeping(axes, {"width": (0, 1, 4)})
    laws.masked_equals_shrunk(tied(), axes, plan)
    laws.runs_with_its_ties(tied(), axes, plan)


# --- wrong declarations ---------------------------------------------------------------------------------------------


def _sliced(m: nn.Module, x: Tensor) -> Tensor:
    hidden = TANH(m.fc1(x))
    return m.fc2(hidden) + F.linear(hidden, m.more.weight[:, : hidden.shape[1]])


WRONG = {
    "a softmax over the units": lambda m, x: m.fc2(
        elsewhere(lambda h: np.exp(h) / np.exp(h).sum(1)[:, None])(m.fc1(x))
    ),
    "a mean over the units": lambda m, x: m.fc2(elsewhere(lambda h: h - h.mean(1)[:, None])(m.fc1(x))),
    "an order of the units": lambda m, x: m.fc2(elsewhere(lambda h: h.cumsum(1))(m.fc1(x))),
    "a reader without weights": lambda m, x: m.fc2(TANH(m.fc1(x))) + TANH(m.fc1(x)).sum(1, keepdim=True),
    "a forgotten reader that takes as many as there are": _sliced,
    "units that are an answer": lambda m, x: (m.fc2(TANH(m.fc1(x))), m.fc1(x)),
    "a size in Python": lambda m, x: m.fc2(TANH(m.fc1(x))) / m.fc1.out_features,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_declaration_that_runs_is_told(what: str) -> None:
    model = net(WRONG[what], fc1=nn.Linear(4, 10), fc2=nn.Linear(10, 3), more=nn.Linear(10, 3, bias=False))
    axes = declare(model, HIDDEN, torch.randn(5, 4))
    with laws.untouched(model):
        report = regrow.verify(model, axes, Plan.keeping(axes, {"hidden": (0, 3, 4, 8)}))
    assert not report.ok and report.max_abs_diff > 1e-3


FORGOTTEN = {
    "a reader": "fc1.weight:0 fc1.bias:0 -> more.weight:1",
    "a bias": "fc1.weight:0 -> fc2.weight:1 more.weight:1",
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_declaration_that_does_not_run_changes_nothing(what: str) -> None:
    model = net(
        lambda m, x: m.fc2(TANH(m.fc1(x))) + m.more(TANH(m.fc1(x))),
        fc1=nn.Linear(4, 10),
        fc2=nn.Linear(10, 3),
        more=nn.Linear(10, 3),
    )
    axes = declare(model, {"hidden": FORGOTTEN[what]}, torch.randn(5, 4))
    plan = Plan.keeping(axes, {"hidden": (0, 3, 4, 8)})
    optimizer = torch.optim.Adam(model.parameters())
    with laws.untouched(model):
        with pytest.raises(PlanError, match=r"does not run at that size.*something of hidden not declared"):
            regrow.apply(model, axes, plan, optimizers=[optimizer])
        with pytest.raises(PlanError, match="does not run"):
            regrow.verify(model, axes, plan)


def test_the_try_leaves_buffers_and_chance_alone() -> None:
    """A network that counts its runs in a buffer, and draws, does not notice that a copy of it was tried."""

    def run(m, x):
        m.runs += 1
        return m.fc2(TANH(m.fc1(x))) + 0 * torch.rand(1)

    model = net(run, fc1=nn.Linear(4, 10), fc2=nn.Linear(10, 3))
    model.register_buffer("runs", torch.zeros(()))
    axes = declare(model, HIDDEN, torch.randn(5, 4))
    before = torch.get_rng_state()
    regrow.apply(model, axes, Plan.keeping(axes, {"hidden": (0, 3)}))
    assert int(model.runs) == 0 and torch.equal(torch.get_rng_state(), before)


ERRORS = {
    "no arrow": ({"h": "fc1.weight:0 fc2.weight:1"}, "say what makes its units, and what reads them"),
    "nothing reads": ({"h": "fc1.weight:0 ->"}, "say what makes its units, and what reads them"),
    "no name": ({"h h": "fc1.weight:0 -> fc2.weight:1"}, "'h h': a declared axis has a name of letters"),
    "no tensor": ({"h": "fc1.wieght:0 -> fc2.weight:1"}, "no tensor 'fc1.wieght'; it has fc1.weight"),
    "no dimension": ({"h": "fc1.weight:2 -> fc2.weight:1"}, "fc1.weight has 2 dimensions, counted from 0"),
    "forgotten dimension": ({"h": "fc1.weight -> fc2.weight:1"}, "'fc1.weight' is neither tensor:dim"),
    "no attribute": ({"h": "fc1.weight:0 fc1:width -> fc2.weight:1"}, "'fc1:width' is neither tensor:dim"),
    "no number": ({"h": "fc1.weight:0 fc1:bias -> fc2.weight:1"}, "'fc1:bias' holds a Parameter, not a whole number"),
    "sizes": ({"h": "fc1.weight:0 -> fc2.weight:0"}, "fc2.weight:0 has 3 entries, but with h = 10 it would have 10"),
    "attribute": ({"h": "fc1.weight:0 fc1:in_features -> fc2.weight:1"}, "fc1:in_features has 4 entries, but with h"),
    "blocks": ({"h": "fc1.weight:0=3*h -> fc2.weight:1=3*h"}, "fc1.weight:0 has 10 entries, which do not divide so"),
    "a form": ({"h": "fc1.weight:0=h/2 -> fc2.weight:1"}, "'fc1.weight:0=h/2' is not made of whole numbers"),
    "no form": ({"h": "fc1.weight:0=(h -> fc2.weight:1"}, "cannot be read; write it like"),
    "unknown": ({"h": "fc1.weight:0=h*d -> fc2.weight:1"}, "'fc1.weight:0=h\\*d' is not made of"),
    "not in it": ({"h": "fc1.weight:0=10 -> fc2.weight:1"}, "does not say where h is in it"),
    "open": (
        {"h": "fc1.weight:0=h*d -> fc2.weight:1=h*d", "d": "fc1.weight:0=h*d -> fc2.weight:1=h*d"},
        "its size does not follow from fc1.weight:0",
    ),
    "twice": (
        {"h": "fc1.weight:0=h*d fc1.bias:0=d*h -> fc2.weight:1=h*d :h", "d": "fc1.bias:0=h*d -> fc2.weight:1=h*d"},
        "fc1.bias:0 is declared twice, in different forms",
    ),
    "only integers make": ({"h": "fc1:out_features -> fc2.weight:1"}, "name a tensor that makes its units"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_name_the_value(what: str) -> None:
    units, words = ERRORS[what]
    model = two()
    model.h = 2
    with pytest.raises(DeclarationError, match=words):
        declare(model, units, torch.randn(5, 4))


# --- beside a trace -------------------------------------------------------------------------------------------------


@torch.library.custom_op("regrow_tests::soft", mutates_args=())
def soft(x: Tensor) -> Tensor:
    """An operation of the user's own, entry by entry."""
    return torch.nn.functional.softplus(x)


@torch.library.custom_op("regrow_tests::centred", mutates_args=())
def centred(x: Tensor) -> Tensor:
    """An operation of the user's own that is not."""
    return x - x.mean(-1, keepdim=True)


for one in (soft, centred):
    one.register_fake(torch.empty_like)


def traced(operation) -> tuple[nn.Module, AxisGraph]:
    model = net(
        lambda m, x: m.fc4(m.fc3(m.fc2(operation(m.fc1(x)))).relu()),
        fc1=nn.Linear(4, 10),
        fc2=nn.Linear(10, 5),
        fc3=nn.Linear(5, 8),
        fc4=nn.Linear(8, 3),
    )
    return model, regrow.trace(model, torch.randn(6, 4))


def test_a_declaration_frees_what_tracing_froze_for_want_of_a_rule() -> None:
    model, found = traced(soft)
    assert {axis.mark for axis in lying_at(found, "fc1.weight:0")} == {Mark.FROZEN}
    axes = declare(model, HIDDEN, axes=found)
    assert axes.recorded == "export" and {a.key for a in axes.free()} == {"hidden", "fc2.weight:0", "fc3.weight:0"}
    assert not [a for a in axes if not a.free and {s.name for s in a.slots} & {"fc1.bias"}]
    for keep in ({"hidden": (1, 2, 9)}, {"hidden": (0, 4), "fc2.weight:0": (1, 2), "fc3.weight:0": (0, 1, 7)}):
        plan = Plan.keeping(axes, keep)
        laws.masked_equals_shrunk(model, axes, plan)
        laws.zeroed_equals_shrunk(model, axes, plan)
    small, left = regrow.apply(deepcopy(model), axes, plan)
    assert (small.fc1.out_features, small.fc2.in_features, small.fc3.out_features) == (2, 2, 3)
    laws.masked_equals_shrunk(small, left, Plan.keeping(left, {"hidden": (1,), "fc3.weight:0": (0, 2)}))


def test_a_wrong_declaration_beside_a_trace_is_told() -> None:
    model, found = traced(centred)
    axes = declare(model, HIDDEN, axes=found)
    assert not regrow.verify(model, axes, Plan.keeping(axes, {"hidden": (1, 2, 9)})).ok
    assert regrow.verify(model, axes, Plan.keeping(axes, {"fc3.weight:0": (1, 2)})).ok


def test_what_tracing_knows_is_not_declared_again() -> None:
    model, found = traced(soft)
    with pytest.raises(DeclarationError, match=r"fc3.weight:0 is the axis 'fc3.weight:0' already"):
        declare(model, {"h": "fc3.weight:0 fc3.bias:0 -> fc4.weight:1"}, axes=found)


def test_an_example_is_given_once() -> None:
    model, found = traced(soft)
    with pytest.raises(DeclarationError, match="have an example already"):
        declare(model, HIDDEN, torch.randn(6, 4), axes=found)


def test_another_input_verifies_too() -> None:
    model, axes = two_and_axes()
    other = Example((torch.randn(2, 4),))
    assert regrow.verify(model, axes, Plan.keeping(axes, {"hidden": (0, 3)}), other).ok
