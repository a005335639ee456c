"""Collect calibration statistics: sums over the inputs of weights, loss gradients and Fisher information, in one pass.

The sums are taken where a weight is contracted (a linear map, a convolution, a matrix product), not in module hooks:
the weight is recognised by identity in a torch-function mode, so modules that never call their submodules are covered.
Nothing but sums is kept. One (source, shard) is the unit that can be merged, saved and resumed. Of several ranks each
measures its share of the batches; rank 0 adds the sums in the order of the batches, and so gets the same bits.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph
from regrow.core.objectives import IGNORED, Objective, choose_objective
from regrow.core.progress import Progress, silent
from regrow.core.scores import Moments, Need, Statistics
from regrow.core.sources import Batch, Source, to_host, visible_positions
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import receive, send
from regrow.scoring.gradients import MaskGradients, add_fisher, add_gradients, evaluation_mode, find_trunk
from regrow.scoring.watch import InputSums
from regrow.scoring.weights import axis_parameters, group_by_weight, readers, scorable_axes

Key = tuple[str, int]  # the name of a source, and the number of a shard


class BlockVisits(Protocol):
    """Interface of a network that runs block by block: all batches through one block, then all through the next."""

    def visit(
        self,
        batches: Sequence[Batch],
        names: Collection[str],
        around: Callable[[int, Mapping[int, str]], AbstractContextManager[object]],
    ) -> None:
        """Run batches block by block, up to the last block that reads one of the weights ``names``.

        Each run of a batch through a block is within the context manager that ``around`` returns. That is called with
        the index of the batch, and with ``id`` → name of those of the weights that are loaded.
        """

    def passes(self, names: Collection[str]) -> int:
        """Return how many blocks each batch runs through, up to the last that reads one of the weights ``names``."""


@dataclass(frozen=True)
class CollectionOptions:
    """How the data run in :func:`collect`: whole or block by block, in which processes, and from where on."""

    block_runner: BlockVisits | None = None  # runs a network that does not fit into memory; the sums are the same
    ranks: ProcessRank = SINGLE  # the processes that share the batches and all call `collect`; rank 0 gets the sums
    done: Mapping[Key, Statistics] = field(default_factory=dict)  # finished by an interrupted call, not measured again
    on_done: Callable[[str, int, Statistics], None] = lambda source, shard, sums: None  # called as soon as one is
    progress: Progress = silent  # called after every batch


def collect(
    model: nn.Module,
    axes: AxisGraph,
    sources: Sequence[Source],
    needs: Collection[Need],
    *,
    shards: int = 1,
    units: Sequence[Axis] | None = None,
    objective: Objective | None = None,
    options: CollectionOptions | None = None,
) -> dict[str, list[Statistics]]:
    """Run a network over calibration sources and return input moments and gradient sums, per source and shard.

    Args:
        model: The network; its parameters, buffers and modes are left as they were.
        axes: The network's axes.
        sources: The calibration data. Positions that a two-dimensional ``attention_mask`` hides are not counted.
        needs: ``ACTIVATIONS`` fills ``moments``, ``GRADIENTS`` fills ``gradients``, ``FISHER`` fills ``fisher``;
            ``WEIGHTS`` needs no pass.
        shards: Into how many disjoint parts each source is split, batch ``i`` into part ``i % shards``.
        units: The axes whose weights are measured; ``axes.units()`` if none are named.
        objective: The loss whose gradients are summed; ``None``: what fits the labels.
        options: How the data run; ``None``: here, as a whole.

    Returns:
        Source name → one ``Statistics`` per shard; tensors float64 (gradients float32), on the CPU. Empty for no pass.

    Raises:
        ValueError: If a source has fewer batches than shards, two have one name, gradients are needed without
            labels, or the input of a weight holds NaN or infinity (names the first, in the order of execution).
    """
    check_sources(sources, shards)
    if set(needs) <= {Need.WEIGHTS}:
        return {}
    options = options or CollectionOptions()
    done = dict(options.done)
    todo = [(source, shard) for source in sources for shard in range(shards) if (source.name, shard) not in done]
    if todo:
        objective = objective or choose_objective(None, sources[0].batches[0])
        walk = _Collector(model, axes, scorable_axes(axes, units), frozenset(needs), objective, options)
        if options.block_runner is None:
            done |= walk.run_whole(todo, shards, sum(map(len, sources)))
        else:
            done |= walk.run_blocks(todo, shards, options.block_runner)
    return {source.name: [done[source.name, shard] for shard in range(shards)] for source in sources}


class _Collector:
    """Runs batches through a network and sums their input moments and gradients into statistics."""

    def __init__(
        self,
        model: nn.Module,
        axes: AxisGraph,
        units: Sequence[Axis],
        needs: frozenset[Need],
        objective: Objective,
        options: CollectionOptions,
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        reads = readers(axes, units)
        self.model, self.trunk, self.objective, self.options = model, model, objective, options
        self.watched = {id(parameters[r.weight]): r.weight for r in reads} if Need.ACTIVATIONS in needs else {}
        self.names = [reader.slot.name for reader in reads]
        self.differentiated = differentiated_names(model, axes, units) if Need.GRADIENTS in needs else []
        self.masked = group_by_weight(reads) if Need.FISHER in needs else {}
        self.ids = {id(parameters[name]): name for name in self.masked}
        self.device = next((p.device for p in parameters.values() if p.device.type != "meta"), torch.device("cpu"))
        self.backward = bool(self.differentiated or self.masked)
        self.first = not self.backward
        self.losses: list[Tensor] = []

    def run_whole(self, todo: Sequence[tuple[Source, int]], shards: int, total: int) -> dict[Key, Statistics]:
        """Run the batches of each unfinished (source, shard index), ``todo``, through the network; return their sums.

        ``shards``: how many each source is split into; ``total``: the number of all batches, for the progress.
        """
        finished = total - sum(len(range(shard, len(source), shards)) for source, shard in todo)
        result = {}
        with evaluation_mode(self.model, self.differentiated if self.backward else None):
            for source, shard in todo:
                sums = Statistics(source.name)
                # A whole source is read batch by batch: a user's loader may not fit in memory.
                batches = source if shards == 1 else source.batches[shard::shards]
                for _ in self._add_batches(batches, sums):
                    finished += 1
                    self.options.progress(finished, total, f"measuring {source.name}")
                result[source.name, shard] = self._finish_shard(sums, shard)
        return result

    def _add_batches(self, batches: Iterable[Batch], sums: Statistics) -> Iterator[None]:
        """Measure this rank's share of the batches into ``sums``, in place; on rank 0 that of all. Yield after each."""
        ranks = self.options.ranks
        for number, batch in enumerate(batches):
            owner = number % ranks.size
            if owner == ranks.rank and ranks.leads:
                self._add_batch(batch, sums)
            elif owner == ranks.rank:
                part = Statistics(sums.source)
                self._add_batch(batch, part)
                _send_statistics(part)
            elif ranks.leads:
                sums.accumulate(_receive_statistics(owner))
            yield

    def run_blocks(self, todo: Sequence[tuple[Source, int]], shards: int, visits: BlockVisits) -> dict[Key, Statistics]:
        """Run the batches of each unfinished (source, shard index), ``todo``, block by block; return their sums.

        ``shards``: how many each source is split into. ``ValueError`` for gradients, and if blocks share a weight.
        """
        if self.backward:
            raise ValueError("gradients need the whole network in memory; leave out --memory")
        result = {(source.name, shard): Statistics(source.name) for source, shard in todo}
        rows = [((source.name, shard), batch) for source, shard in todo for batch in source.batches[shard::shards]]
        names, counted, ranks = {*self.watched.values()}, set[tuple[int, str]](), self.options.ranks
        share, parts = ranks.share(rows), list[Statistics]()  # and what they gave in one pass, with several ranks
        total, finished = visits.passes(names) * len(share), 0
        for key, batch in rows:
            result[key].tokens += _count_positions(batch)

        def add_parts() -> None:
            for (key, _), part in zip(rows, _gather(parts, len(rows), ranks), strict=False):
                result[key].accumulate(part)
            parts.clear()

        @contextmanager
        def around(number: int, watched: Mapping[int, str]) -> Iterator[None]:
            nonlocal finished
            key, batch = share[number]
            if len(parts) == len(share):
                add_parts()
            with _make_input_sums(watched, batch) as watch:
                yield
            if twice := next((name for name in watch.sums if (number, name) in counted), None):
                raise ValueError(f"{twice!r} is read in several parts of the network; load it whole, without --memory")
            counted.update((number, name) for name in watch.sums)
            part = Statistics(key[0], moments=watch.sums)
            if ranks.several:
                parts.append(part)
            else:
                result[key].accumulate(part)
            finished += 1
            self.options.progress(finished, total, f"measuring {key[0]}")

        visits.visit([batch for _, batch in share], names, around)
        if ranks.several:
            add_parts()
        return {key: self._finish_shard(sums, key[1]) for key, sums in result.items()}

    def _add_batch(self, batch: Batch, statistics: Statistics) -> None:
        """Run one batch and add its sums to ``statistics``, in place.

        The first batch finds the trunk, which leaves out the head; the whole network takes its place for good once a
        batch shows that it reads more of the watched weights.
        """
        if self.first:
            self.first, self.trunk = False, find_trunk(self.model, batch, self.names)
        moments = self._measure(batch, self.trunk, statistics)
        if self.trunk is not self.model and len(moments) < len(self.watched):
            # The trunk may leave out weights that the whole network uses (an encoder, a head).
            whole = self._measure(batch, self.model, statistics)  # no gradients are added twice: they need the whole
            if len(whole) > len(moments):
                self.trunk, moments = self.model, whole
        statistics.accumulate(Statistics(statistics.source, _count_positions(batch), moments))

    def _finish_shard(self, sums: Statistics, shard: int) -> Statistics:
        """Return the sums of a finished shard on the CPU; ``ValueError`` unless all are finite. Calls ``on_done``."""
        moved = iter(to_host([*sums.tensors(), *self.losses]))
        self.losses = []
        statistics = Statistics.assemble(sums.source, sums.header(), moved)
        if damaged := [loss for loss in moved if not torch.isfinite(loss)]:
            raise ValueError(
                f"the loss is {damaged[0].item()}: the weights or inputs hold NaN or infinity, or nothing is labelled"
            )
        if statistics.fisher and not statistics.tokens:
            raise ValueError(
                f"nothing is labelled on source {sums.source!r}, so there is no gradient; give data with labels"
            )
        squares = {f"input of {name!r}": moments.square for name, moments in statistics.moments.items()}
        squares |= {f"gradient of {key!r}": value for key, value in statistics.fisher.items()}
        if what := next((what for what, value in squares.items() if not torch.isfinite(value).all()), ""):
            raise ValueError(
                f"the {what} holds NaN or infinity on source {sums.source!r}; the weights before it are damaged, or "
                "overflow in this dtype (try float32 or bfloat16)"
            )
        self.options.on_done(sums.source, shard, statistics)
        return statistics

    def _measure(self, batch: Batch, network: nn.Module, statistics: Statistics) -> dict[str, Moments]:
        """Run one batch through ``network``; return its input moments, and add gradients to ``statistics`` in place."""
        local, watch = batch.to(self.device), _make_input_sums(self.watched, batch)
        if self.masked:
            masks = MaskGradients(self.ids, self.masked, count_sequences(batch))
            add_fisher(self.model, local, masks, statistics.fisher, self.objective, watch, batch)
            if not self.differentiated:
                return watch.sums
            watch = _make_input_sums(self.watched, batch)
        with watch, torch.set_grad_enabled(bool(self.differentiated)):
            if self.differentiated:
                sums, count = statistics.gradients, batch.size
                self.losses.append(
                    add_gradients(self.model, local, self.differentiated, sums, self.objective, count=count)
                )
            else:
                local.run(network)
        return watch.sums


