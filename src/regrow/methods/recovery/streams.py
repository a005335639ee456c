"""Refit layers while a network runs: the dense one with the cut one's layers, or the cut one beside the dense one.

Networks that are larger than memory run one block at a time. The text runs through each block in the same batches as
through a network in memory, and so the results are the same bit for bit.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.errors import InputError
from regrow.core.sources import Batch, device_of
from regrow.core.turns import StopRunError, Turns
from regrow.methods.recovery.paired_forward import LayerCall, LayerCalls, LayerOutputs, run_in_thread
from regrow.methods.recovery.refit_work import Layer, RefitWork
from regrow.methods.recovery.task import RecoveryTask, StreamedPair
from regrow.scoring.watch import visible_rows
from regrow.streaming.network import Around
from regrow.surgery.compensate import bias_of

Rows = tuple[Tensor, Tensor, Tensor]
"""A layer's inputs, its target and target − output, one row per position."""
ReadRows = Callable[[int, Layer, LayerCall], Rows | None]
"""(number of the batch, layer, its call) → the rows; ``None`` without a target."""


def count_calls(task: RecoveryTask, names: Collection[str], batch: Batch) -> tuple[Counter[str], Counter[str]]:
    """Return how often each of some layers of the cut network runs in a forward pass, and how often it is added."""
    times, added = Counter[str](), Counter[str]()

    def count(call: LayerCall) -> None:
        times[call.name] += 1
        added[call.name] += call.other is not None

    @contextmanager
    def counting(number: int, watched: Mapping[int, str]) -> Iterator[None]:
        calls = LayerCalls(watched, count)
        with calls:
            yield
        if task.streamed:
            added.update(call.name for call in calls.waiting.values())  # the next block may add it
        calls.finish()

    if task.streamed:
        task.streamed.model.visit([batch], names, counting)
    else:
        _visit(task.model, [batch], names, counting, Turns(1))
    return times, added


def compare_outputs(work: RefitWork, batch: Batch) -> tuple[Any, Any]:
    """Return the outputs of the dense network with the cut one's layers in it, and of the cut network."""
    task, pair = work.task, work.task.streamed
    put = lambda call: _put_in_dense(work, work.layers[call.name], call)  # noqa: E731
    if pair is None:
        mode = LayerCalls(_watched(task.dense, work.layers), put)
        with mode:
            carried = batch.to(device_of(task.dense)).run(task.dense)
        mode.finish()
        return carried, batch.run(task.model)

    @contextmanager
    def carrying(number: int, watched: Mapping[int, str]) -> Iterator[None]:
        with _layers_of(pair, watched.values(), ()) as work.own:
            mode = LayerCalls(watched, put)
            with mode:
                yield
            mode.finish()

    (carried,) = pair.dense.outputs([batch], work.layers, carrying)
    (recovered,) = pair.model.outputs([batch])
    return carried, recovered


