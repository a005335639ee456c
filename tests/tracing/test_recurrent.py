"""Recurrent layers: what the zoo does not show of them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import laws
import regrow
from regrow.core.axes import Role
from regrow.tracing import TraceError
from zoo import Wired, lying_at, randomise


def _net(wire, seed: int = 0, **parts) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(Wired(wire, **parts))


def test_the_rows_of_all_gates_and_the_columns_that_hear_a_unit_are_cut() -> None:
    """Unit j of 5 is rows j, 5 + j, 10 + j and 15 + j, and column j of the recurrent weight and of the head."""
    net = _net(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.LSTM(3, 5), head=nn.Linear(5, 2))
    axes = regrow.trace(net, torch.randn(4, 2, 3))
    axis = axes["rnn.weight_ih_l0:0"]
    assert {(slot.name, slot.dim, slot.role) for slot in axis.slots if slot.role is Role.CONSUMES} == {
        ("rnn.weight_hh_l0", 1, Role.CONSUMES),
        ("head.weight", 1, Role.CONSUMES),
    }
    before = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    keep = [0, 2, 3]
    rows = [5 * gate + unit for gate in range(4) for unit in keep]
    small, _ = regrow.apply(net, axes, regrow.Plan.keeping(axes, {axis.key: keep}))
    assert torch.equal(small.rnn.weight_ih_l0, before["rnn.weight_ih_l0"][rows])
    assert torch.equal(small.rnn.weight_hh_l0, before["rnn.weight_hh_l0"][rows][:, keep])
    assert torch.equal(small.rnn.bias_hh_l0, before["rnn.bias_hh_l0"][rows])
    assert torch.equal(small.head.weight, before["head.weight"][:, keep])
    assert (small.rnn.hidden_size, small.rnn.input_size, small.head.in_features) == (3, 3, 3)
    assert all(own is getattr(small.rnn, name) for own, name in zip(*_flat(small.rnn), strict=True))


def _flat(rnn: nn.RNNBase) -> tuple[list[Tensor], list[str]]:
    with torch.no_grad():
        rnn(torch.zeros(1, 1, rnn.input_size))
    return rnn._flat_weights, rnn._flat_weights_names


def test_a_cut_layer_learns_with_the_weights_it_has() -> None:
    """The list of weights that such modules keep beside their parameters is the parameters, after a cut too."""
    net = _net(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.GRU(3, 5, 2), head=nn.Linear(5, 2))
    x = torch.randn(4, 2, 3)
    axes = regrow.trace(net, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    plan = regrow.Plan.keeping(axes, {axis.key: range(3) for axis in axes.free()})
    net, _ = regrow.apply(net, axes, plan, optimizers=[optimizer])
    before = net(x).detach().clone()
    net(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.rnn.parameters())
    optimizer.step()
    assert not torch.allclose(net(x), before)


def test_tracing_leaves_the_layer_its_own_weights() -> None:
    net = _net(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.LSTM(3, 5), head=nn.Linear(5, 2))
    own = [id(one) for one in net.rnn._flat_weights]
    with laws.untouched(net):
        axes = regrow.trace(net, torch.randn(4, 2, 3))
        regrow.verify(net, axes, regrow.Plan.keeping(axes, {"rnn.weight_ih_l0:0": range(2)}))
    assert [id(one) for one in net.rnn._flat_weights] == own


def test_a_state_made_in_the_default_precision_is_verified_in_float64() -> None:
    """A network that says ``torch.zeros(n, m)`` makes a state of the precision of torch, not of its own weights."""

    def steps(m, x):
        h = torch.zeros(x.shape[1], m.hidden_size)
        for one in x:
            h = m.cell(one, h)
        return m.head(h)

    net = _net(steps, cell=nn.GRUCell(3, 6), head=nn.Linear(6, 2), hidden_size=6)
    axes = regrow.trace(net, torch.randn(4, 2, 3))
    report = regrow.verify(net, axes, regrow.Plan.keeping(axes, {"cell.weight_ih:0": (0, 3, 5)}))
    assert report.ok and report.max_abs_diff < 1e-14
    assert torch.get_default_dtype() is torch.float32


def test_newborn_hidden_units_are_not_heard_by_the_layer_itself() -> None:
    """zero_out: what the layer reads of them is 0, in each gate, while their own rows are drawn."""
    net = _net(lambda m, x: m.head(m.rnn(x)[0]), rnn=nn.LSTM(3, 5), head=nn.Linear(5, 2))
    axes = regrow.trace(net, torch.randn(4, 2, 3))
    net, _ = regrow.apply(net, axes, regrow.Plan.growing(axes, {"rnn.weight_ih_l0:0": 2}))
    assert not bool(net.rnn.weight_hh_l0[:, 5:].any()) and not bool(net.head.weight[:, 5:].any())
    young = [7 * gate + unit for gate in range(4) for unit in (5, 6)]
    assert bool((net.rnn.weight_ih_l0[young] != 0).all()) and bool(net.rnn.weight_hh_l0[young, :5].all())


def test_what_runs_over_hidden_units_is_not_called_a_sum() -> None:
    """A softmax over hidden units competes, a sort of them freezes: the layer does not hide what follows."""
    for function, mark in ((lambda x: x.softmax(-1), "competed"), (lambda x: x.sort(-1).values, "frozen")):
        net = _net(lambda m, x, f=function: m.head(f(m.rnn(x)[0])), rnn=nn.GRU(3, 5), head=nn.Linear(5, 2))
        axes = regrow.trace(net, torch.randn(4, 2, 3))
        assert {axis.mark for axis in lying_at(axes, "rnn.weight_hh_l0:1")} == {mark}


def _packing(kind: type[nn.RNNBase], padded: bool) -> nn.Module:
    def run(m, x, lengths):
        packed = pack_padded_sequence(m.one(x).relu(), lengths, batch_first=True, enforce_sorted=False)
        out, state = m.rnn(packed)
        return m.head(pad_packed_sequence(out, batch_first=True)[0] if padded else state[0][-1])

    return _net(run, one=nn.Linear(4, 6), rnn=kind(6, 5, batch_first=True), head=nn.Linear(5, 2))


def test_packed_sequences_are_frozen_or_refused_with_a_reason() -> None:
    """Who of a row of packed sequences reads what is decided by their lengths: nothing is cut there by mistake."""
    given = (torch.randn(3, 5, 4), torch.tensor([5, 2, 4]))
    axes = regrow.trace(_packing(nn.LSTM, padded=False), *given)
    assert not axes.free() and axes.recorded == "eager"
    assert "lstm" in axes["rnn.weight_hh_l0:1"].reason and "_pack_padded_sequence" in axes["one.weight:0"].reason
    with pytest.raises(TraceError, match="_pack_padded_sequence"):
        regrow.trace(_packing(nn.GRU, padded=True), *given)
