"""Gates: scale units where they are consumed, in the forward pass, without changing the network."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.scoring.watch import InputHook
from regrow.scoring.weights import Reader, group_by_weight, readers


@contextmanager
def gate_inputs(
    model: nn.Module, axes: AxisGraph, gates: Mapping[str, Tensor], fills: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Context manager in which each weight that consumes a gated axis is fed ``fill + gate · (x − fill)``.

    ``gates``: axis key → ``[size]``; ``fills``: name of a weight → ``[channels]``, 0 for weights not named. A gate of 1
    passes x, a gate of 0 the fill. With gates of 0 and 1 this is the network that the cut would leave, for axes that
    only weights consume; with means as fills, the bias-compensated one. Gradients reach the gates.
    """
    reads = readers(axes, [axes[key] for key in gates])
    parameters = dict(model.named_parameters())
    watched = {id(parameters[reader.weight]): reader.weight for reader in reads}
    with _GateFeed(watched, group_by_weight(reads), gates, fills or {}):
        yield


def make_gates(axes: AxisGraph, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return axis key → gates ``[size]`` float32: 1 for the units kept, 0 for the others."""
    return {
        key: torch.zeros(axes[key].size).index_fill(0, torch.tensor(units, dtype=torch.int64), 1.0)
        for key, units in kept.items()
    }


class _GateFeed(InputHook):
    """Multiplies the inputs of weights by the gates of their channels, or moves them towards fills.

    ``watched``: id of a weight → its name; ``reads``: its name → the axes that it consumes; ``gates``, ``fills``: as in
    :func:`gate_inputs`.
    """

    def __init__(
        self,
        watched: Mapping[int, str],
        reads: Mapping[str, Sequence[Reader]],
        gates: Mapping[str, Tensor],
        fills: Mapping[str, Tensor],
    ) -> None:
        super().__init__(watched)
        self.reads, self.gates, self.fills = reads, gates, fills
        self.channel_gates: dict[tuple[str, int], Tensor] = {}

    def replace_input(self, name: str, value: Tensor, dim: int) -> Tensor:
        """Return ``value``, an input of the weight ``name``, gated along its dimension ``dim`` (negative)."""
        shape = [-1, *[1] * (-dim - 1)]
        gate = self._channels(name, value.shape[dim]).to(value).view(shape)
        if name not in self.fills:
            return value * gate
        fill = self.fills[name].to(value).view(shape)
        return value * gate + fill * (1 - gate)

    def replace_weight(self, name: str, weight: Tensor) -> Tensor:
        """Return a recurrent weight with its columns gated, which is the same as gating its inputs."""
        if name in self.fills:
            raise ValueError(f"{name!r} is read inside a recurrent layer, where no mean stands in for an input")
        return weight * self._channels(name, weight.shape[1]).to(weight)

    def _channels(self, name: str, channels: int) -> Tensor:
        """Return the gate of each input channel of a weight: the product over the gated axes in that dimension."""
        if (name, channels) not in self.channel_gates:
            total: Tensor | None = None
            for reader in self.reads[name]:
                gate = self.gates[reader.axis]
                where = reader.positions(channels)
                owner = torch.full((channels,), reader.size)
                owner[where.flatten()] = torch.arange(reader.size).repeat_interleave(where.shape[1])
                spread = torch.cat([gate, gate.new_ones(1)])[owner.to(gate.device)]
                total = spread if total is None else total * spread
            assert total is not None
            self.channel_gates[name, channels] = total
        return self.channel_gates[name, channels]


@contextmanager
def parametrize(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager in which modules use ``values`` (name → tensor) in place of parameters; gradients reach them.

    A parameter that modules share is replaced in all of them. It must last until the backward pass is over, since
    activation checkpointing runs modules again.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> with parametrize(net, {"weight": net.weight * 0}):
    ...     net(net.weight.new_ones(1, 2)).item()
    0.0
    """
    replaced = {id(model.get_parameter(name)): value for name, value in values.items()}
    held: list[tuple[nn.Module, str]] = []
    try:
        for module in model.modules() if replaced else ():
            for leaf, parameter in module._parameters.items():
                if (value := replaced.get(id(parameter))) is not None:
                    held.append((module, leaf))
                    # Modules look up parameters by name only where they have no attribute of that name.
                    module.__dict__[leaf] = value
        yield
    finally:
        for module, leaf in held:
            module.__dict__.pop(leaf, None)
