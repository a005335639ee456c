"""Recurrent layers are seen and gated inside, though they are one function."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import laws
import regrow
from regrow.core.scores import Need
from regrow.core.sources import Batch, Source
from regrow.scoring.collect import collect
from regrow.scoring.compensate import means
from regrow.scoring.metrics import wanda_sp
from regrow.scoring.weights import weights_of
from regrow.surgery.gate import gate_inputs
from zoo import ZOO, Wired, randomise

NETS = ["lstm_language", "gru_speech", "seq2seq", "last_states", "recurrent_cells", "all_states"]


@pytest.mark.parametrize("name", NETS)
def test_gates_of_zero_and_one_are_the_cut(name: str) -> None:
    net, (args, _) = laws.in_double(ZOO[name].build()), laws.in_double(ZOO[name].example())
    axes = regrow.trace(net, *args)
    plan = laws.random_plan(axes, torch.Generator().manual_seed(3))
    assert any(change.dropped for change in plan.changes.values())
    gates = {
        key: torch.zeros(change.size, dtype=torch.float64).index_fill(0, torch.tensor(change.keep), 1.0)
        for key, change in plan.changes.items()
    }
    with torch.no_grad():
        dense = net(*args)
        with gate_inputs(net, axes, gates):
            masked = net(*args)
        small, _ = regrow.apply(deepcopy(net), axes, plan)
        assert float((masked - small(*args)).abs().max()) < 1e-9 * float(masked.abs().max())
        assert not torch.allclose(masked, dense, atol=1e-3)
        assert torch.equal(net(*args), dense)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_recurrent_weights_are_fed_is_what_cells_are(kind: type[nn.RNNBase], batch_first: bool) -> None:
    """The moments of a fused layer of two layers and directions are those of its cells in a loop, one by one."""
    torch.manual_seed(0)
    net = Wired(lambda m, x: m.head(m.rnn(x)[0]), rnn=kind(3, 5, 2, bidirectional=True, batch_first=batch_first))
    net.head = nn.Linear(10, 2)
    net = randomise(net).double()
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    axes = regrow.trace(net, x)
    source = Source("x", [Batch((x,))])
    (found,) = collect(net, axes, [source], {Need.ACTIVATIONS})["x"]
    expected = _by_cells(net.rnn, x.transpose(0, 1) if batch_first else x)
    seen = {f"rnn.{name}" for name in expected if name != "weight_ih_l0" and name != "weight_ih_l0_reverse"}
    assert seen <= found.moments.keys()
    for name in seen:
        rows = torch.stack(expected[name.removeprefix("rnn.")]).flatten(0, 1)
        assert torch.allclose(found.moments[name].total, rows.sum(0)), name
        assert torch.allclose(found.moments[name].square, rows.square().sum(0)), name
    scores = wanda_sp(weights_of(net), axes, found)
    assert scores.values.keys() == {axis.key for axis in axes.units()}
    kept = {axis.key: range(3) for axis in axes.units()}
    assert set(means(net, axes, kept, found)) == {"head.weight"}


def _by_cells(rnn: nn.RNNBase, x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Weight → what it is fed at each time, by cells of one step."""
    kinds = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN_TANH": nn.RNNCell}
    fed: dict[str, list[torch.Tensor]] = {}
    for layer in range(rnn.num_layers):
        outs = []
        for way in ("", "_reverse"):
            cell = kinds[rnn.mode](x.shape[2], rnn.hidden_size).double()
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(cell, part).data.copy_(getattr(rnn, f"{part}_l{layer}{way}").data)
            state, out = None, []
            for step in x.flip(0) if way else x:
                hidden = state[0] if isinstance(state, tuple) else state
                fed.setdefault(f"weight_ih_l{layer}{way}", []).append(step)
                fed.setdefault(f"weight_hh_l{layer}{way}", []).append(
                    step.new_zeros(len(step), rnn.hidden_size) if hidden is None else hidden.detach()
                )
                state = cell(step, state)
                out.append((state[0] if isinstance(state, tuple) else state).detach())
            outs.append(torch.stack(out[::-1] if way else out))
        x = torch.cat(outs, -1)
    return fed
