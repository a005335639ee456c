"""Pruning: from a network and sources to a smaller network and the plan that made it."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from regrow.axes import AxisGraph, Example
from regrow.method import Budget, Evidence, Need
from regrow.methods import entry
from regrow.plan import Plan
from regrow.pruner import Pruner
from regrow.runs.progress import Progress, silent
from regrow.scores import Scores
from regrow.scoring import collect, random
from regrow.sources import Source
from regrow.surgery import apply
from regrow.tracing import trace


def prune(
    model: nn.Module,
    *,
    method: str = "flap",
    keep: float = 0.8,
    sources: Sequence[Source] = (),
    example: Example | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = silent,
    **budget: Any,
) -> tuple[nn.Module, Plan]:
    """Prune a network in one call.

    Args:
        model: The network; it is changed in place.
        method: One of ``regrow.methods.METHODS``.
        keep: The fraction that stays, of the weights of linear layers and convolutions (of a language model: of its
            decoder's linear layers).
        sources: What to measure importance on; the more kinds, the better the result carries over.
        example: What to trace the network with; the first batch of the first source, unless given.
        settings: Settings of the method; its defaults, unless given.
        progress: Called with (batches done, batches in all, what).
        **budget: More fields of :class:`regrow.method.Budget`: ``measure``, ``only``, ``exclude``, ``round_to``.

    Returns:
        The same model, smaller, and the plan that was applied.

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
    if example is None:
        if not sources or not len(sources[0]):
            raise ValueError("give an example input, or a source whose first batch is one, to trace the network with")
        batch = sources[0].batches[0]
        example = Example(batch.args, batch.kwargs)
    axes, wanted = trace(model, *example.args, **example.kwargs), Budget(keep, **budget)
    check(axes, chosen, wanted, sources)
    plan, _ = proposed(model, axes, chosen, wanted, measured(model, axes, chosen, sources, progress))
    apply(model, axes, plan)
    return model, plan


def built(method: str, settings: Mapping[str, Any]) -> Pruner:
    """A method with settings, checked.

    Raises:
        ValueError: If the method or a setting is unknown, or a setting is of another type than its default.
    """
    found = entry(method)
    defaults = {field.name: field.default for field in fields(found.settings)}
    for name, value in settings.items():
        if name not in defaults:
            raise ValueError(f"{method} has no setting {name!r}; it has {', '.join(defaults)}")
        if type(value) is not type(defaults[name]):
            kind = type(defaults[name]).__name__
            raise ValueError(f"{method}: {name} is of type {kind}, like its default {defaults[name]!r}; got {value!r}")
    return found.build(found.settings(**settings))


def measured(
    model: nn.Module,
    axes: AxisGraph,
    method: Pruner,
    sources: Sequence[Source],
    progress: Progress = silent,
    **resume: Any,
) -> Evidence:
    """What a method needs to know, measured on the sources."""
    if not {Need.ACTIVATIONS, Need.GRADIENTS} & method.needs:
        return Evidence()
    told = lambda name, done, total: progress(done, total, f"measuring {name}")  # noqa: E731
    return Evidence(collect(model, axes, sources, method.needs, progress=told, **resume))


def proposed(
    model: nn.Module, axes: AxisGraph, method: Pruner, budget: Budget, evidence: Evidence
) -> tuple[Plan, Scores]:
    """The plan of a one-shot method, and the scores it was made from."""
    plan, state = method.propose(model, axes, evidence, method.init(axes, budget))
    assert plan is not None and state.scores is not None
    return plan, state.scores


def check(axes: AxisGraph, method: Pruner, budget: Budget, sources: Sequence[Source]) -> None:
    """Assert that a budget can be met and that there is something to measure on, before anything is measured.

    Raises:
        ValueError: If not; names the least reachable keep.
    """
    if not sources and {Need.ACTIVATIONS, Need.GRADIENTS} & method.needs:
        raise ValueError("this method measures on text or images; give it at least one source, like --source news")
    units = axes.units(budget.only, budget.exclude, budget.marks)
    method.allocate(axes, random(axes, units=units), budget)
