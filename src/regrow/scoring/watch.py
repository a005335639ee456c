"""A torch-function mode that sums the inputs of chosen weights wherever they are contracted."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from regrow.core.scores import Moments
from regrow.core.sources import Batch, visible_positions

Function = Callable[..., Any]
# A weight, the input it is contracted with, and which dimension of the input that is, counted from the end
Contraction = tuple[Any, Any, int]


def _rnn_layers(
    func: Function, x: Tensor, state: Any, params: Sequence[Tensor], *options: Any
) -> Iterator[Contraction]:
    """Run each direction of each recurrent layer by itself, and yield its contractions at all time steps.

    ``func``: ``torch.lstm`` or the like; the others are its arguments. Packed sequences give none.
    """
    if not isinstance(params, list | tuple):  # packed sequences: their form is not that of sequences
        return
    has_bias, layers, _, training, bidirectional, batch_first = options
    directions, time = 2 if bidirectional else 1, 1 if batch_first else 0
    is_lstm = isinstance(state, list | tuple)  # hidden and cell state
    each = len(params) // (layers * directions)
    for layer in range(layers):
        outs = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = params[index * each : (index + 1) * each]
            start = [part[index : index + 1] for part in (state if is_lstm else [state])]
            ordered = x.flip(time) if direction else x
            first = start if is_lstm else start[0]
            out = func(ordered, first, weights, has_bias, 1, 0.0, training, False, batch_first)[0]
            before = start[0].transpose(0, 1) if batch_first else start[0]
            yield weights[0], ordered, -1
            # The hidden states that each time step gets: the first, and all outputs but the last
            yield weights[1], torch.cat([before, out.narrow(time, 0, out.shape[time] - 1)], time), -1
            outs.append(out.flip(time) if direction else out)
        x = torch.cat(outs, -1)


def _rnn_cell(x: Tensor, hidden: Any, weight_ih: Tensor, weight_hh: Tensor, *_: Any) -> Iterator[Contraction]:
    """Yield the contractions of an LSTM, GRU or RNN cell: input and hidden state, each with its weight."""
    yield weight_ih, x, -1
    yield weight_hh, hidden[0] if isinstance(hidden, list | tuple) else hidden, -1


# Entries summed at a time on a CPU: a chunk in float32 fits the cache, so half precision costs no extra memory.
CHUNK = 1 << 18
GROUP = 64  # how many columns a kernel sums side by side


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Contraction]:
    """Yield the contraction of a linear layer; arguments as of ``F.linear``."""
    yield weight, input, -1


def _matmul(a: Tensor, b: Tensor, **_: Any) -> Iterator[Contraction]:
    """Yield the contraction of a matrix product, with either operand as the weight."""
    yield b, a, -1
    yield a, b, -2 if b.dim() > 1 else -1


def _addmm(bias: Tensor, mat1: Tensor, mat2: Tensor, **_: Any) -> Iterator[Contraction]:
    """Yield the contraction in ``torch.addmm``, as :func:`_matmul`."""
    return _matmul(mat1, mat2)


def _conv(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Iterator[Contraction]:
    """Yield the contraction of a convolution, transposed or not: over the channels of its input."""
    yield weight, input, 1 - weight.dim()


_MATMULS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)
_CONVOLUTIONS = (
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)
Table = dict[Function, Callable[..., Iterator[Contraction]]]
# Function → the (weight, input, dimension) triples that a call of it contracts.
CONTRACTIONS: Table = {
    F.linear: _linear,
    **dict.fromkeys(_MATMULS, _matmul),
    torch.Tensor.__rmatmul__: lambda b, a: _matmul(a, b),
    **dict.fromkeys((torch.addmm, torch.Tensor.addmm), _addmm),
    **dict.fromkeys(_CONVOLUTIONS, _conv),
}
# The same inside recurrent layers. The projection of ``proj_size`` is not covered.
RECURRENT: Table = {
    **{func: partial(_rnn_layers, func) for func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
    **dict.fromkeys((torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell), _rnn_cell),
}
_EVERYWHERE = CONTRACTIONS | RECURRENT


def find_inputs(
    watched: Mapping[int, str],
    func: Function,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    table: Table = CONTRACTIONS,
) -> Iterator[tuple[str, Tensor, int]]:
    """Yield, per watched weight that a call contracts: its name, the input, and the input's contracted dimension (< 0).

    ``func(*args, **kwargs)`` is the call, ``table`` what calls contract. An operand is a watched weight (``id`` → name)
    if it is that tensor or its transpose (``x @ weight.T``).
    """
    list_contractions = table.get(func)
    for weight, value, dim in list_contractions(*args, **kwargs) if list_contractions else ():
        name = watched.get(id(weight))
        base = weight._base if isinstance(weight, Tensor) else None
        if name is None and base is not None and weight.dim() == 2:
            transposed = weight.shape == base.shape[::-1] and weight.stride() == base.stride()[::-1]
            name = watched.get(id(base)) if transposed else None
        if name is not None:
            yield name, value, dim


class InputHook(TorchFunctionMode, ABC):
    """A torch-function mode in which the inputs of watched weights (``id`` → name) pass through :meth:`replace_input`.

    An input is what a linear map, convolution or matrix product contracts with the weight. Recurrent layers show none:
    they call :meth:`replace_weight`, which raises ValueError unless a subclass overrides it.
    """

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.watched = watched

    @abstractmethod
    def replace_input(self, name: str, value: Tensor, dim: int) -> Tensor:
        """Return the input to use instead of ``value``, whose dimension ``dim`` (< 0) the weight ``name`` contracts."""

    def replace_weight(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight to use inside a recurrent layer, whose inputs cannot be replaced; ``ValueError`` here."""
        raise ValueError(f"{name!r} is read inside a recurrent layer, where its input cannot be exchanged")

    def _replace_watched(self, tensor: Tensor) -> Tensor:
        """Return :meth:`replace_weight` of a tensor that is a watched weight; any other tensor itself."""
        name = self.watched.get(id(tensor))
        return tensor if name is None else self.replace_weight(name, tensor)

    def __torch_function__(self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Replace the input if a watched weight is contracted, then call the function."""
        kwargs = kwargs or {}
        if func in RECURRENT:
            args, kwargs = tree_map_only(Tensor, self._replace_watched, (args, kwargs))
        if (read := next(find_inputs(self.watched, func, args, kwargs), None)) is not None:
            name, value, dim = read
            new = self.replace_input(name, value, dim)
            args = tuple(new if arg is value else arg for arg in args)
            kwargs = {key: new if arg is value else arg for key, arg in kwargs.items()}
        return func(*args, **kwargs)


class InputSums(TorchFunctionMode):
    """A torch-function mode that sums the inputs of watched weights into ``sums``, weight name → ``Moments``.

    Args:
        watched: ``id`` of a weight → its name.
        sequences: How many the batch has; the rows of an input belong to them in equal, consecutive parts.
        mask: False at positions that do not count (padding), ``[sequences, tokens]``; ``None``: all count.
    """

    def __init__(self, watched: Mapping[int, str], sequences: int, mask: Tensor | None) -> None:
        super().__init__()
        self.watched, self.sequences, self.mask = watched, sequences, mask
        self.sums: dict[str, Moments] = {}

    def __torch_function__(self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Sum the input if a watched weight is contracted, then call the function."""
        kwargs = kwargs or {}
        if self.watched:
            for name, value, dim in find_inputs(self.watched, func, args, kwargs, _EVERYWHERE):
                with torch.no_grad():
                    self._add_input(name, value.detach(), dim)
        return func(*args, **kwargs)

    def _add_input(self, name: str, value: Tensor, dim: int) -> None:
        """Add the sums of an input, contracted along ``dim`` (< 0), to those of the weight ``name``, in place."""
        rows, channels = to_rows(value, dim, self.sequences)
        masked = self.mask is not None and channels == 2 and rows.shape[:2] == self.mask.shape
        moments = _sum_moments(rows, channels, self.mask if masked else None)
        if moments.count:
            self.sums[name] = self.sums[name] + moments if name in self.sums else moments


def to_rows(value: Tensor, dim: int, sequences: int) -> tuple[Tensor, int]:
    """Return an input as ``[sequences, positions, channels]`` and 2, or ``[sequences, channels, positions]`` and 1.

    ``dim``, counted from the end, is the dimension of ``value`` that is contracted: that of the channels.
    """
    if dim != -1:
        return value.reshape(-1, *value.shape[dim:]).flatten(2), 1
    if value.dim() > 2 and value.shape[0] != sequences and value.shape[1] == sequences:
        value = value.transpose(0, 1)  # positions first, as nn.MultiheadAttention has it
    share = sequences if value.shape[:-1].numel() % sequences == 0 else 1
    return value.reshape(share, -1, value.shape[-1]), 2


def visible_rows(value: Tensor, dim: int, batch: Batch) -> Tensor | None:
    """Return which positions of an input ``value`` are no padding, in its order, ``[positions]`` bool, on the CPU.

    ``None``: nothing is padding, or the input does not have the positions of the batch. ``dim``: as of :func:`to_rows`.

    >>> batch = Batch((), {"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])})
    >>> visible_rows(torch.zeros(2, 3, 4), -1, batch).tolist()
    [True, True, True, True, False, False]
    >>> visible_rows(torch.zeros(3, 2, 4), -1, batch).tolist()  # positions first
    [True, True, True, False, True, False]
    """
    mask = visible_positions(batch)
    if mask is None or dim != -1 or value.dim() < 2:
        return None
    if value.shape[:-1] == mask.shape:
        return mask.flatten().cpu()
    if value.shape[:-1] == mask.T.shape:
        return mask.T.flatten().cpu()
    return mask.flatten().cpu() if value.dim() == 2 and len(value) == mask.numel() else None


def _sum_moments(rows: Tensor, channels: int, mask: Tensor | None) -> Moments:
    """Return sums over the sequences and positions of ``rows`` where ``mask`` is true (``None``: everywhere).

    They are float32 within a chunk, float64 between chunks; ``channels`` is the dimension of the channels, 1 or 2.
    """
    positions = 3 - channels
    hidden = None if mask is None else ~mask.to(rows.device)
    # Memory that is reused: fresh memory costs as much as the sums. Sums depend on the layout, which copies have anew.
    reuse = rows.is_contiguous()
    step = max(1, CHUNK // max(1, rows[0].numel())) if rows.device.type == "cpu" and len(rows) else max(1, len(rows))
    strips = rows.split(_strip_width(rows, channels), channels)
    sums = [_sum_strip(strip, channels, step, hidden, reuse) for strip in strips]
    total, square = torch.cat([totals for totals, _ in sums], 1), torch.cat([squares for _, squares in sums])
    # Where the mask is on the CPU, the host waits for no device.
    count = len(rows) * rows.shape[positions] if mask is None else int(mask.sum())
    return Moments(count, total.sum(0), square)


def _strip_width(rows: Tensor, channels: int) -> int:
    """Return how many channels are summed at a time: so many that a sequence fits the cache, or all.

    A thread sums columns in groups of GROUP, and what is left over in another order: so nothing may be left over.
    """
    width, group = rows.shape[channels], GROUP * torch.get_num_threads()
    splits = rows.device.type == "cpu" and channels == 2 and rows.is_contiguous() and width % group == 0
    if not splits or not len(rows) or rows[0].numel() <= CHUNK:
        return max(1, width)
    return max(1, CHUNK // rows.shape[1] // group) * group


def _sum_strip(rows: Tensor, channels: int, step: int, hidden: Tensor | None, reuse: bool) -> tuple[Tensor, Tensor]:
    """Return float64 sums over positions: of each sequence, ``[sequences, channels]``; of all squares, ``[channels]``.

    ``channels``: the dimension of the channels, 1 or 2; ``step``: how many sequences are summed at a time; ``hidden``:
    positions left out; ``reuse``: one buffer for all.
    """
    positions = 3 - channels
    home = torch.device("cpu") if rows.device.type == "mps" else rows.device  # which has no float64
    totals, square = [], torch.zeros(rows.shape[channels], dtype=torch.float64, device=home)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    room = torch.empty((min(step, len(rows)), *rows.shape[1:]), dtype=wide, device=rows.device) if reuse else None
    for index, part in enumerate(rows.split(step)):
        buffer = None if room is None else room[: len(part)]
        if part.dtype != wide:
            part = part.to(wide) if buffer is None else buffer.copy_(part)
        if hidden is not None:
            part = part.masked_fill(hidden[index * step : index * step + len(part), :, None], 0)
        totals.append(part.sum(positions).to(home, torch.float64))
        squares = part * part if buffer is None else torch.mul(part, part, out=buffer)
        square += squares.sum((0, positions)).to(home, torch.float64)
    return torch.cat(totals), square
