"""Run a network that is larger than memory: each block is loaded, runs on all batches, and is released.

For every block the network's own forward runs up to that block, while the modules of earlier blocks return the results
that were kept of them. So each block gets what its parent passes it (masks, positions, caches), whatever the
architecture; only embeddings and what else lies outside the blocks are computed once per block.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.errors import InputError
from regrow.core.process_memory import return_memory
from regrow.core.sources import Batch
from regrow.core.turns import Turns
from regrow.streaming.weights import BlockResults, ReadAhead, StoredWeights
from regrow.tracing.readings import GraphBlock

# Function of a batch's index and the mapping ``id`` of a loaded weight → its name: the context in which the batch runs.
Around = Callable[[int, Mapping[int, str]], AbstractContextManager[object]]


@dataclass(frozen=True)
class StreamedBlock:
    """A block of a network that is a module."""

    path: str
    names: tuple[str, ...]  # the stored tensors in it
    last: int  # the index of the last pass that reads its result; of the block that runs in it
    outputs_read: int  # how many of its outputs later operations read


# Function of a block's index, the block, and its forward, that returns what replaces the forward.
WrapForward = Callable[[int, StreamedBlock, Callable[..., Any]], Callable[..., Any]]


class _PassEndedError(BaseException):
    """Ends a forward pass once the block of the pass is finished; no ``except Exception`` in the model catches it."""


class StreamedNetwork:
    """A network whose weights lie in files; those of its blocks are in memory one block at a time.

    A pass runs all batches through one block; the pass behind the last block gives the outputs. What lies outside the
    blocks (embeddings, the head) stays in memory meanwhile. ``graph``: the traced blocks; ``folder``: where results of
    blocks are kept; ``None``: in memory. Raises InputError if the network does not consist of such blocks.
    """

    def __init__(
        self, model: nn.Module, weights: StoredWeights, graph: Sequence[GraphBlock], folder: Path | None = None
    ) -> None:
        self.model, self.weights, self.folder = model.eval(), weights, folder
        self.blocks = _streamed_blocks(graph, weights)
        self.last_passes = _last_passes(graph)
        inside = {name for block in self.blocks for name in block.names}
        # The stored tensors outside the blocks
        self.outer = tuple(name for name in weights.stored if name not in inside)
        self.ahead = ReadAhead(weights)
        self._running = threading.local()  # its ``index`` is that of the batch that runs in this thread
        self.places: dict[str, list[tuple[dict[str, Any], str]]] = {}  # first name → (dictionary of a module, key)
        for name, first in weights.first.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            held = module._parameters if leaf in module._parameters else module._buffers
            self.places.setdefault(first, []).append((held, leaf))

    @property
    def largest_block(self) -> int:
        """The bytes in memory of the largest block."""
        return max(sum(map(self.weights.bytes_of, block.names)) for block in self.blocks)

    @contextmanager
    def resident(self, names: Collection[str], following: Collection[str] = ()) -> Iterator[None]:
        """Context manager in which the stored tensors ``names`` are in memory, set in their modules.

        ``following``: those that are needed next, which a thread reads meanwhile.
        """
        before: dict[str, Any] = {}
        following = frozenset(following)
        try:
            for name in names:
                held, leaf = self.places[name][0]
                old = before[name] = held[leaf]
                value = self.ahead.take(name)
                self._put(name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
            self.ahead.start(following)
            yield
        except BaseException:
            self.ahead.start(())
            raise
        finally:
            for name, value in before.items():
                self._put(name, value)
            self.ahead.release()
            return_memory()

    def _put(self, name: str, value: Tensor) -> None:
        """Set the stored tensor ``name`` to ``value`` in every module that holds it."""
        for held, leaf in self.places[name]:
            held[leaf] = value

    def visit(self, batches: Sequence[Batch], names: Collection[str], around: Around) -> None:
        """Run batches block by block, until all the weights ``names`` were read; outputs are dropped.

        ``around``: called per pass and batch with the batch's index and ``id`` → name of the loaded ones of ``names``;
        gives the context in which the batch runs.
        """
        for _ in self._run_blocks(self.passes(names), batches, names, around):
            pass

    def visit_together(
        self,
        batches: Sequence[Batch],
        names: Collection[str],
        around: Around,
        turns: Turns,
        loading: Callable[[Mapping[int, str]], AbstractContextManager[object]] = lambda watched: nullcontext(),
    ) -> None:
        """Run batches block by block as :meth:`visit` does, but those of a pass in threads that take turns.

        ``turns``: of as many runs as batches; ``around`` may call its ``wait``. ``loading``: called per pass with
        ``id`` → name of the loaded ones of ``names``; gives the context in which all batches run.
        """
        passes = self.passes(names)
        with BlockResults(self.folder) as results, self.resident(self.outer, self._names_in(0)):
            for current in range(passes):
                with self._load_block(current, passes, names) as watched, loading(watched):
                    run = partial(self._run_batch, current, batches, results, around, watched)
                    with self._patch_forwards(self._forward_wrapper(current, results)):
                        turns.run(run)

    def passes(self, names: Collection[str]) -> int:
        """Return after how many passes the weights ``names`` were all read; 0 without any."""
        inside = {name: i for i, block in enumerate(self.blocks) for name in block.names}
        last = len(self.blocks)
        return 1 + max((inside.get(name, self.last_passes.get(name, last)) for name in names), default=-1)

    def outputs(
        self,
        batches: Sequence[Batch],
        names: Collection[str] = (),
        around: Around = lambda index, watched: nullcontext(),
    ) -> Iterator[Any]:
        """Yield the network's output for each batch, in order; ``around`` and ``names`` are as in :meth:`visit`."""
        return self._run_blocks(len(self.blocks) + 1, batches, names, around)

    def _run_blocks(
        self, passes: int, batches: Sequence[Batch], names: Collection[str], around: Around
    ) -> Iterator[Any]:
        """Run ``passes`` blocks, each on all batches; the pass behind the last block, if wanted, yields the outputs."""
        with BlockResults(self.folder) as results, self.resident(self.outer, self._names_in(0)):
            for current in range(passes):
                with self._load_block(current, passes, names) as watched:
                    for index in range(len(batches)):
                        with self._patch_forwards(self._forward_wrapper(current, results)):
                            output = self._run_batch(current, batches, results, around, watched, index)
                        if current == len(self.blocks):
                            yield output

    @contextmanager
    def on_demand(self) -> Iterator[nn.Module]:
        """Context manager that yields the network, which runs as any other: each block is loaded when it is called."""

        def load(index: int, block: StreamedBlock, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.resident(block.names, self._names_in(index + 1)):
                    return forward(*args, **kwargs)

            return run

        with self.resident(self.outer, self._names_in(0)), self._patch_forwards(load):
            yield self.model

    def _names_in(self, index: int) -> tuple[str, ...]:
        """Return the names of the stored tensors of a block, by its index; none behind the last."""
        return self.blocks[index].names if index < len(self.blocks) else ()

    @contextmanager
    def _load_block(self, current: int, passes: int, names: Collection[str]) -> Iterator[dict[int, str]]:
        """Context manager in which block ``current`` is in memory; gives ``id`` → name of the loaded ones of ``names``.

        The next block is read meanwhile, unless this is the last of the ``passes``. Behind the last block, only weights
        outside the blocks count.
        """
        with self.resident(self._names_in(current), self._names_in(current + 1) if current + 1 < passes else ()):
            wanted = {*names} if current < len(self.blocks) else {*names} & {*self.outer}
            parameters = self.model.named_parameters(remove_duplicate=False)
            yield {id(parameter): name for name, parameter in parameters if name in wanted and not parameter.is_meta}

    def _run_batch(
        self,
        current: int,
        batches: Sequence[Batch],
        results: BlockResults,
        around: Around,
        watched: Mapping[int, str],
        index: int,
    ) -> Any:
        """Run batch ``index`` up to block ``current``; return the output if that is behind the last, else ``None``.

        ``watched``: ``id`` → name of loaded weights, for ``around``. Results that are not read again are dropped.
        """
        self._running.index = index
        output, batch = None, batches[index]
        with around(index, watched):
            try:
                with torch.no_grad():
                    output = self.model(*batch.args, **batch.kwargs)
            except _PassEndedError:
                pass
            else:
                if current < len(self.blocks):
                    name = self.weights.name
                    raise InputError(f"{name} ran without one of its blocks on some data; load it in memory")
        for j, block in enumerate(self.blocks[:current]):
            if block.last == current:
                results.drop(j, index)
        return output

    def _forward_wrapper(self, current: int, results: BlockResults) -> WrapForward:
        """Return what replaces blocks' forwards in pass ``current``: a kept result, or a run that ends the pass."""

        def wrap(index: int, block: StreamedBlock, forward: Callable[..., Any]) -> Callable[..., Any]:
            def recall(*args: Any, **kwargs: Any) -> Any:
                return results.get(index, self._running.index)

            def run(*args: Any, **kwargs: Any) -> Any:
                if index > current:
                    raise InputError(f"{self.weights.name} runs its blocks in another order on some data")
                result = forward(*args, **kwargs)
                # Later blocks may read a value elsewhere, such as from an attribute of the module.
                if block.outputs_read > sum(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                    raise InputError(
                        f"{block.path} gives later blocks values that it does not return; load the model in memory"
                    )
                results.put(index, self._running.index, result)
                raise _PassEndedError  # the rest of the network is not needed in this pass

            return recall if index < current else run

        return wrap

    @contextmanager
    def _patch_forwards(self, wrap: WrapForward) -> Iterator[None]:
        """Context manager in which ``wrap`` replaces the forward of each block."""
        modules = [self.model.get_submodule(block.path) for block in self.blocks]
        # What another library has set on the instance; None: the method of the class.
        patched = [vars(module).get("forward") for module in modules]
        try:
            for i, (module, block) in enumerate(zip(modules, self.blocks, strict=True)):
                module.forward = wrap(i, block, module.forward)
            yield
        finally:
            for module, forward in zip(modules, patched, strict=True):
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = forward


def _streamed_blocks(graph: Sequence[GraphBlock], weights: StoredWeights) -> tuple[StreamedBlock, ...]:
    """Return the blocks that are modules, in order; InputError unless there are several, each with its own weights."""
    modules = [block for block in graph if block.path]
    if len(modules) < 2:
        raise InputError(f"{weights.name} does not consist of blocks that follow one another; load it in memory")
    order = {block.start: i for i, block in enumerate(modules)}
    result = []
    for block in modules:
        names = {name for name in weights.like if name.startswith(f"{block.path}.")}
        firsts = {weights.first[name] for name in names}
        shared = [name for name, first in weights.first.items() if first in firsts and name not in names]
        shared += [name for other in graph if other is not block for name in other.states if name in names]
        if shared:
            raise InputError(f"{weights.name}: {shared[0]!r} is shared by several blocks; load it in memory")
        readers = [order.get(other.start, len(modules)) for other in graph if {*block.outputs} & {*other.inputs}]
        outputs_read = sum(any(step in other.inputs for other in graph) for step in block.outputs)
        result.append(StreamedBlock(block.path, tuple(sorted(firsts)), max(readers, default=0), outputs_read))
    return tuple(result)


def _last_passes(graph: Sequence[GraphBlock]) -> dict[str, int]:
    """Return name of a weight outside the blocks → index of the pass that reads it last."""
    result: dict[str, int] = {}
    number = 0
    for block in graph:
        if block.path:
            number += 1
        else:
            result |= dict.fromkeys(block.states, number)
    return result