def refit_layers(work: RefitWork, target: str, added: Sequence[str]) -> None:
    """Run the networks until all layers are refitted to ``target``; a user's interrupt first writes those done so far.

    ``added`` names the weights of the layers that get a bias.
    """
    task, pair, batches = work.task, work.task.streamed, [part.batch for part in work.batches]
    turns, waiting = Turns(len(batches)), work.waiting
    place = _layers_of if target == "own" else _block_of

    @contextmanager
    def loading(watched: Mapping[int, str]) -> Iterator[None]:
        assert pair is not None
        with place(pair, watched.values(), added) as work.own, torch.no_grad():
            for name in (name for name in work.own if name in pair.changed):  # refitted before an interruption
                work.own[name].copy_(pair.changed[name])
            yield

    def run_dense(around: Around, turns: Turns) -> None:
        if pair:
            pair.dense.visit_together(batches, waiting, around, turns)
        else:
            _visit(task.dense, batches, waiting, around, turns)

    with ExitStack() as stack:
        rows: ReadRows
        put: Callable[[Layer, LayerCall], None]
        if target == "own":
            rows, put = partial(_rows_in_dense, work), partial(_put_in_dense, work)
        else:
            dense = stack.enter_context(run_in_thread(run_dense, len(batches)))
            rows, put = partial(_rows_paired, work, dense), _compute_again
        modes = stack.enter_context(_results_used(pair)) if pair and target != "own" else threading.local()

        def refit(number: int, call: LayerCall) -> None:
            """Refit a layer once all batches have reached it, unless an interrupted call had; update its output."""
            layer = work.layers[call.name]
            work.reach(layer)
            if layer.name in work.waiting:
                _add(work, number, layer, call, rows)
            turns.wait(number)
            work.finish(layer)
            put(layer, call)

        @contextmanager
        def refitting(number: int, watched: Mapping[int, str]) -> Iterator[None]:
            if target != "own":
                watched = {key: name for key, name in watched.items() if name in waiting}
            modes.present = mode = LayerCalls(watched, partial(refit, number))
            with torch.no_grad():
                with mode:
                    yield
                mode.finish()

        try:
            with suppress(StopRunError):
                if pair:
                    network = pair.dense if target == "own" else pair.model
                    network.visit_together(batches, work.layers, refitting, turns, loading)
                else:
                    _visit(task.dense if target == "own" else task.model, batches, work.layers, refitting, turns)
        except KeyboardInterrupt:
            work.write()
            raise


def check_places(pair: StreamedPair, layers: Sequence[Layer]) -> None:
    """Raise InputError unless all layers to refit lie in blocks."""
    inside = {name for block in pair.dense.blocks for name in block.names}
    if other := next((layer.name for layer in layers if layer.name not in inside), None):
        raise InputError(
            f"{other}, which reads what was cut, lies outside the blocks, so that refit needs both networks in memory; "
            "give more memory, or recover by bias"
        )


def _visit(model: nn.Module, batches: Sequence[Batch], names: Collection[str], around: Around, turns: Turns) -> None:
    """Run batches through a network in memory, each in its context and all in turns."""
    watched = _watched(model, names)

    def run(number: int) -> None:
        with around(number, watched):
            batches[number].to(device_of(model)).run(model)

    turns.run(run)


def _watched(model: nn.Module, names: Collection[str]) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters() if name in names}


def _add(work: RefitWork, number: int, layer: Layer, call: LayerCall, rows: ReadRows) -> None:
    """Add the rows of a batch to the sums of a layer; the rows are released before the batch waits."""
    if (values := rows(number, layer, call)) is not None:
        inputs, target, missing = values
        shown = visible_rows(call.value, call.dim, work.batches[number].batch)
        work.add(layer, number, inputs, target, missing, shown)


def _rows_in_dense(work: RefitWork, number: int, layer: Layer, call: LayerCall) -> Rows:
    """Return the cut layer's inputs, the dense layer's output as target, and target − the cut layer's output."""
    target = _rows(call.output, call.output.dim() + call.dim, layer.rows)
    inputs = _cut_inputs(work, layer, call)
    return inputs, target, target - _cut_output(work, layer, inputs)


def _put_in_dense(work: RefitWork, layer: Layer, call: LayerCall) -> None:
    """Overwrite the output with the cut layer's; outputs that it does not have stay, since nothing reads them.

    So the activations are those of the cut network; only the watched layers read dropped units.
    """
    channel = call.output.dim() + call.dim
    form = call.output.movedim(channel, -1).shape[:-1]
    output = _cut_output(work, layer, _cut_inputs(work, layer, call))
    output = output.reshape(*form, -1).movedim(-1, channel).to(call.output.dtype)
    if layer.rows is None:
        call.output.copy_(output)
    else:
        call.output.index_copy_(channel, layer.rows.to(call.output.device), output)


def _cut_inputs(work: RefitWork, layer: Layer, call: LayerCall) -> Tensor:
    kept = call.value.index_select(call.dim, layer.kept.to(call.value.device))
    return _inputs(work.task.model, layer, kept, call.dim)


def _cut_output(work: RefitWork, layer: Layer, inputs: Tensor) -> Tensor:
    weight, bias = work.own[layer.name], work.own.get(bias_of(layer.name))
    flat = weight.flatten(1) if layer.dim else weight.T
    return F.linear(inputs, flat.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))


