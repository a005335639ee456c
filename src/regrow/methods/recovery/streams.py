"""Refit layers during a forward pass: inside the dense network with the cut one's layers, or beside the dense one."""

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.methods.recovery.paired_forward import LayerCall, LayerCalls, LayerOutputs, StopRunError
from regrow.methods.recovery.solve import RidgeCandidates
from regrow.methods.recovery.streamed import ChangedTensors
from regrow.methods.recovery.task import RecoveryTask
from regrow.surgery.compensate import bias_of

SECONDS = 60.0
"""The longest time between two checkpoints, in seconds, as long as layers are handled."""


@dataclass(frozen=True)
class Layer:
    """A layer to refit, and which of the dense layer's inputs and outputs it still has.

    Args:
        name: The name of its weight.
        dim: The dimension of the weight along which its inputs lie.
        kept: The indices of the dense layer's inputs that the cut layer has.
        rows: The indices of the dense layer's outputs that the cut layer has; ``None``: all.
    """

    name: str
    dim: int
    kept: Tensor
    rows: Tensor | None


@dataclass
class RefitWork:
    """The progress of a refit over all layers.

    Args:
        task: The two networks.
        layers: Weight name → the layer.
        candidates: What is tried for each layer, and on which positions it is judged.
        own: The parameters of the cut network.
        records: Per finished layer, in the order in which they run, :meth:`RidgeCandidates.record`.
        changed: Where each layer is kept once it is solved, if the networks are larger than memory: ``own`` holds the
            parameters of the present block alone. ``None``: all are in memory, and kept in the task's checkpoint.
    """

    task: RecoveryTask
    layers: Mapping[str, Layer]
    candidates: RidgeCandidates
    own: Mapping[str, nn.Parameter]
    records: list[dict[str, Any]] = field(default_factory=list)
    changed: ChangedTensors | None = None

    @property
    def refitted(self) -> set[str]:
        """The names of the weights that have been refitted."""
        return {row["weight"] for row in self.records if row["ridge"]}

    @property
    def waiting(self) -> set[str]:
        """The names of the weights that have not been handled."""
        return {*self.layers} - {row["weight"] for row in self.records}

    @property
    def done(self) -> bool:
        """Whether every layer has been handled."""
        return len(self.records) == len(self.layers)

    def resume(self) -> None:
        """Load the layers that an interrupted call had solved, from the task's checkpoint."""
        if self.changed is not None:
            self.records = list(self.changed.records)
        elif (done := self.task.read()) is not None:
            _, tensors, stored = done
            self.records = [dict(row) for row in stored["layers"]]
            with torch.no_grad():
                for name, tensor in tensors.items():
                    self.own[name].copy_(tensor)

    def write(self) -> None:
        """Write a checkpoint of the layers that are done, unless each is kept on its own."""
        if self.changed is not None:
            return
        names = [n for weight in sorted(self.refitted) for n in (weight, bias_of(weight)) if n in self.own]
        tensors = {name: self.own[name].detach() for name in names}
        self.task.write(len(self.records), tensors, {"layers": [dict(row) for row in self.records]})

    def solve(self, layer: Layer, inputs: Tensor, target: Tensor, missing: Tensor) -> None:
        """Fit a layer by ridge regression, in place, and record its error before and after.

        Args:
            layer: The layer.
            inputs: The inputs of the layer, ``[rows, k]``.
            target: The outputs that it should have, ``[rows, out]``.
            missing: The target minus the current output, ``[rows, out]``.
        """
        weight, bias = self.own[layer.name], self.own.get(bias_of(layer.name))
        if bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        choice = self.candidates.choose(inputs, target, missing, bias=bias is not None)
        if (change := choice.change) is not None:
            own = change if bias is None else change[:-1]
            weight.copy_(weight.double() + (own.T if layer.dim else own).reshape(weight.shape))
            if bias is not None:
                bias.copy_(bias.double() + change[-1])
        record = self.candidates.record(layer.name, choice)
        self.records.append(record)
        if self.changed is not None:
            named = {layer.name: weight, bias_of(layer.name): bias}
            made = {name: one.detach() for name, one in named.items() if one is not None}
            self.changed.write(made if record["ridge"] else {}, record)


