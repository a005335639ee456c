"""Recover the inputs of each weight of a recurrent layer (LSTM, GRU, RNN), which runs as one fused function."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Fed = tuple[Tensor, Tensor, int]
"""A weight, the input it is contracted with, and which dimension of the input that is."""


def _layers(func: Callable[..., Any], x: Tensor, state: Any, params: Sequence[Tensor], *how: Any) -> Iterator[Fed]:
    """Run each direction of each layer by itself, to see the inputs of each layer and each time step."""
    if not isinstance(params, list | tuple):  # packed sequences: their form is not that of sequences
        return
    biased, many, _, training, both, batch_first = how
    ways, time = 2 if both else 1, 1 if batch_first else 0
    states = state if isinstance(state, list | tuple) else [state]
    each = len(params) // (many * ways)
    for layer in range(many):
        outs = []
        for way in range(ways):
            place = layer * ways + way
            own = params[place * each : (place + 1) * each]
            start = [one[place : place + 1] for one in states]
            turned = x.flip(time) if way else x
            first = start if isinstance(state, list | tuple) else start[0]
            out = func(turned, first, own, biased, 1, 0.0, training, False, batch_first)[0]
            before = start[0].transpose(0, 1) if batch_first else start[0]
            yield own[0], turned, -1
            yield own[1], torch.cat([before, out.narrow(time, 0, out.shape[time] - 1)], time), -1
            outs.append(out.flip(time) if way else out)
        x = torch.cat(outs, -1)


def _cell(func: Callable[..., Any], x: Tensor, state: Any, inner: Tensor, back: Tensor, *biases: Any) -> Iterator[Fed]:
    yield inner, x, -1
    yield back, state[0] if isinstance(state, list | tuple) else state, -1


RECURRENT: Mapping[Callable[..., Any], Callable[..., Iterator[Fed]]] = {
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _layers),
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _cell),
}
"""Function → the (weight, input, dimension) triples of a call. The projection of ``proj_size`` is not covered."""
