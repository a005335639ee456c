"""Refit layers while a network runs: the dense one with the cut one's layers, or the cut one beside the dense one.

Networks that are larger than memory run one block at a time. The text runs through each block in the same batches as
through a network in memory, and so the results are the same bit for bit.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.core.errors import InputError
from regrow.core.sources import Batch, device_of
from regrow.core.turns import StopRunError, Turns
from regrow.methods.recovery import RecoveryTask, StreamedPair
from regrow.methods.recovery.paired_forward import LayerCall, LayerCalls, LayerOutputs, run_in_thread
from regrow.methods.recovery.refit_work import Layer, RefitWork
from regrow.scoring.watch import visible_rows
from regrow.streaming.network import Around, StreamedNetwork
from regrow.surgery.compensate import bias_of

# A layer's inputs [positions, k], its target and its residual (target − output), both [positions, channels].
Rows = tuple[Tensor, Tensor, Tensor]


def _run_together(
    network: nn.Module | StreamedNetwork,
    batches: Sequence[Batch],
    names: Collection[str],
    around: Around,
    turns: Turns,
    loading: Callable[[Mapping[int, str]], AbstractContextManager[object]] = lambda watched: nullcontext(),
) -> None:
    """Run batches through a network in turns, each inside ``around(number, watched)``; ``number``: its index.

    ``watched``: ``id`` → name of the weights ``names``; ``loading``: ``watched`` of a block → context manager in which
    the block of a streamed network runs.
    """
    if isinstance(network, StreamedNetwork):
        network.visit_together(batches, names, around, turns, loading)
        return
    watched = _watch_parameters(network, names)

    def run(number: int) -> None:
        with around(number, watched):
            batches[number].to(device_of(network)).run(network)

    turns.run(run)


def _watch_parameters(model: nn.Module, names: Collection[str]) -> dict[int, str]:
    """Return ``id`` → name of those parameters of a network that ``names`` has."""
    return {id(parameter): name for name, parameter in model.named_parameters() if name in names}


def count_calls(task: RecoveryTask, names: Collection[str], batch: Batch) -> tuple[Counter[str], Counter[str]]:
    """Return (weight → runs of its layer in a pass of the cut network; weight → additions of a tensor to its output).

    ``names``: the weights that are watched. An addition counts if it is the first use of the output.
    """
    times, added = Counter[str](), Counter[str]()

    def count(call: LayerCall) -> None:
        times[call.name] += 1
        added[call.name] += call.other is not None

    @contextmanager
    def counting(number: int, watched: Mapping[int, str]) -> Iterator[None]:
        with LayerCalls(watched, count) as calls:
            yield
            if task.streamed:
                added.update(call.name for call in calls.unused.values())  # the next block may add it

    _run_together(task.streamed.model if task.streamed else task.model, [batch], names, counting, Turns(1))
    return times, added


def compute_outputs(work: RefitWork, batch: Batch) -> tuple[Any, Any]:
    """Return (the dense network's output with the cut one's layers in it, the cut network's output) on a batch."""
    task, pair, cut = work.task, work.task.streamed, _OwnTarget(work)

    @contextmanager
    def carrying(number: int, watched: Mapping[int, str]) -> Iterator[None]:
        with (
            cut.resident(pair, watched.values(), ()) if pair else nullcontext(work.parameters) as work.parameters,
            LayerCalls(watched, lambda call: cut.put(work.layers[call.name], call)),
        ):
            yield

    if pair:
        (carried,) = pair.dense.outputs([batch], work.layers, carrying)
        (recovered,) = pair.model.outputs([batch])
        return carried, recovered
    with carrying(0, _watch_parameters(task.dense, work.layers)):
        carried = batch.to(device_of(task.dense)).run(task.dense)
    return carried, batch.run(task.model)


def refit_layers(work: RefitWork, target: str, added: Sequence[str]) -> None:
    """Run the networks until all layers are refitted in place to ``target``, ``own`` or ``dense``.

    The targets are those of ``refit.Settings``, with ``auto`` and ``residual`` resolved. ``added``: weights that got a
    new bias.
    """
    task, pair, batches = work.task, work.task.streamed, [part.batch for part in work.batches]
    turns, unsolved, own = Turns(len(batches)), work.unsolved, _OwnTarget(work)

    def run_dense(around: Around, turns: Turns) -> None:
        _run_together(task.dense, batches, unsolved, around, turns)

    with ExitStack() as stack:
        fitted: _OwnTarget | _DenseTarget = own
        running: nn.Module | StreamedNetwork = pair.dense if pair else task.dense
        if target != "own":
            fitted = _DenseTarget(work, stack.enter_context(run_in_thread(run_dense, len(batches))))
            running = task.model

        @contextmanager
        def loading(watched: Mapping[int, str]) -> Iterator[None]:
            assert pair is not None
            with own.resident(pair, watched.values(), added) as work.parameters, torch.no_grad():
                for name in work.parameters:
                    if name in pair.changed:  # refitted before an interruption
                        work.parameters[name].copy_(pair.changed[name])
                yield

        def refit(number: int, call: LayerCall) -> None:
            """Refit a layer once all batches have reached it, unless an interrupted call had; update its output."""
            layer = work.layers[call.name]
            work.reach(layer)
            with torch.autocast(call.output.device.type, enabled=False):  # sums keep their precision
                if layer.name in work.unsolved:
                    _add_rows(work, number, layer, call, fitted.rows(number, layer, call))
                turns.wait(number)
                work.finish(layer)
            fitted.put(layer, call)

        @contextmanager
        def refitting(number: int, watched: Mapping[int, str]) -> Iterator[None]:
            if target != "own":
                watched = {key: name for key, name in watched.items() if name in unsolved}
            with torch.no_grad(), LayerCalls(watched, partial(refit, number)):
                yield

        with suppress(StopRunError):
            _run_together(running, batches, work.layers, refitting, turns, loading)


def check_in_blocks(pair: StreamedPair, layers: Sequence[Layer]) -> None:
    """Raise InputError unless all layers to refit lie in blocks of the streamed networks."""
    inside = {name for block in pair.dense.blocks for name in block.names}
    if other := next((layer.name for layer in layers if layer.name not in inside), None):
        raise InputError(
            f"{other}, which reads what was cut, lies outside the blocks, so that refit needs both networks in memory; "
            "give more memory"
        )


def _add_rows(work: RefitWork, number: int, layer: Layer, call: LayerCall, rows: Rows | None) -> None:
    """Add a layer's ``rows`` from batch ``number`` to its sums, if any; a function, so that they are freed."""
    if rows is not None:
        inputs, target, residual = rows
        visible = visible_rows(call.value, call.dim, work.batches[number].batch)
        work.add(layer, number, inputs, target, residual, visible)


@dataclass
class _OwnTarget:
    """Fits layers to the output that the uncut layer would have on the cut network's activations.

    The dense network runs with the cut one's layers in it; only these read dropped units.
    """

    work: RefitWork

    def rows(self, number: int, layer: Layer, call: LayerCall) -> Rows:
        """Return the cut layer's inputs, the dense layer's output as target, and target − the cut layer's output.

        ``call``: that of the dense layer; ``number``, the batch, is not needed here.
        """
        target = _to_rows(call.output, call.output.dim() + call.dim, layer.rows)
        inputs = self._input_rows(layer, call)
        return inputs, target, target - self._output_rows(layer, inputs)

    def put(self, layer: Layer, call: LayerCall) -> None:
        """Overwrite the call's output with the cut layer's; channels that it lacks stay, since nothing reads them."""
        channel = call.output.dim() + call.dim
        shape = call.output.movedim(channel, -1).shape[:-1]
        output = self._output_rows(layer, self._input_rows(layer, call))
        output = output.reshape((*shape, -1)).movedim(-1, channel).to(call.output.dtype)
        if layer.rows is None:
            call.output.copy_(output)
        else:
            call.output.index_copy_(channel, layer.rows.to(call.output.device), output)

    def _input_rows(self, layer: Layer, call: LayerCall) -> Tensor:
        """Return the cut layer's part of the dense layer's inputs, ``[positions, k]``."""
        kept = call.value.index_select(call.dim, layer.kept.to(call.value.device))
        return _to_input_rows(self.work.task.model, layer, kept, call.dim)

    def _output_rows(self, layer: Layer, inputs: Tensor) -> Tensor:
        """Return the cut layer's outputs for rows of inputs, ``[positions, channels]``."""
        weight, bias = self.work.parameters[layer.name], self.work.parameters.get(bias_of(layer.name))
        flat = weight.flatten(1) if layer.dim else weight.T
        return F.linear(inputs, flat.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))

    @contextmanager
    def resident(
        self, pair: StreamedPair, weights: Collection[str], added: Sequence[str]
    ) -> Iterator[dict[str, nn.Parameter]]:
        """Context manager in which layers of the unrecovered cut network are in memory; gives name → parameter.

        ``weights``: the names of their weights; ``added``: those that get a bias of zeros.
        """
        stored = pair.model.weights.stored
        names = [name for weight in weights for name in (weight, bias_of(weight)) if name in stored]
        with pair.model.resident(names):
            parameters = {name: pair.model.model.get_parameter(name) for name in names}
            for weight in set(weights) & set(added):
                outputs = pair.model.model.get_parameter(bias_of(weight)).shape
                parameters[bias_of(weight)] = nn.Parameter(parameters[weight].new_zeros(outputs), requires_grad=False)
            yield parameters


