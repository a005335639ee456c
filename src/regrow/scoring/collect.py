"""Collect calibration statistics: sums over the inputs of weights, loss gradients and Fisher information, in one pass.

The sums are taken where a weight is contracted (a linear map, a convolution, a matrix product), not in module hooks:
the weight is recognised by identity in a torch-function mode, so modules that never call their submodules are covered.
Nothing but sums is kept. One (source, shard) is the unit that can be merged, saved and resumed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph
from regrow.core.evidence import Need
from regrow.core.objectives import Objective, choose_objective
from regrow.core.scores import Moments, Statistics
from regrow.core.sources import Batch, Source, to_host, visible_positions
from regrow.distributed import SINGLE, ProcessRank
from regrow.scoring.fisher import MaskGradients, add_fisher
from regrow.scoring.gradients import add_gradients, evaluation_mode
from regrow.scoring.shares import add, add_batches, gather_sums
from regrow.scoring.trunk import trunk_of
from regrow.scoring.watch import InputSums
from regrow.scoring.weights import Reader, readers, scorable, tensors

Key = tuple[str, int]


class BlockVisits(Protocol):
    """A network that runs block by block: all batches through one block, then all through the next."""

    def visit(
        self,
        batches: Sequence[Batch],
        names: Collection[str],
        around: Callable[[int, Mapping[int, str]], AbstractContextManager[object]],
    ) -> None:
        """Run batches block by block, each in the context ``around(number, {id of a loaded weight: its name})``.

        Args:
            batches: The batches; in each part of the network they run in this order, from number 0.
            names: The weights up to whose last reader they run.
            around: The context in which a batch runs through a block.
        """

    def passes(self, names: Collection[str]) -> int:
        """Return how often each batch runs through a part of the network.

        Args:
            names: As for :meth:`visit`.
        """


def collect(
    model: nn.Module,
    axes: AxisGraph,
    sources: Sequence[Source],
    needs: Collection[Need],
    *,
    shards: int = 1,
    units: Sequence[Axis] | None = None,
    objective: Objective | None = None,
    visits: BlockVisits | None = None,
    done: Mapping[Key, Statistics] | None = None,
    on_done: Callable[[str, int, Statistics], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    ranks: ProcessRank = SINGLE,
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
        visits: Runs the network block by block, where it does not fit into memory; the sums are the same bit for bit.
            ``None``: the whole network runs on each batch.
        done: What an earlier, interrupted call finished: (source, shard) → its statistics. These are returned as they
            are, not measured again.
        on_done: Called with (source, shard, statistics) as soon as one is finished.
        progress: Called with (source, batches finished, batches in all) after every batch.
        ranks: The processes that share the batches; all of them call this function, and rank 0 gets the sums.

    Returns:
        Source name → one ``Statistics`` per shard; tensors float64 (gradients float32), on the CPU.

    Raises:
        ValueError: If a source has fewer batches than shards, two have one name, gradients are needed without
            labels, or the input of a weight holds NaN or infinity (names the first, in the order of execution).
    """
    check_sources(sources, shards)
    if set(needs) <= {Need.WEIGHTS}:
        return {}
    known = dict(done or {})
    if known.keys() >= {(source.name, shard) for source in sources for shard in range(shards)}:
        return {source.name: [known[source.name, shard] for shard in range(shards)] for source in sources}
    objective = objective or choose_objective(None, sources[0].batches[0])
    walk = _Walk(model, axes, scorable(axes, units), frozenset(needs), objective)
    if visits is not None:
        if walk.backward:
            raise ValueError("gradients need the whole network in memory; leave out --memory")
        fresh = _walk_blocks(walk, visits, sources, shards, known, progress, ranks)
        for (name, shard), sums in fresh.items():
            walk.settle(sums)
            if on_done:
                on_done(name, shard, sums)
        every = {**known, **fresh}
        return {source.name: [every[source.name, shard] for shard in range(shards)] for source in sources}
    total, finished = sum(len(source) for source in sources), 0
    result: dict[str, list[Statistics]] = {}
    with evaluation_mode(model, walk.differentiated if walk.backward else None):
        for source in sources:
            for shard in range(shards):
                statistics = known.get((source.name, shard))
                if statistics is None:
                    statistics = Statistics(source.name)
                    # A whole source is read batch by batch: a user's loader may not fit in memory.
                    batches = source if shards == 1 else source.batches[shard::shards]
                    for _ in add_batches(walk.step, batches, statistics, ranks):
                        finished += 1
                        if progress:
                            progress(source.name, finished, total)
                    walk.settle(statistics)
                    if on_done:
                        on_done(source.name, shard, statistics)
                else:
                    finished += len(range(shard, len(source), shards))
                result.setdefault(source.name, []).append(statistics)
    return result


