"""``regrow.prune``: from a network and sources to a smaller network and the plan that made it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from regrow import evaluation
from regrow.amounts import Measure, Target
from regrow.axes import AxisGraph, Example
from regrow.budget import Budget, Timing
from regrow.commands.measuring import passed
from regrow.method import Evidence, Need
from regrow.methods import entry
from regrow.methods.pruning.pruner import Pruner, check_pruner, plan_cut
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.scoring import collect
from regrow.sources import Source
from regrow.surgery import apply
from regrow.tracing import trace


def prune(
    model: nn.Module,
    *,
    method: str = "flap",
    keep: float | None = None,
    target: str | Target = "",
    sources: Sequence[Source] = (),
    example: Example | None = None,
    axes: AxisGraph | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    **budget: Any,
) -> tuple[nn.Module, Plan]:
    """Prune a network in one call: trace it, measure importance, choose units, and cut it.

    Args:
        model: The network; it is changed in place.
        method: One of ``regrow.methods.METHODS``.
        keep: The fraction of the weights of linear layers and convolutions that stays (of a language model: of its
            decoder's linear layers); ``None``: 0.8, unless there is a target.
        target: An absolute budget instead of a fraction: ``"params=100M"``, ``"macs=2G"``, ``"bytes=200M"``,
            ``"kv_cache=50M@4096"``, or ``"ms=120"`` of the example's pass on this device.
        sources: The data on which importance is measured; more text domains carry over better to unseen ones.
        example: The input with which the network is traced; ``None``: the first batch of the first source.
        axes: The network's axes, if they are known (:func:`regrow.declare`); the network is then not traced.
        settings: Settings of the method that differ from its defaults.
        progress: Called with (batches done, batches in all, what is being done).
        **budget: More fields of :class:`regrow.method.Budget`: ``measure``, ``only``, ``exclude``, ``round_to``,
            ``regular``.

    Returns:
        The same model, smaller, and the plan that was applied. A warning is issued for a source that had to be split.

    Raises:
        ValueError: If the method is unknown, the budget cannot be met, or there is nothing to trace or measure with.

    >>> import torch
    >>> from regrow.axes import Example
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> net, plan = prune(net, method="magnitude", keep=0.5, example=Example((torch.ones(1, 4),)),
    ...     settings={"compensate": False})
    >>> net[0].out_features
    4
    """
    chosen = built(method, settings or {})
    if target and keep is not None:
        raise ValueError(f"give keep or target, not both; got keep {keep:g} and target {target}")
    much = 0.8 if keep is None else keep
    wanted = Budget(target=Target.parse(str(target)), **budget) if target else Budget(much, **budget)
    if axes is None:
        example = _example(example, sources)
        axes = trace(model, *example.args, **example.kwargs)
    wanted = timed(model, axes, wanted, progress=progress)
    check_pruning(chosen, axes, wanted, sources)
    evidence = measured(model, axes, chosen, sources, progress)
    for note in evidence.notes:
        warnings.warn(note, stacklevel=2)
    plan = plan_cut(chosen, model, axes, wanted, evidence, progress=progress).plan
    apply(model, axes, plan)
    return model, plan


def _example(example: Example | None, sources: Sequence[Source]) -> Example:
    if example is not None:
        return example
    if not sources or not len(sources[0]):
        raise ValueError("give an example input, or a source whose first batch is one, to trace the network with")
    batch = sources[0].batches[0]
    return Example(batch.args, batch.kwargs)


def built(method: str, settings: Mapping[str, Any]) -> Pruner:
    """Return a pruning method with the given settings, after checking them.

    Args:
        method: The method's name.
        settings: Settings that differ from the defaults.

    Raises:
        ValueError: If the method or a setting is unknown, or a setting is of another type than its default.
    """
    chosen: Pruner = entry(method).made(method, settings)
    return chosen


def measured(
    model: nn.Module,
    axes: AxisGraph,
    pruner: Pruner,
    sources: Sequence[Source],
    progress: Progress = silent,
    **resume: Any,
) -> Evidence:
    """Measure what a method needs on the sources; a source is split if the method compares more than there are.

    Args:
        model: The network.
        axes: Its axes.
        pruner: The method.
        sources: The calibration data.
        progress: Called with (steps done, steps in all, what is being done).
        **resume: ``done`` and ``on_done`` of :func:`regrow.scoring.collect`, to store and reuse finished shards.
    """
    if not {Need.ACTIVATIONS, Need.GRADIENTS} & pruner.needs:
        return Evidence()
    told = lambda name, done, total: progress(done, total, f"measuring {name}")  # noqa: E731
    several, notes = spread(sources, pruner.sources)
    statistics = collect(model, axes, several, pruner.needs, shards=pruner.shards, progress=told, **resume)
    return Evidence(statistics, {source.name: source for source in several}, notes=notes)


def spread(sources: Sequence[Source], least: int) -> tuple[list[Source], tuple[str, ...]]:
    """Return at least ``least`` sources, by splitting the longest into interleaved parts, and a note if it was split.

    Args:
        sources: The sources.
        least: The smallest number of sources that the method needs.

    >>> parts, notes = spread([Source("news", [1, 2, 3, 4])], 3)
    >>> [(part.name, part.batches) for part in parts]
    [('news/1', [1, 4]), ('news/2', [2]), ('news/3', [3])]
    """
    missing = least - len(sources)
    if missing <= 0 or not sources:
        return list(sources), ()
    longest = max(range(len(sources)), key=lambda i: len(sources[i]))
    one, many = sources[longest], missing + 1
    parts = [Source(f"{one.name}/{i + 1}", list(one.batches)[i::many], one.origin) for i in range(many)]
    note = (
        f"this method compares at least {least} kinds of text and got {len(sources)}; {one.name!r} was split into "
        f"{many} parts. Ranks differ between parts of one kind by chance alone, so units that only other kinds of text "
        "need are not told from the rest. Give more kinds with --source"
    )
    return [*sources[:longest], *parts, *sources[longest + 1 :]], (note,)


def timed(
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
    _known_of(axes, budget)
    if known:
        return replace(budget, timing=Timing.from_record(known))
    batch, units = passed(axes, budget), budget.units(axes)
    found = evaluation.timing(model, axes, units, batch, round_to=budget.round_to, progress=progress)
    return replace(budget, timing=found)


def _known_of(axes: AxisGraph, budget: Budget) -> None:
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
        ValueError: If it cannot; names the least reachable keep.
    """
    if not sources and {Need.ACTIVATIONS, Need.GRADIENTS} & pruner.needs:
        raise ValueError("this method measures on text or images; give it at least one source, like --source news")
    _known_of(axes, budget)
    check_pruner(pruner, axes, budget)
