"""What a pruning run prunes by: its settings as records, the method, its budget and its measurements, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from regrow.core.amounts import Measure, Target
from regrow.core.axes import Axis, AxisGraph, Mark
from regrow.core.budget import Budget, Timing
from regrow.core.names import names_function
from regrow.core.objectives import Objective
from regrow.core.progress import Progress, silent
from regrow.core.scores import Evidence, Need
from regrow.core.sources import Source
from regrow.data.batch_streams import join_batches
from regrow.evaluation.timing import time_widths
from regrow.jobs.inputs import SourceSpecs
from regrow.jobs.measuring import timed_input
from regrow.jobs.models import ModelSpec
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import Pruner, check_pruner
from regrow.nets.load import check_code
from regrow.scoring.collect import CollectionOptions, check_sources, collect
from regrow.settings.prune import Settings
from regrow.store.run_record import convert_settings


def read_pruning_settings(values: Mapping[str, object], code: str = "") -> Settings:
    """Return the settings in the ``run.json`` of a pruning run; ``code`` replaces the user's own code that it names."""
    settings = convert_settings(values, Settings)
    if names_function(settings.model):
        check_code(settings.model, True, code)
        return replace(settings, model=code)
    return settings


def model_spec(settings: Settings) -> ModelSpec:
    """Return which model a run prunes, and how it is loaded."""
    sources = (*settings.sources, *settings.unseen)
    return ModelSpec(settings.model, settings.dtype, settings.device, settings.input, sources)


def source_specs(settings: Settings, total: int = 0) -> SourceSpecs:
    """Return which sources a run reads, and how much of each: ``total`` tokens together, or those for calibration."""
    share = total // max(1, len(settings.sources))
    return SourceSpecs(
        settings.eval_tokens,
        settings.seq_len,
        settings.sources,
        settings.unseen,
        share if total else settings.tokens,
        settings.seed,
        share if total else settings.generated_tokens,
    )


def budget_of(settings: Settings) -> Budget:
    """Return the budget of a run: how much may stay, and which axes may be cut."""
    return Budget(
        1.0 if settings.keep is None else settings.keep,
        only=settings.only,
        exclude=settings.exclude,
        marks=frozenset(map(Mark, settings.marks)),
        round_to=settings.round_to,
        regular=settings.regular,
        target=Target.parse(settings.target) if settings.target else None,
    )


def build_pruner(method: str, settings: Mapping[str, object]) -> Pruner:
    """Return a pruning method with the given settings, after checking them."""
    pruner: Pruner = find_method(MethodKind.PRUNING, method).create(method, settings)
    return pruner


def pruner_of(settings: Settings) -> Pruner:
    """Return the method of a run; one that has a seed gets the run's, unless it was given its own."""
    fields = getattr(find_method(MethodKind.PRUNING, settings.method).settings, "__dataclass_fields__", {})
    seed = {"seed": settings.seed} if "seed" in fields else {}
    return build_pruner(settings.method, seed | dict(settings.method_settings))


def collect_evidence(
    model: nn.Module,
    axes: AxisGraph,
    pruner: Pruner,
    sources: Sequence[Source],
    *,
    batch_size: int = 1,
    units: Sequence[Axis] | None = None,
    objective: Objective | None = None,
    run: CollectionOptions | None = None,
) -> Evidence:
    """Measure what a method needs on the sources; a source is split if the method compares more than there are.

    ``batch_size``: examples at a time, where smaller batches can be joined. The rest is as for :func:`collect`.
    """
    if pruner.needs <= {Need.WEIGHTS}:
        return Evidence()
    divided, notes = divide_sources(pruner, sources)
    batch_size = 1 if Need.GRADIENTS in pruner.needs else batch_size
    joined = [join_batches(source, batch_size, pruner.shards) for source in divided]
    statistics = collect(
        model, axes, joined, pruner.needs, shards=pruner.shards, units=units, objective=objective, run=run
    )
    return Evidence(statistics, {source.name: source for source in divided}, notes=notes)


def divide_sources(pruner: Pruner, sources: Sequence[Source]) -> tuple[list[Source], tuple[str, ...]]:
    """Return the sources that a method compares, and a note if the longest was split into interleaved parts for that.

    Where a method divides a source, that of a loader is read once, so that parts do not overlap if it shuffles.
    """
    divided, notes = [*sources], tuple[str, ...]()
    if 0 < len(sources) < pruner.sources:
        i = max(range(len(sources)), key=lambda i: len(sources[i]))
        longest, count = sources[i], pruner.sources - len(sources) + 1
        batches = list(longest.batches)
        parts = (Source(f"{longest.name}/{k + 1}", batches[k::count], longest.origin) for k in range(count))
        divided[i : i + 1] = parts
        notes = (
            f"this method compares at least {pruner.sources} kinds of text and got {len(sources)}; {longest.name!r} "
            f"was split into {count} parts. Ranks differ between parts of one kind by chance alone, so units that only "
            "other kinds of text need are not recognised. Give more kinds with --source",
        )
    if pruner.shards > 1 or pruner.sources > 1:
        divided = [
            replace(source, batches=list(source)) if hasattr(source.batches, "loader") else source for source in divided
        ]
    return divided, notes


def with_timing(
    model: nn.Module, axes: AxisGraph, budget: Budget, known: Any = None, progress: Progress = silent
) -> Budget:
    """Return the budget, with the network's timing if it counts time: ``known`` of an earlier measurement, or new."""
    if budget.measure != Measure.TIME:
        return budget
    if known:
        return replace(budget, timing=Timing.from_record(known))
    batch, units = timed_input(axes, budget), budget.units(axes)
    timing = time_widths(model, axes, units, batch, round_to=budget.round_to, progress=progress)
    return replace(budget, timing=timing)


def check_pruning(pruner: Pruner, axes: AxisGraph, budget: Budget, sources: Sequence[Source]) -> None:
    """Raise ValueError unless a method can meet a budget and has data to measure on."""
    if not pruner.needs <= {Need.WEIGHTS}:
        if not sources:
            raise ValueError("this method measures on text or images; give it at least one source, like --source news")
        numbers: list[Any] = [range(len(source)) for source in sources]  # the batches are counted, not read
        counted = [replace(source, batches=numbers[i]) for i, source in enumerate(sources)]
        check_sources(divide_sources(pruner, counted)[0], pruner.shards)
    check_pruner(pruner, axes, budget)