class _Walk:
    """Runs batches through the network and adds their input moments and gradients to given statistics."""

    def __init__(
        self, model: nn.Module, axes: AxisGraph, units: Sequence[Axis], needs: frozenset[Need], objective: Objective
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        reads = readers(axes, units)
        self.model, self.run, self.objective = model, model, objective
        self.watched = {id(parameters[r.weight]): r.weight for r in reads} if Need.ACTIVATIONS in needs else {}
        self.names = [r.slot.name for r in reads]
        self.differentiated: list[str] = []
        if Need.GRADIENTS in needs:
            self.differentiated = differentiated(model, axes, units)
        self.reads: dict[str, list[Reader]] = {}
        for reader in reads if Need.FISHER in needs else ():
            self.reads.setdefault(reader.weight, []).append(reader)
        self.ids = {id(parameters[name]): name for name in self.reads}
        self.widths = {r.weight: parameters[r.weight].shape[r.slot.dim] for r in reads}
        self.device = next((p.device for p in parameters.values() if p.device.type != "meta"), torch.device("cpu"))
        self.backward = bool(self.differentiated or self.reads)
        self.first = not self.backward
        self.losses: list[Tensor] = []

    def step(self, batch: Batch, statistics: Statistics) -> None:
        """Run one batch and add its sums to ``statistics``."""
        if self.first:
            self.first, self.run = False, trunk_of(self.model, batch, self.names)
        watch = self._watch(batch, self.run, statistics)
        if self.run is not self.model and len(watch.sums) < len(set(self.watched.values())):
            # The trunk may leave out weights that the whole network uses (an encoder, a head): look once, then decide.
            whole = self._watch(batch, self.model, statistics)
            if len(whole.sums) > len(watch.sums):
                self.run, watch = self.model, whole
        _add_moments(statistics, watch)
        statistics.tokens += _positions(batch)

    def settle(self, statistics: Statistics) -> None:
        """Move the sums of a finished shard to the CPU, in one transfer, and check that they are finite."""
        losses, fields = self.losses, ("total", "square", "mean_total", "mean_square")
        sums = [getattr(moments, name) for moments in statistics.moments.values() for name in fields]
        moved = iter(to_host([*sums, *statistics.gradients.values(), *statistics.fisher.values(), *losses]))
        for name, moments in statistics.moments.items():
            total, square, mean_total, mean_square = (next(moved) for _ in fields)
            statistics.moments[name] = Moments(moments.count, total, square, moments.sequences, mean_total, mean_square)
        for several in (statistics.gradients, statistics.fisher):
            for name in several:
                several[name] = next(moved)
        self.losses = []
        if damaged := [loss for loss in moved if not torch.isfinite(loss)]:
            raise ValueError(
                f"the loss is {damaged[0].item()}: the weights or inputs hold NaN or infinity, or nothing is labelled"
            )
        if name := next((key for key, one in statistics.moments.items() if not torch.isfinite(one.square).all()), ""):
            raise ValueError(
                f"the input of {name!r} holds NaN or infinity on source {statistics.source!r}; the weights before it "
                "are damaged, or overflow in this dtype (try float32 or bfloat16)"
            )
        if statistics.fisher and not statistics.tokens:
            raise ValueError(
                f"nothing is labelled on source {statistics.source!r}, so there is no gradient; give data with labels"
            )
        if damaged_axis := next((key for key, one in statistics.fisher.items() if not torch.isfinite(one).all()), ""):
            raise ValueError(
                f"the gradient of {damaged_axis!r} holds NaN or infinity on source {statistics.source!r}; weights or "
                "inputs are damaged, or overflow in this dtype (try float32 or bfloat16)"
            )

    def _watch(self, batch: Batch, run: nn.Module, statistics: Statistics) -> InputSums:
        here = batch.to(self.device)
        if self.reads:
            masks = MaskGradients(self.ids, self.reads, self.widths, count_sequences(batch))
            watch = _input_sums(self.watched, batch)
            add_fisher(self.model, here, masks, statistics.fisher, self.objective, watch, batch)
            if not self.differentiated:
                return watch
        with _input_sums(self.watched, batch) as watch:
            if self.differentiated:
                sums, count = statistics.gradients, batch.size
                loss = add_gradients(self.model, here, self.differentiated, sums, self.objective, count=count)
                self.losses.append(loss)
            else:
                with torch.no_grad():
                    here.run(run)
        return watch


def differentiated(model: nn.Module, axes: AxisGraph, units: Sequence[Axis] | None = None) -> list[str]:
    """Return the names of the parameters whose gradients are summed: those that measured axes run through.

    Args:
        model: The network.
        axes: The network's axes.
        units: The axes that are measured; ``axes.units()`` if none are named.
    """
    own = dict(model.named_parameters())
    return list(dict.fromkeys(name for axis in scorable(axes, units) for name, _, _ in tensors(axes, axis, own)))


def _walk_blocks(
    walk: _Walk,
    visits: BlockVisits,
    sources: Sequence[Source],
    shards: int,
    done: Mapping[Key, Statistics],
    progress: Callable[[str, int, int], None] | None,
    ranks: ProcessRank,
) -> dict[Key, Statistics]:
    """Run all batches of all unfinished shards through one block after another; return their sums by shard."""
    result = {(s.name, i): Statistics(s.name) for s in sources for i in range(shards) if (s.name, i) not in done}
    rows = [
        (key, batch) for s in sources for key in result if key[0] == s.name for batch in s.batches[key[1] :: shards]
    ]
    names, counted = {*walk.watched.values()}, set[tuple[int, str]]()
    own, parts = ranks.share(rows), list[Statistics]()  # and what they gave in one pass, with several ranks
    total, finished = visits.passes(names) * len(own), 0
    for key, batch in rows:
        result[key].tokens += _positions(batch)

    def add_parts() -> None:
        for (key, _), part in zip(rows, gather_sums(parts, len(rows), ranks), strict=False):
            add(result[key], part)
        parts.clear()

    @contextmanager
    def around(number: int, watched: Mapping[int, str]) -> Iterator[None]:
        nonlocal finished
        key, batch = own[number]
        if len(parts) == len(own):
            add_parts()
        with _input_sums(watched, batch) as watch:
            yield
        if twice := next((name for name in watch.sums if (number, name) in counted), None):
            raise ValueError(f"{twice!r} is read in several parts of the network; load it whole, without --memory")
        counted.update((number, name) for name in watch.sums)
        if ranks.several:
            parts.append(Statistics(key[0], moments=watch.sums))
        else:
            _add_moments(result[key], watch)
        finished += 1
        if progress:
            progress(key[0], finished, total)

    visits.visit([batch for _, batch in own], names, around)
    if ranks.several:
        add_parts()
    return result


def _input_sums(watched: Mapping[int, str], batch: Batch) -> InputSums:
    return InputSums(watched, count_sequences(batch), visible_positions(batch))


def _add_moments(statistics: Statistics, watch: InputSums) -> None:
    for name, moments in watch.sums.items():
        known = statistics.moments.get(name)
        statistics.moments[name] = moments if known is None else known + moments


def check_sources(sources: Sequence[Source], shards: int = 1) -> None:
    """Raise ValueError unless every source has a name of its own and can be split.

    Args:
        sources: The calibration data; of the batches only the number counts.
        shards: Into how many parts each source is split.

    Raises:
        ValueError: If two sources have one name, or one has fewer batches than shards.
    """
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


def _inputs(batch: Batch) -> Iterator[Tensor]:
    yield from (value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor))


def count_sequences(batch: Batch) -> int:
    """Return how many sequences (texts, images) a batch has.

    Args:
        batch: The batch.
    """
    return next((len(value) for value in _inputs(batch) if value.dim()), 1)


def _positions(batch: Batch) -> int:
    """Count the labelled positions of a batch; without labels its token ids, or else its sequences."""
    if batch.labels is not None:
        return int((batch.labels != -100).sum())
    ids = next((value for value in _inputs(batch) if value.dim() == 2 and not value.is_floating_point()), None)
    return count_sequences(batch) if ids is None else ids.numel()
