"""Networks with recurrent layers and cells."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.facts import Frozen, Has, SameCount, Widths
from zoo.networks import network, tokens, vectors


def _unroll(m: Any, x: Tensor) -> Tensor:
    state = m.read(x[:, 0]).tanh()
    for step in range(1, x.shape[1]):
        state = (m.read(x[:, step]) + m.again(state)).tanh()
    return state


def _decode(m: Any, source: Tensor, target: Tensor) -> Tensor:
    _, (hidden, cells) = m.reader(m.words(source))
    hidden, cells, said = hidden[-1], cells[-1], []
    for word in target.unbind(1):
        hidden, cells = m.writer(m.words(word), (hidden, cells))
        said.append(m.head(hidden))
    return torch.stack(said, 1)


def _cells(m: Any, x: Tensor) -> Tensor:
    first, second = x.new_zeros(x.shape[1], m.hidden_dim), x.new_zeros(x.shape[1], 6)
    for step in x:
        first = m.first(step, first)
        second = m.second(first, second)
    return m.head(second)


def _begun(m: Any, x: Tensor) -> Tensor:
    start = m.start(x[:, 0]).tanh().unsqueeze(0)
    return m.head(m.rnn(x, (start, start * 0.5))[0])


def _pairs(vocabulary: int) -> Callable[[], tuple[tuple, dict]]:
    def example() -> tuple[tuple, dict]:
        (source,), _ = tokens(vocabulary, 3, 5)()
        return (source, source.flip(1)[:, :4]), {}

    return example


def _rows(cells: str, *parts: str, layer: str = "rnn") -> tuple[str, ...]:
    """Where the hidden units of one direction of one layer lie."""
    own = (f"{kind}_{part}_{cells}:0" for kind in ("weight", "bias") for part in ("ih", "hh"))
    return (*(f"{layer}.{place}" for place in own), f"{layer}.weight_hh_{cells}:1", *parts)


RECURRENT = (
    network(
        "lstm",
        lambda m, x: m.out(m.cell(m.fc(x))[0]),
        lambda: {"fc": nn.Linear(6, 5), "cell": nn.LSTM(5, 7, batch_first=True), "out": nn.Linear(7, 3)},
        vectors(2, 4, 6),
    ),
    network(
        "recurrent",
        lambda m, x: m.out(_unroll(m, x)),
        lambda: {"read": nn.Linear(5, 8), "again": nn.Linear(8, 8), "out": nn.Linear(8, 3)},
        vectors(2, 4, 5),
        Widths((8,)),
        Has(8, ("read.weight:0", "again.weight:0", "again.weight:1", "out.weight:1")),
    ),
    network(
        "lstm_language",
        lambda m, x: m.head(m.rnn(m.words(x))[0]),
        lambda: {"words": nn.Embedding(23, 6), "rnn": nn.LSTM(6, 9, 2, batch_first=True), "head": nn.Linear(9, 23)},
        tokens(23, 3, 5),
        Widths((6, 9, 9)),
        Has(6, ("words.weight:1", "rnn.weight_ih_l0:1"), alone=True),
        Has(9, _rows("l0", "rnn.weight_ih_l1:1"), alone=True),
        Has(9, _rows("l1", "head.weight:1"), alone=True),
        SameCount(9, "rnn.weight_hh_l0:1", "rnn.weight_hh_l1:1"),
    ),
    network(
        "gru_speech",
        lambda m, x: m.head(m.rnn(m.stem(x).relu().transpose(1, 2))[0]),
        lambda: {
            "stem": nn.Conv1d(5, 8, 3, padding=1),
            "rnn": nn.GRU(8, 7, 2, batch_first=True, bidirectional=True),
            "head": nn.Linear(14, 4),
        },
        vectors(2, 5, 6),
        Has(8, ("stem.weight:0", "rnn.weight_ih_l0:1", "rnn.weight_ih_l0_reverse:1")),
        *(Has(7, _rows(way, "rnn.weight_ih_l1:1", "rnn.weight_ih_l1_reverse:1")) for way in ("l0", "l0_reverse")),
        *(Has(7, _rows(way, "head.weight:1"), alone=True) for way in ("l1", "l1_reverse")),
        Widths((7, 7, 7, 7, 8)),
    ),
    network(
        "seq2seq",
        _decode,
        lambda: {
            "words": nn.Embedding(19, 5),
            "reader": nn.LSTM(5, 8, 2, batch_first=True),
            "writer": nn.LSTMCell(5, 8),
            "head": nn.Linear(8, 19),
        },
        _pairs(19),
        Has(5, ("words.weight:1", "reader.weight_ih_l0:1", "writer.weight_ih:1")),
        Has(8, (*_rows("l1", layer="reader"), "writer.weight_ih:0", "writer.weight_hh:1", "head.weight:1")),
        Has(8, _rows("l0", "reader.weight_ih_l1:1", layer="reader"), alone=True),
    ),
    network(
        "gru_handed_on",
        lambda m, x: m.head(m.writer(x, m.reader(x)[1])[0]),
        lambda: {"reader": nn.GRU(4, 7, 2), "writer": nn.GRU(4, 7, 2, bias=False), "head": nn.Linear(7, 3)},
        vectors(5, 2, 4),
        Has(7, ("reader.weight_hh_l0:0", "writer.weight_hh_l0:0", "reader.weight_ih_l1:1", "writer.weight_ih_l1:1")),
        Has(7, ("reader.weight_hh_l1:0", "writer.weight_hh_l1:0", "head.weight:1")),
        Widths((7, 7)),
    ),
    network(
        "last_states",
        lambda m, x: m.head(torch.cat([m.rnn(x)[1][0][-2], m.rnn(x)[1][0][-1]], 1)),
        lambda: {"rnn": nn.LSTM(4, 6, 2, bidirectional=True, dropout=0.3), "head": nn.Linear(12, 3)},
        vectors(5, 2, 4),
        *(Has(6, _rows(way, "head.weight:1"), alone=True) for way in ("l1", "l1_reverse")),
        Widths((6, 6, 6, 6)),
    ),
    network(
        "all_states",
        lambda m, x: m.head(m.rnn(x)[1].transpose(0, 1).flatten(1)),
        lambda: {"rnn": nn.RNN(4, 6, 3, nonlinearity="relu"), "head": nn.Linear(18, 3)},
        vectors(5, 2, 4),
        Has(6, (*_rows("l0", "rnn.weight_ih_l1:1"), *_rows("l1", "rnn.weight_ih_l2:1"), *_rows("l2", "head.weight:1"))),
        Widths((6,)),
    ),
    network(
        "lstm_projected",
        lambda m, x: m.head(m.rnn(x)[0]),
        lambda: {"rnn": nn.LSTM(4, 7, 2, proj_size=5, bidirectional=True), "head": nn.Linear(10, 3)},
        vectors(5, 2, 4),
        Has(7, ("rnn.weight_ih_l0:0", "rnn.weight_hh_l0:0", "rnn.bias_hh_l0:0", "rnn.weight_hr_l0:1")),
        Has(5, ("rnn.weight_hr_l1:0", "rnn.weight_hh_l1:1", "head.weight:1"), alone=True),
        branches=True,
    ),
    network(
        "recurrent_cells",
        _cells,
        lambda: {
            "first": nn.GRUCell(4, 7),
            "second": nn.RNNCell(7, 6, bias=False),
            "hidden_dim": 7,
            "head": nn.Linear(6, 3),
        },
        vectors(4, 2, 4),
        Has(7, ("first.weight_ih:0", "first.weight_hh:1", "second.weight_ih:1")),
        Frozen(("second.weight_hh:1",)),
        Widths((7,)),
    ),
    network(
        "unbatched_rnn",
        lambda m, x: m.head(m.rnn(x)[0]),
        lambda: {"rnn": nn.RNN(4, 6), "head": nn.Linear(6, 3)},
        vectors(5, 4),
        Has(6, _rows("l0", "head.weight:1"), alone=True),
    ),
    network(
        "states_from_a_layer",
        _begun,
        lambda: {"start": nn.Linear(4, 7), "rnn": nn.LSTM(4, 7, batch_first=True), "head": nn.Linear(7, 3)},
        vectors(3, 5, 4),
        Has(7, ("start.weight:0", "start.bias:0", *_rows("l0", "head.weight:1")), alone=True),
    ),
    network(
        "learned_states",
        lambda m, x: m.head(m.rnn(x, m.start.expand(-1, x.shape[1], -1))[0]),
        lambda: {"start": nn.Parameter(torch.zeros(2, 1, 7)), "rnn": nn.GRU(4, 7, 2), "head": nn.Linear(7, 3)},
        vectors(5, 2, 4),
        Has(7, ("start:2", *_rows("l0"), *_rows("l1", "head.weight:1"))),
    ),
    network(
        "given_states",
        lambda m, x, state: m.head(m.rnn(x, state)[0]),
        lambda: {"rnn": nn.GRU(4, 7), "head": nn.Linear(7, 3)},
        lambda: ((torch.ones(5, 2, 4), torch.ones(1, 2, 7)), {}),
        Frozen(("rnn.weight_hh_l0:0", "rnn.weight_hh_l0:1", "head.weight:1")),
    ),
    network(
        "returned_states",
        lambda m, x: (m.head(m.rnn(x)[0]), m.rnn(x)[1][1]),
        lambda: {"rnn": nn.LSTM(4, 7, 2), "head": nn.Linear(7, 3)},
        vectors(5, 2, 4),
        Frozen(("rnn.weight_hh_l0:0", "rnn.weight_hh_l1:0", "head.weight:1")),
    ),
    network(
        "units_along_time",
        lambda m, x: m.head(m.rnn(m.stem(x).permute(2, 0, 1))[1][0][-1]) + m.other(m.stem(x)).sum(1),
        lambda: {"stem": nn.Linear(4, 6), "rnn": nn.LSTM(5, 7), "head": nn.Linear(7, 3), "other": nn.Linear(6, 3)},
        vectors(2, 5, 4),
        Frozen(("stem.weight:0",)),
        Has(7, _rows("l0", "head.weight:1"), alone=True),
    ),
)