def _rows_paired(work: RefitWork, dense: LayerOutputs, number: int, layer: Layer, call: LayerCall) -> Rows | None:
    """Return the layer's inputs, the dense network's value where the output goes, and the difference to it.

    Where the output is added to a residual stream, the target is dense output + dense stream − own stream.
    """
    answer, channel = dense(number, layer.name), call.output.dim() + call.dim
    if answer is None:
        return None
    device = call.output.device
    target = _rows(answer[0].to(device), channel, layer.rows)
    missing = target - _rows(call.output, channel)
    if answer[1] is not None and call.other is not None:
        stream = _rows(answer[1].to(device), channel, layer.rows)
        target, missing = target + stream, missing + (stream - _rows(call.other, channel))
    return _inputs(work.task.model, layer, call.value, call.dim), target, missing


def _compute_again(layer: Layer, call: LayerCall) -> None:
    call.output.copy_(call.again())


def _rows(value: Tensor, channel: int, some: Tensor | None = None) -> Tensor:
    """Reshape a tensor to ``[positions, channels]`` in float32 (float64 stays), with only some channels if asked."""
    value = value if some is None else value.index_select(channel, some.to(value.device))
    value = value.movedim(channel, -1).flatten(0, -2)
    return value if value.dtype == torch.float64 else value.float()


def _inputs(model: nn.Module, layer: Layer, value: Tensor, dim: int) -> Tensor:
    """Return what a layer multiplies by its weight at each position, ``[positions, k]``, in float32 or float64."""
    module = model.get_submodule(layer.name.rpartition(".")[0])
    if not isinstance(module, nn.Conv2d):
        return _rows(value, value.dim() + dim)
    assert not isinstance(module.padding, str)
    return _rows(F.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride), 1)


@contextmanager
def _layers_of(pair: StreamedPair, weights: Collection[str], added: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Context manager in which layers of the cut network are in memory as they were; gives their parameters by name."""
    stored = pair.model.weights.stored
    names = [name for weight in weights for name in (weight, bias_of(weight)) if name in stored]
    with pair.model.resident(names):
        own = {name: pair.model.model.get_parameter(name) for name in names}
        for weight in set(weights) & set(added):
            outputs = pair.model.model.get_parameter(bias_of(weight)).shape
            own[bias_of(weight)] = nn.Parameter(own[weight].new_zeros(outputs), requires_grad=False)
        yield own


@contextmanager
def _block_of(pair: StreamedPair, weights: Collection[str], added: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Context manager in which layers of the cut network's present block have the biases that they get; gives both."""
    model, biases = pair.model.model, [bias_of(weight) for weight in weights if weight in added]
    before = {name: model.get_parameter(name) for name in biases}
    try:
        for name, empty in before.items():
            _put(model, name, nn.Parameter(torch.zeros(empty.shape, dtype=empty.dtype), requires_grad=False))
        every = dict(model.named_parameters())
        yield {name: every[name] for weight in weights for name in (weight, bias_of(weight)) if name in every}
    finally:
        for name, empty in before.items():
            _put(model, name, empty)


def _put(model: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


@contextmanager
def _results_used(pair: StreamedPair) -> Iterator[threading.local]:
    """Context manager in which no block may return a layer's output as it is; gives the place of each thread's mode.

    What is added to it later is a part of the target, and lies outside the block.
    """
    modes = threading.local()

    def checked(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            for one in tree_leaves(result):
                if isinstance(one, Tensor) and (call := modes.present.call_of(one)):
                    raise InputError(
                        f"{path} returns the output of {call.name} as it is, so that refit with target=dense needs "
                        "both networks in memory; give more memory, or target=own"
                    )
            return result

        return run

    with ExitStack() as stack:
        for block in pair.model.blocks:
            module = pair.model.model.get_submodule(block.path)
            stack.callback(_restore_forward, module, vars(module).get("forward"))
            module.forward = checked(block.path, module.forward)
        yield modes


def _restore_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own
