"""Refit of networks that are larger than memory: one block at a time.

For ``own`` the dense network runs, with the cut one's layers in it; for ``dense`` the cut network, and the dense one
beside it in threads. The text runs through each block in the same batches as through a network in memory, and so the
results are the same bit for bit.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.errors import InputError
from regrow.core.sources import Batch
from regrow.core.turns import StopRunError, Turns
from regrow.methods.recovery.paired_forward import CallCounter, run_in_thread
from regrow.methods.recovery.refit_work import Layer, RefitWork
from regrow.methods.recovery.streamed import StreamedPair
from regrow.methods.recovery.streams import RefitInDense, RefitPaired
from regrow.streaming.network import Around
from regrow.surgery.compensate import bias_of


def count_calls(pair: StreamedPair, names: Collection[str], batch: Batch) -> tuple[Counter[str], Counter[str]]:
    """Return how often each of some layers of the cut network runs in a forward pass, and how often it is added.

    Args:
        pair: The networks.
        names: The names of the layers' weights.
        batch: The input.
    """
    times, added = Counter[str](), Counter[str]()

    @contextmanager
    def counting(number: int, watched: Mapping[int, str]) -> Iterator[None]:
        calls = CallCounter(watched)
        with calls:
            yield
        added.update(call.name for call in calls.waiting.values())  # the next block may add it
        calls.finish()
        times.update(calls.times)
        added.update(calls.added)

    pair.model.visit([batch], names, counting)
    return times, added


def compare_outputs(work: RefitWork, pair: StreamedPair, batch: Batch) -> tuple[Any, Any]:
    """Return the outputs of the dense network with the cut one's layers in it, and of the cut network.

    Args:
        work: The refit, of which nothing is done.
        pair: The networks.
        batch: The input.
    """

    @contextmanager
    def carrying(number: int, watched: Mapping[int, str]) -> Iterator[None]:
        with _layers_of(pair, watched.values(), ()) as work.own:
            mode = RefitInDense(watched, work, 0, Turns(1), fit=False)
            with mode:
                yield
            mode.finish()

    (carried,) = pair.dense.outputs([batch], work.layers, carrying)
    (own,) = pair.model.outputs([batch])
    return carried, own


def refit_blocks(work: RefitWork, pair: StreamedPair, added: Sequence[str]) -> None:
    """Refit the layers of the cut network, one block after another; each is written once it is solved.

    Args:
        work: The refit.
        pair: The networks.
        added: The names of the weights whose layers get a bias.
    """
    turns = Turns(len(work.batches))

    @contextmanager
    def loading(watched: Mapping[int, str]) -> Iterator[None]:
        with _layers_of(pair, watched.values(), added) as work.own, torch.no_grad():
            _resume(work, pair)
            yield

    @contextmanager
    def refitting(number: int, watched: Mapping[int, str]) -> Iterator[None]:
        mode = RefitInDense(watched, work, number, turns)
        with torch.no_grad():
            with mode:
                yield
            mode.finish()

    with suppress(StopRunError):
        batches = [one.batch for one in work.batches]
        pair.dense.visit_together(batches, work.layers, refitting, turns, loading)


def refit_paired_blocks(work: RefitWork, pair: StreamedPair, added: Sequence[str]) -> None:
    """Refit the layers of the cut network to the dense network's values, both one block after another.

    Args:
        work: The refit.
        pair: The networks.
        added: The names of the weights whose layers get a bias.
    """
    waiting, batches, turns = work.waiting, [one.batch for one in work.batches], Turns(len(work.batches))

    def run(around: Around, turns: Turns) -> None:
        pair.dense.visit_together(batches, waiting, around, turns)

    @contextmanager
    def loading(watched: Mapping[int, str]) -> Iterator[None]:
        with _block_of(pair, watched.values(), added) as work.own, torch.no_grad():
            _resume(work, pair)
            yield

    with run_in_thread(run, len(batches)) as dense, _results_used(pair) as modes:

        @contextmanager
        def refitting(number: int, watched: Mapping[int, str]) -> Iterator[None]:
            own = {at: name for at, name in watched.items() if name in waiting}
            modes.present = mode = RefitPaired(own, work, number, turns, dense)
            with torch.no_grad():
                with mode:
                    yield
                mode.finish()

        with suppress(StopRunError):
            pair.model.visit_together(batches, work.layers, refitting, turns, loading)


def check_places(pair: StreamedPair, layers: Sequence[Layer]) -> None:
    """Raise InputError unless all layers to refit lie in blocks.

    Args:
        pair: The networks.
        layers: The layers.

    Raises:
        InputError: Names one that does not.
    """
    inside = {name for block in pair.dense.blocks for name in block.names}
    if other := next((layer.name for layer in layers if layer.name not in inside), None):
        raise InputError(
            f"{other}, which reads what was cut, lies outside the blocks, so that refit needs both networks in memory; "
            "give more memory, or recover by bias"
        )


def _resume(work: RefitWork, pair: StreamedPair) -> None:
    """Load what the present layers were refitted to before an interruption."""
    for name in (name for name in work.own if name in pair.changed):
        work.own[name].copy_(pair.changed[name])


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