def differentiated_names(model: nn.Module, axes: AxisGraph, units: Sequence[Axis]) -> list[str]:
    """Return the names of the parameters whose gradients are summed: those that the axes ``units`` run through."""
    parameters = dict(model.named_parameters())
    return list(
        dict.fromkeys(
            name for axis in scorable_axes(axes, units) for name, _, _ in axis_parameters(axes, axis, parameters)
        )
    )


def _gather(parts: Sequence[Statistics], count: int, ranks: ProcessRank) -> Iterator[Statistics]:
    """Yield the sums of all ``count`` batches in order, on rank 0; other ranks send their ``parts`` and yield none."""
    if ranks.leads:
        for number in range(count):
            owner = number % ranks.size
            yield _receive_statistics(owner) if owner else parts[number // ranks.size]
        return
    for part in parts:
        _send_statistics(part)


def _send_statistics(sums: Statistics) -> None:
    """Send sums to rank 0."""
    send(sums.header(), to_host(sums.tensors()))


def _receive_statistics(rank: int) -> Statistics:
    """Return the sums that another rank sends, without the name of their source."""
    header, values = receive(rank)
    return Statistics.assemble("", header, values)


def _make_input_sums(watched: Mapping[int, str], batch: Batch) -> InputSums:
    """Return a mode that sums the inputs of watched weights (``id`` → name) on a batch, padding left out."""
    return InputSums(watched, count_sequences(batch), visible_positions(batch))


def check_sources(sources: Sequence[Source], shards: int = 1) -> None:
    """Raise ValueError unless sources have different names and at least ``shards`` batches each, 1 or more."""
    if shards < 1:
        raise ValueError(f"a source is split into at least 1 shard; got {shards}")
    names = [source.name for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two sources are called {sorted(twice)[0]!r}; give each its own name")
    for source in sources:
        if len(source) < shards:
            raise ValueError(
                f"source {source.name!r} has {len(source)} batches and cannot be split into {shards}; give it more "
                "text or smaller batches"
            )


def count_sequences(batch: Batch) -> int:
    """Return how many sequences (texts, images) a batch has: the length of its first tensor; 1 if it has none."""
    return next((len(value) for value in _input_tensors(batch) if value.dim()), 1)


def _count_positions(batch: Batch) -> int:
    """Return how many labelled positions a batch has; without labels how many token ids, or else sequences."""
    if batch.labels is not None:
        return int((batch.labels != IGNORED).sum())
    ids = (value.numel() for value in _input_tensors(batch) if value.dim() == 2 and not value.is_floating_point())
    return next(ids, count_sequences(batch))


def _input_tensors(batch: Batch) -> list[Tensor]:
    """Return the inputs of a batch that are tensors."""
    return [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor)]