class Refitting(LayerCalls):
    """Refits each watched layer before its output is used, and ends the forward pass after the last one.

    Args:
        watched: ``id`` of a weight → its name.
        work: The refit.
    """

    def __init__(self, watched: Mapping[int, str], work: RefitWork) -> None:
        super().__init__(watched)
        self.work, self.last = work, time.monotonic()
        self.solved = {row["weight"] for row in work.records}

    @abstractmethod
    def rows(self, layer: Layer, call: LayerCall) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return a layer's inputs, its target and target − output, one row per position; ``None`` without a target.

        Args:
            layer: The layer.
            call: Its input and output in this forward pass.
        """

    @abstractmethod
    def put(self, layer: Layer, call: LayerCall) -> None:
        """Overwrite the layer's output in the forward pass with that of the refitted layer.

        Args:
            layer: The layer.
            call: Its input and output in this forward pass.
        """

    def handle(self, call: LayerCall) -> None:
        """Refit a layer, unless an interrupted call had done it, and update its output.

        Args:
            call: The layer, its input and its output.
        """
        work, task = self.work, self.work.task
        layer = work.layers[call.name]
        if layer.name not in self.solved and (rows := self.rows(layer, call)) is not None:
            work.solve(layer, *rows)
            last = work.records[-1]
            words = f"refitting, error {last['before']:.3f} → {last['after']:.3f}"
            task.progress(len(work.records), len(work.layers), words)
        if work.done or time.monotonic() - self.last > SECONDS:
            work.write()
            self.last = time.monotonic()
        if work.done:
            raise StopRunError
        self.put(layer, call)


class RefitInDense(Refitting):
    """Runs the dense network with the cut network's layers in it, and refits each to what the dense layer would give.

    Each watched layer's output is replaced by that of the cut network's layer, so that the activations are those of the
    cut network. Nothing else differs between the networks, since only the watched layers read dropped units.

    Args:
        watched: ``id`` of a weight of the dense network → its name.
        work: The refit.
        fit: Whether layers are refitted; if not, the network is only run, to test whether it computes what the cut one
            does.
    """

    def __init__(self, watched: Mapping[int, str], work: RefitWork, *, fit: bool = True) -> None:
        super().__init__(watched, work)
        self.fit = fit
        self.fed = torch.empty(0)

    def handle(self, call: LayerCall) -> None:
        """Refit a layer (if ``fit``), and replace its output by that of the cut network's layer.

        Args:
            call: The layer, its input and its output in the dense network.
        """
        layer = self.work.layers[call.name]
        inputs = inputs_of(
            self.work.task.model, layer, call.value.index_select(call.dim, layer.kept.to(call.value.device)), call.dim
        )
        self.fed = inputs
        if self.fit:
            super().handle(call)
        else:
            self.put(layer, call)

    def rows(self, layer: Layer, call: LayerCall) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the cut layer's inputs, the dense layer's output as target, and target − the cut layer's output.

        Args:
            layer: The layer.
            call: Its input and output in the dense network.
        """
        target = rows_of(call.output, call.output.dim() + call.dim, layer.rows)
        return self.fed, target, target - self._given(layer)

    def put(self, layer: Layer, call: LayerCall) -> None:
        """Overwrite the output with the cut layer's; outputs that it does not have stay, since nothing reads them.

        Args:
            layer: The layer.
            call: Its input and output in the dense network.
        """
        channel = call.output.dim() + call.dim
        form = call.output.movedim(channel, -1).shape[:-1]
        given = self._given(layer).reshape(*form, -1).movedim(-1, channel).to(call.output.dtype)
        if layer.rows is None:
            call.output.copy_(given)
        else:
            call.output.index_copy_(channel, layer.rows.to(call.output.device), given)

    def _given(self, layer: Layer) -> Tensor:
        weight, bias = self.work.own[layer.name], self.work.own.get(bias_of(layer.name))
        flat = weight.flatten(1) if layer.dim else weight.T
        return F.linear(self.fed, flat.to(self.fed.dtype), None if bias is None else bias.to(self.fed.dtype))


class RefitPaired(Refitting):
    """Runs the cut network beside the dense one, and refits each layer to the dense network's value at the same place.

    Where a layer's output is added to a residual stream, the target is dense output + dense stream − own stream.

    Args:
        watched: ``id`` of a weight of the cut network → its name.
        work: The refit.
        dense: The outputs of the dense network's layers.
    """

    def __init__(self, watched: Mapping[int, str], work: RefitWork, dense: LayerOutputs) -> None:
        super().__init__(watched, work)
        self.dense = dense

    def rows(self, layer: Layer, call: LayerCall) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the layer's inputs, the dense network's value where the output goes, and the difference to it.

        Args:
            layer: The layer.
            call: Its input and output in the cut network.
        """
        answer, channel = self.dense(layer.name), call.output.dim() + call.dim
        if answer is None:
            return None
        device = call.output.device
        target = rows_of(answer[0].to(device), channel, layer.rows)
        missing = target - rows_of(call.output, channel)
        if answer[1] is not None and call.other is not None:
            stream = rows_of(answer[1].to(device), channel, layer.rows)
            target, missing = target + stream, missing + (stream - rows_of(call.other, channel))
        return inputs_of(self.work.task.model, layer, call.value, call.dim), target, missing

    def put(self, layer: Layer, call: LayerCall) -> None:
        """Compute the layer's output again with its refitted weight.

        Args:
            layer: The layer.
            call: Its input and output in the cut network.
        """
        call.output.copy_(call.again())


def rows_of(value: Tensor, channel: int, some: Tensor | None = None) -> Tensor:
    """Reshape a tensor to ``[positions, channels]`` in float32 (float64 stays), with only some channels if asked.

    Args:
        value: The tensor.
        channel: The dimension of the channels.
        some: The indices of the channels to keep; ``None``: all.
    """
    value = value if some is None else value.index_select(channel, some.to(value.device))
    value = value.movedim(channel, -1).flatten(0, -2)
    return value if value.dtype == torch.float64 else value.float()


def inputs_of(model: nn.Module, layer: Layer, value: Tensor, dim: int) -> Tensor:
    """Return what a layer multiplies by its weight at each position, ``[positions, k]``, in float32 or float64.

    Args:
        model: The cut network, whose module has the kernel size, stride and padding of a convolution.
        layer: The layer.
        value: The input of the layer.
        dim: The dimension of the input that is contracted with the weight, negative: from the end.
    """
    module = model.get_submodule(layer.name.rpartition(".")[0])
    if not isinstance(module, nn.Conv2d):
        return rows_of(value, value.dim() + dim)
    assert not isinstance(module.padding, str)
    return rows_of(F.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride), 1)
