"""Refit layers during a forward pass: inside the dense network with the cut one's layers, or beside the dense one."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.core.turns import Turns
from regrow.methods.recovery.paired_forward import LayerCall, LayerCalls, LayerOutputs
from regrow.methods.recovery.refit_work import Layer, RefitWork
from regrow.scoring.watch import visible_rows
from regrow.surgery.compensate import bias_of


class Refitting(LayerCalls):
    """Refits each watched layer before its output is used, and ends the forward pass after the last one.

    Args:
        watched: ``id`` of a weight → its name.
        work: The refit.
        number: The number of the batch that runs.
        turns: The turns that the batches take.
    """

    def __init__(self, watched: Mapping[int, str], work: RefitWork, number: int, turns: Turns) -> None:
        super().__init__(watched)
        self.work, self.number, self.turns = work, number, turns

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
        """Refit a layer once all batches have reached it, unless an interrupted call had done it; update its output.

        Args:
            call: The layer, its input and its output.
        """
        work = self.work
        layer = work.layers[call.name]
        work.reach(layer)
        if layer.name in work.waiting:
            self._add(layer, call)
        self.turns.wait(self.number)
        work.finish(layer)
        self.put(layer, call)

    def _add(self, layer: Layer, call: LayerCall) -> None:
        rows = self.rows(layer, call)  # released before the batch waits
        if rows is not None:
            batch = self.work.batches[self.number].batch
            self.work.add(layer, self.number, *rows, shown=visible_rows(call.value, call.dim, batch))


class RefitInDense(Refitting):
    """Runs the dense network with the cut network's layers in it, and refits each to what the dense layer would give.

    Each watched layer's output is replaced by that of the cut network's layer, so that the activations are those of the
    cut network. Nothing else differs between the networks, since only the watched layers read dropped units.

    Args:
        watched: ``id`` of a weight of the dense network → its name.
        work: The refit.
        number: The number of the batch that runs.
        turns: The turns that the batches take.
        fit: Whether layers are refitted; if not, the network is only run, to test whether it computes what the cut one
            does.
    """

    def __init__(
        self, watched: Mapping[int, str], work: RefitWork, number: int, turns: Turns, *, fit: bool = True
    ) -> None:
        super().__init__(watched, work, number, turns)
        self.fit = fit

    def handle(self, call: LayerCall) -> None:
        """Refit a layer (if ``fit``), and replace its output by that of the cut network's layer.

        Args:
            call: The layer, its input and its output in the dense network.
        """
        if self.fit:
            super().handle(call)
        else:
            self.put(self.work.layers[call.name], call)

    def rows(self, layer: Layer, call: LayerCall) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the cut layer's inputs, the dense layer's output as target, and target − the cut layer's output.

        Args:
            layer: The layer.
            call: Its input and output in the dense network.
        """
        target = rows_of(call.output, call.output.dim() + call.dim, layer.rows)
        inputs = self._inputs(layer, call)
        return inputs, target, target - self._given(layer, inputs)

    def put(self, layer: Layer, call: LayerCall) -> None:
        """Overwrite the output with the cut layer's; outputs that it does not have stay, since nothing reads them.

        Args:
            layer: The layer.
            call: Its input and output in the dense network.
        """
        channel = call.output.dim() + call.dim
        form = call.output.movedim(channel, -1).shape[:-1]
        given = self._given(layer, self._inputs(layer, call))
        given = given.reshape(*form, -1).movedim(-1, channel).to(call.output.dtype)
        if layer.rows is None:
            call.output.copy_(given)
        else:
            call.output.index_copy_(channel, layer.rows.to(call.output.device), given)

    def _inputs(self, layer: Layer, call: LayerCall) -> Tensor:
        kept = call.value.index_select(call.dim, layer.kept.to(call.value.device))
        return inputs_of(self.work.task.model, layer, kept, call.dim)

    def _given(self, layer: Layer, inputs: Tensor) -> Tensor:
        weight, bias = self.work.own[layer.name], self.work.own.get(bias_of(layer.name))
        flat = weight.flatten(1) if layer.dim else weight.T
        return F.linear(inputs, flat.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))


class RefitPaired(Refitting):
    """Runs the cut network beside the dense one, and refits each layer to the dense network's value at the same place.

    Where a layer's output is added to a residual stream, the target is dense output + dense stream − own stream.

    Args:
        watched: ``id`` of a weight of the cut network → its name.
        work: The refit.
        number: The number of the batch that runs.
        turns: The turns that the batches take.
        dense: The outputs of the dense network's layers.
    """

    def __init__(
        self, watched: Mapping[int, str], work: RefitWork, number: int, turns: Turns, dense: LayerOutputs
    ) -> None:
        super().__init__(watched, work, number, turns)
        self.dense = dense

    def rows(self, layer: Layer, call: LayerCall) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the layer's inputs, the dense network's value where the output goes, and the difference to it.

        Args:
            layer: The layer.
            call: Its input and output in the cut network.
        """
        answer, channel = self.dense(self.number, layer.name), call.output.dim() + call.dim
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
