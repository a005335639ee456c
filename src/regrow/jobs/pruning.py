"""What pruning needs in Python and on the command line: the method, its budget and its measurements, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from regrow import evaluation
from regrow.core.amounts import Measure
from regrow.core.axes import Axis, AxisGraph
from regrow.core.budget import Budget, Timing
from regrow.core.objectives import Objective
from regrow.core.progress import Progress, silent
from regrow.core.scores import Evidence, Need, Statistics
from regrow.core.sources import Source
from regrow.data.batch_streams import join_batches
from regrow.distributed import SINGLE, ProcessRank
from regrow.jobs.measuring import timed_input
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import Pruner, check_pruner
from regrow.scoring.collect import BlockVisits, CollectionRun, check_sources, collect


def build_pruner(method: str, settings: Mapping[str, object]) -> Pruner:
    """Return a pruning method with the given settings, after checking them.

    Args:
        method: The method's name.
        settings: Settings that differ from the defaults.

    Raises:
        ValueError: If the method or a setting is unknown, or a setting is of another type than its default.
    """
    chosen: Pruner = find_method(MethodKind.PRUNING, method).made(method, settings)
    return chosen


def collect_evidence(
    model: nn.Module,
    axes: AxisGraph,
    pruner: Pruner,
    sources: Sequence[Source],
    progress: Progress = silent,
    batch_size: int = 1,
    units: Sequence[Axis] | None = None,
    *,
    objective: Objective | None = None,
    visits: BlockVisits | None = None,
    done: Mapping[tuple[str, int], Statistics] | None = None,
    on_done: Callable[[str, int, Statistics], None] | None = None,
    ranks: ProcessRank = SINGLE,
) -> Evidence:
    """Measure what a method needs on the sources; a source is split if the method compares more than there are.

    Args:
        model: The network.
        axes: Its axes.
        pruner: The method.
        sources: The calibration data.
        progress: Called with (steps done, steps in all, what is being done).
        batch_size: How many examples run at a time, where smaller batches can be joined; methods that need gradients
            of weights run the batches as they are.
        units: The axes that may be cut, which are measured; ``None``: ``axes.units()``.
        objective: What the network is trained for; ``None``: what fits the labels.
        visits: Runs the network one block at a time; ``None``: it is in memory.
        done: (source, shard) → sums of finished shards, which are not measured again.
        on_done: Called with the source, the shard and its sums when a shard is finished.
        ranks: The processes, which share the batches.
    """
    if pruner.needs <= {Need.WEIGHTS}:
        return Evidence()
    several, notes = divide_sources(pruner, sources)
    most = 1 if Need.GRADIENTS in pruner.needs else batch_size
    joined = [join_batches(source, most, pruner.shards) for source in several]
    statistics = collect(
        model,
        axes,
        joined,
        pruner.needs,
        shards=pruner.shards,
        units=units,
        objective=objective,
        run=CollectionRun(
            visits=visits,
            ranks=ranks,
            done=done or {},
            on_done=on_done or (lambda source, shard, sums: None),
            progress=lambda name, count, total: progress(count, total, f"measuring {name}"),
        ),
    )
    return Evidence(statistics, {source.name: source for source in several}, notes=notes)


def divide_sources(pruner: Pruner, sources: Sequence[Source]) -> tuple[list[Source], tuple[str, ...]]:
    """Return the sources that a method compares, and a note if one was split; given again, they are as they are.

    Where a method divides a source further, that of a loader is read once, so that parts do not overlap if it shuffles.

    Args:
        pruner: The method.
        sources: The sources.
    """
    several, notes = split_sources(sources, pruner.sources)
    if pruner.shards > 1 or pruner.sources > 1:
        several = [replace(one, batches=list(one)) if hasattr(one.batches, "loader") else one for one in several]
    return several, notes


def split_sources(sources: Sequence[Source], least: int) -> tuple[list[Source], tuple[str, ...]]:
    """Return at least ``least`` sources, by splitting the longest into interleaved parts, and a note if it was split.

    Args:
        sources: The sources.
        least: The smallest number of sources that the method needs.

    >>> parts, notes = split_sources([Source("news", [1, 2, 3, 4])], 3)
    >>> [(part.name, part.batches) for part in parts]
    [('news/1', [1, 4]), ('news/2', [2]), ('news/3', [3])]
    """
    missing = least - len(sources)
    if missing <= 0 or not sources:
        return list(sources), ()
    longest = max(range(len(sources)), key=lambda i: len(sources[i]))
    one, many = sources[longest], missing + 1
    batches = list(one.batches)  # read once: a loader may shuffle
    parts = [Source(f"{one.name}/{i + 1}", batches[i::many], one.origin) for i in range(many)]
    note = (
        f"this method compares at least {least} kinds of text and got {len(sources)}; {one.name!r} was split into "
        f"{many} parts. Ranks differ between parts of one kind by chance alone, so units that only other kinds of text "
        "need are not told from the rest. Give more kinds with --source"
    )
    return [*sources[:longest], *parts, *sources[longest + 1 :]], (note,)


def with_timing(
    model: nn.Module,
    axes: AxisGraph,
    budget: Budget,
    *,
    known: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Budget:
    """Return the budget with the measured timing of the network, if it counts time; else the budget itself.

    Args:
        model: The network.
        axes: The axes of the network.
        budget: The budget.
        known: ``Timing.record()`` of an earlier measurement, to be used instead of a new one.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: If its axes are declared and not traced, or a module cannot be timed.
    """
    if budget.measure != Measure.TIME or budget.timing is not None:
        return budget
    _check_countable(axes, budget)
    if known:
        return replace(budget, timing=Timing.from_record(known))
    batch, units = timed_input(axes, budget), budget.units(axes)
    found = evaluation.timing(model, axes, units, batch, round_to=budget.round_to, progress=progress)
    return replace(budget, timing=found)


def _check_countable(axes: AxisGraph, budget: Budget) -> None:
    """Raise ValueError if a budget counts something that is unknown for declared (untraced) axes."""
    what = {
        Measure.MACS: "how many multiply–accumulates",
        Measure.CACHE: "how much of a cache",
        Measure.TIME: "how much time",
    }
    if budget.measure in what and axes.declared:
        raise ValueError(
            f"{what[budget.measure]} the declared axes {', '.join(axes.declared)} cost is not known, since no "
            "recording shows them; budget by params or bytes"
        )


def check_pruning(pruner: Pruner, axes: AxisGraph, budget: Budget, sources: Sequence[Source]) -> None:
    """Raise ValueError unless a method can meet a budget and has data to measure on.

    Args:
        pruner: The method.
        axes: The axes of the network.
        budget: The budget.
        sources: The calibration data.

    Raises:
        ValueError: If it cannot; names the least reachable keep, or the source that is too short.
    """
    if not pruner.needs <= {Need.WEIGHTS}:
        if not sources:
            raise ValueError("this method measures on text or images; give it at least one source, like --source news")
        counted: list[Any] = [range(len(source)) for source in sources]
        numbered = [Source(source.name, batches) for source, batches in zip(sources, counted, strict=True)]
        check_sources(split_sources(numbered, pruner.sources)[0], pruner.shards)
    _check_countable(axes, budget)
    check_pruner(pruner, axes, budget)
