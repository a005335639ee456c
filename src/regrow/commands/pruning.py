"""Pruning: from a network and sources to a smaller network and the plan that made it."""

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
    """Prune a network in one call.

    Args:
        model: The network; it is changed in place.
        method: One of ``regrow.methods.METHODS``.
        keep: The fraction that stays, of the weights of linear layers and convolutions (of a language model: of its
            decoder's linear layers); 0.8 unless given, or a target.
        target: So much may stay, instead of a fraction: ``"params=100M"``, ``"macs=2G"``, ``"bytes=200M"``,
            ``"kv_cache=50M@4096"``, or ``"ms=120"`` of the example's pass on this device.
        sources: What to measure importance on; the more kinds, the better the result carries over.
        example: What to trace the network with; the first batch of the first source, unless given.
        axes: Its axes, where they are known (:func:`regrow.declare`); nothing is traced then.
        settings: Settings of the method; its defaults, unless given.
        progress: Called with (batches done, batches in all, what).
        **budget: More fields of :class:`regrow.method.Budget`: ``measure``, ``only``, ``exclude``, ``round_to``,
            ``regular``.

    Returns:
        The same model, smaller, and the plan that was applied. A source that had to be split is told as a warning.

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
    """A method with settings, checked.

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
    """What a method needs to know, measured on the sources, which are split if it compares more than there are."""
    if not {Need.ACTIVATIONS, Need.GRADIENTS} & pruner.needs:
        return Evidence()
    told = lambda name, done, total: progress(done, total, f"measuring {name}")  # noqa: E731
    several, notes = spread(sources, pruner.sources)
    statistics = collect(model, axes, several, pruner.needs, shards=pruner.shards, progress=told, **resume)
    return Evidence(statistics, {source.name: source for source in several}, notes=notes)


def spread(sources: Sequence[Source], least: int) -> tuple[list[Source], tuple[str, ...]]:
    """At least so many sources, the longest split into interleaved parts if need be, and what is lost by it.

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
    """The budget, with how long the network takes if that is what it counts.

    Args:
        model: The network.
        axes: Its axes.
        budget: What may stay.
        known: ``Timing.record()`` of an earlier measurement that is to hold.
        progress: Called as it is measured.

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
    """Check that what a budget counts is known of axes that no recording shows."""
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
    """Assert that a method can meet a budget and has something to measure on.

    Raises:
        ValueError: If not; names the least reachable keep.
    """
    if not sources and {Need.ACTIVATIONS, Need.GRADIENTS} & pruner.needs:
        raise ValueError("this method measures on text or images; give it at least one source, like --source news")
    _known_of(axes, budget)
    check_pruner(pruner, axes, budget)
