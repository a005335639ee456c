"""Run a network that is larger than memory: each block is loaded, runs on all batches, and is released.

For every block the network's own forward runs up to that block, with the modules of earlier blocks answering with the
results that they gave before. So each block gets what its parent passes it (masks, positions, caches), whatever the
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

Around = Callable[[int, Mapping[int, str]], AbstractContextManager[object]]
"""Function of a batch's number and ``id`` of a loaded weight → its name: the context in which the batch runs."""


@dataclass(frozen=True)
class StreamedBlock:
    """A block of a network, as the modules know it."""

    path: str
    names: tuple[str, ...]  # the stored tensors in it
    last: int
    passed: int  # how many results later operations read


Replace = Callable[[int, StreamedBlock, Callable[..., Any]], Callable[..., Any]]
"""Function of a block's number, the block, and its forward, that returns what replaces the forward."""


class _ReachedError(BaseException):
    """Raised in a network once the block that runs is finished; no ``except Exception`` of its code catches it."""


class StreamedNetwork:
    """A network whose weights lie in files; those of its blocks are in memory one block at a time.

    What lies outside the blocks (embeddings, the head) stays in memory once it is loaded.
    """

    def __init__(
        self, model: nn.Module, weights: StoredWeights, graph: Sequence[GraphBlock], folder: Path | None = None
    ) -> None:
        self.model, self.weights, self.folder = model.eval(), weights, folder
        self.blocks = _streamed_blocks(graph, weights)
        self.segments = _segments(graph)
        inside = {name for block in self.blocks for name in block.names}
        self.outer = tuple(name for name in weights.stored if name not in inside)
        self.ahead = ReadAhead(weights)
        self._running = threading.local()  # the number of the batch that runs in this thread
        self.places: dict[str, list[tuple[dict[str, Any], str]]] = {}
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
        """Context manager in which stored tensors are loaded; they are released when it ends."""
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
        for held, leaf in self.places[name]:
            held[leaf] = value

    def visit(self, batches: Sequence[Batch], names: Collection[str], around: Around) -> None:
        """Run batches block by block, as far as some weights are read."""
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
        """Run batches block by block as :meth:`visit` does, but in turns, in which they may wait for one another."""
        passes = self.passes(names)
        with BlockResults(self.folder) as results, self.resident(self.outer, self._names(0)):
            for number in range(passes):
                with self._loaded(number, passes, names) as watched, loading(watched):
                    run = partial(self._run_one, number, batches, results, around, watched)
                    with self._replaced(self._answering(number, results)):
                        turns.run(run)

    def passes(self, names: Collection[str]) -> int:
        """Return in how many passes all of some weights are read."""
        inside = {name: i for i, block in enumerate(self.blocks) for name in block.names}
        last = len(self.blocks)
        return 1 + max((inside.get(name, self.segments.get(name, last)) for name in names), default=-1)

    def outputs(
        self,
        batches: Sequence[Batch],
        names: Collection[str] = (),
        around: Around = lambda index, watched: nullcontext(),
    ) -> Iterator[Any]:
        """Yield the network's output for each batch."""
        return self._run_blocks(len(self.blocks) + 1, batches, names, around)

    def _run_blocks(
        self, passes: int, batches: Sequence[Batch], names: Collection[str], around: Around
    ) -> Iterator[Any]:
        """Run each block on all batches and keep its results; the pass behind the last block yields the outputs."""
        with BlockResults(self.folder) as results, self.resident(self.outer, self._names(0)):
            for number in range(passes):
                with self._loaded(number, passes, names) as watched:
                    for index in range(len(batches)):
                        with self._replaced(self._answering(number, results)):
                            output = self._run_one(number, batches, results, around, watched, index)
                        if number == len(self.blocks):
                            yield output

    @contextmanager
    def on_demand(self) -> Iterator[nn.Module]:
        """Context manager in which the network runs as any other: each block is loaded when it is called."""

        def loading(at: int, block: StreamedBlock, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.resident(block.names, self._names(at + 1)):
                    return forward(*args, **kwargs)

            return run

        with self.resident(self.outer, self._names(0)), self._replaced(loading):
            yield self.model

    def _names(self, number: int) -> tuple[str, ...]:
        """Return the stored tensors of a block; none behind the last."""
        return self.blocks[number].names if number < len(self.blocks) else ()

    @contextmanager
    def _loaded(self, number: int, passes: int, names: Collection[str]) -> Iterator[dict[int, str]]:
        """Context manager in which a block is in memory; gives ``id`` → name of the wanted weights that are loaded."""
        with self.resident(self._names(number), self._names(number + 1) if number + 1 < passes else ()):
            wanted = {*names} if number < len(self.blocks) else {*names} & {*self.outer}
            parameters = self.model.named_parameters(remove_duplicate=False)
            yield {id(parameter): name for name, parameter in parameters if name in wanted and not parameter.is_meta}

    def _run_one(
        self,
        number: int,
        batches: Sequence[Batch],
        results: BlockResults,
        around: Around,
        watched: Mapping[int, str],
        index: int,
    ) -> Any:
        """Run one batch through one block; the pass behind the last block returns the network's output."""
        self._running.index = index
        output, batch = None, batches[index]
        with around(index, watched):
            try:
                with torch.no_grad():
                    output = self.model(*batch.args, **batch.kwargs)
            except _ReachedError:
                pass
            else:
                if number < len(self.blocks):
                    name = self.weights.name
                    raise InputError(f"{name} ran without one of its blocks on some data; load it in memory")
        for j, block in enumerate(self.blocks[:number]):
            if block.last == number:
                results.drop(j, index)
        return output

    def _answering(self, number: int, results: BlockResults) -> Replace:
        """Return the function that replaces the forward of each block in a pass, for the batch of the thread."""

        def replaced(at: int, block: StreamedBlock, forward: Callable[..., Any]) -> Callable[..., Any]:
            def answer(*args: Any, **kwargs: Any) -> Any:
                return results.get(at, self._running.index)

            def run(*args: Any, **kwargs: Any) -> Any:
                if at > number:
                    raise InputError(f"{self.weights.name} runs its blocks in another order on some data")
                result = forward(*args, **kwargs)
                if block.passed > sum(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                    raise InputError(f"{block.path} passes on values beside its result; load the model in memory")
                results.put(at, self._running.index, result)
                raise _ReachedError

            return answer if at < number else run

        return replaced

    @contextmanager
    def _replaced(self, replace: Replace) -> Iterator[None]:
        """Context manager in which the forward of each block is replaced."""
        modules = [self.model.get_submodule(block.path) for block in self.blocks]
        before = [vars(module).get("forward") for module in modules]
        try:
            for i, (module, block) in enumerate(zip(modules, self.blocks, strict=True)):
                module.forward = replace(i, block, module.forward)
            yield
        finally:
            for module, forward in zip(modules, before, strict=True):
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = forward


def _streamed_blocks(graph: Sequence[GraphBlock], weights: StoredWeights) -> tuple[StreamedBlock, ...]:
    """Return the blocks that are modules, after checking that each has weights of its own."""
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
        last = [order.get(other.start, len(modules)) for other in graph if {*block.outputs} & {*other.inputs}]
        passed = sum(any(step in other.inputs for other in graph) for step in block.outputs)
        result.append(StreamedBlock(block.path, tuple(sorted(firsts)), max(last, default=0), passed))
    return tuple(result)


def _segments(graph: Sequence[GraphBlock]) -> dict[str, int]:
    """Return the pass in which each weight outside the blocks is read last."""
    result: dict[str, int] = {}
    number = 0
    for block in graph:
        if block.path:
            number += 1
        else:
            result |= dict.fromkeys(block.states, number)
    return result