@dataclass
class _DenseTarget:
    """Fits layers to the dense network's value where the output goes; the dense network runs beside the cut one."""

    work: RefitWork
    dense: LayerOutputs  # of the dense network, which runs in threads

    def rows(self, number: int, layer: Layer, call: LayerCall) -> Rows | None:
        """Return the layer's inputs, the dense network's output as target, target − output; ``None`` if it has none.

        Where the output is added to a tensor, such as a residual stream, the sums take its place: target = dense
        output + dense tensor, residual = target − (output + own tensor).
        """
        result = self.dense(number, layer.name)
        if result is None:  # the dense network does not run it
            return None
        dense_output, dense_stream = result
        device, channel = call.output.device, call.output.dim() + call.dim  # `call.dim` counts from the end
        target = _to_rows(dense_output.to(device), channel, layer.rows)
        residual = target - _to_rows(call.output, channel)
        if dense_stream is not None and call.other is not None:
            stream = _to_rows(dense_stream.to(device), channel, layer.rows)
            target, residual = target + stream, residual + (stream - _to_rows(call.other, channel))
        return _to_input_rows(self.work.task.model, layer, call.value, call.dim), target, residual

    def put(self, layer: Layer, call: LayerCall) -> None:
        """Overwrite the call's output with that of the fitted weight."""
        call.output.copy_(call.again())


def _to_rows(value: Tensor, channel: int, indices: Tensor | None = None) -> Tensor:
    """Return a tensor as ``[positions, channels]``, at least float32; ``channel``: the dimension of its channels.

    ``indices``: the channels that are taken; ``None``: all.
    """
    value = value if indices is None else value.index_select(channel, indices.to(value.device))
    value = value.movedim(channel, -1).flatten(0, -2)
    return value if value.dtype == torch.float64 else value.float()


def _to_input_rows(model: nn.Module, layer: Layer, value: Tensor, dim: int) -> Tensor:
    """Return what a layer multiplies by its weight at each position, ``[positions, k]``, at least float32.

    ``value``: its input, in which ``dim``, counted from the end, is multiplied by the weight.
    """
    module = model.get_submodule(layer.name.rpartition(".")[0])
    if not isinstance(module, nn.Conv2d):
        return _to_rows(value, value.dim() + dim)
    assert not isinstance(module.padding, str)
    return _to_rows(F.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride), 1)
