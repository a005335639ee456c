"""What a pruning run prunes by: its settings as records, the method, its budget and its measurements, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from regrow import evaluation
from regrow.core.amounts import Measure, Target
from regrow.core.axes import Axis, AxisGraph, Mark
from regrow.core.budget import Budget, Timing
from regrow.core.errors import InputError
from regrow.core.names import GENERATED, names_code
from regrow.core.objectives import Objective
from regrow.core.progress import Progress, silent
from regrow.core.scores import Evidence, Need, Statistics
from regrow.core.sources import Source
from regrow.data.batch_streams import join_batches
from regrow.distributed import SINGLE, ProcessRank
from regrow.jobs.inputs import SourceSpecs, count_windows
from regrow.jobs.measuring import timed_input
from regrow.jobs.models import ModelSpec
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import Pruner, check_pruner
from regrow.nets.load import check_code
from regrow.scoring.collect import BlockVisits, CollectionRun, check_sources, collect
from regrow.settings.prune import RECONSTRUCTION, Settings, complete_reconstruction
from regrow.store.run_record import convert_settings

LEAST_TOKENS = 8192
"""The fewest tokens of text to reconstruct on, unless another number is asked for."""


def read_pruning_settings(values: Mapping[str, object], code: str = "") -> Settings:
    """Return the settings in the ``run.json`` of a pruning run; ``code`` replaces the user's own code that it names."""
    model = values.get("model")
    if not isinstance(model, str):
        raise InputError("the settings of the run name no model; restore run.json")
    if names_code(model):
        check_code(model, True, code)
        values = {**values, "model": code}
    return convert_settings(values, Settings)


def model_spec(settings: Settings) -> ModelSpec:
    """Return which model a run prunes, and how it is loaded."""
    sources = (*settings.sources, *settings.unseen)
    return ModelSpec(settings.model, settings.dtype, settings.device, settings.input, sources)


def source_specs(settings: Settings, total: int = 0) -> SourceSpecs:
    """Return which sources a run reads, and how much of each: ``total`` tokens together, or those for calibration."""
    return SourceSpecs(
        settings.eval_tokens,
        settings.seq_len,
        settings.sources,
        settings.unseen,
        total // max(1, len(settings.sources)) if total else settings.tokens,
        settings.seed,
        0 if total else settings.generated_tokens,
    )


def count_calibration(settings: Settings) -> int:
    """Return how many tokens or images a run calibrates on, over all sources together.

    >>> count_calibration(Settings("m", sources=("news", "generated"), tokens=4096, generated_tokens=12288))
    16384
    """
    generated = settings.generated_tokens or settings.tokens
    return sum(generated if name == GENERATED else settings.tokens for name in settings.sources)


def count_tokens(settings: Settings, text: bool) -> int:
    """Return how many tokens (with ``text``) or images a run reconstructs on, over all sources together.

    >>> count_tokens(Settings("m", sources=("news", "code")), True)
    8192
    """
    calibration = count_calibration(settings)
    return settings.reconstruct_tokens or (max(LEAST_TOKENS, calibration) if text else calibration)


def count_generated(settings: Settings) -> int:
    """Return how many windows a pruning run generates at most, of the parts that use different amounts."""
    amounts = [settings.generated_tokens or settings.tokens]
    if settings.reconstruct and count_tokens(settings, text=True) != count_calibration(settings):
        amounts.append(source_specs(settings, count_tokens(settings, text=True)).tokens)
    return count_windows(max(amounts), settings.seq_len)


def budget_of(settings: Settings) -> Budget:
    """Return the budget of a run: how much may stay, and which axes may be cut."""
    return Budget(
        1.0 if settings.keep is None else settings.keep,
        Measure(settings.measure),
        settings.only,
        settings.exclude,
        frozenset(map(Mark, settings.marks)),
        settings.round_to,
        settings.regular,
        Target.parse(settings.target) if settings.target else None,
    )


def record_defaults(settings: Settings) -> dict[str, Any]:
    """Return the defaults of the method, and of the reconstruction after it."""
    defaults = find_method(MethodKind.PRUNING, settings.method).defaults({*settings.method_settings, "seed"})
    if settings.reconstruct:
        fit = find_method(MethodKind.RECOVERY, RECONSTRUCTION).defaults({})
        fit |= complete_reconstruction({}, settings.sources)
        known = settings.reconstruct_settings
        defaults |= {f"reconstruct {name}": value for name, value in fit.items() if name not in known}
    return defaults


def build_pruner(method: str, settings: Mapping[str, object]) -> Pruner:
    """Return a pruning method with the given settings, after checking them."""
    pruner: Pruner = find_method(MethodKind.PRUNING, method).made(method, settings)
    return pruner


def pruner_of(settings: Settings) -> Pruner:
    """Return the method of a run; one that has a seed gets the run's, unless it was given its own."""
    fields = getattr(find_method(MethodKind.PRUNING, settings.method).settings, "__dataclass_fields__", {})
    seed = {"seed": settings.seed} if "seed" in fields else {}
    return build_pruner(settings.method, seed | dict(settings.method_settings))


@dataclass(frozen=True)
class Measuring:
    """How a method's evidence is measured."""

    batch_size: int = 1  # examples at a time, where smaller batches can be joined
    units: Sequence[Axis] | None = None  # the axes that may be cut, which are measured; `None`: all units
    objective: Objective | None = None  # what the network is trained for; `None`: what fits the labels
    visits: BlockVisits | None = None  # runs the network one block at a time; `None`: it is in memory
    done: Mapping[tuple[str, int], Statistics] | None = None  # (source, shard) → sums that are known
    on_done: Callable[[str, int, Statistics], None] | None = None  # called with each finished shard
    progress: Progress = silent
    ranks: ProcessRank = SINGLE


def collect_evidence(
    model: nn.Module, axes: AxisGraph, pruner: Pruner, sources: Sequence[Source], how: Measuring = Measuring()
) -> Evidence:
    """Measure what a method needs on the sources; a source is split if the method compares more than there are."""
    if pruner.needs <= {Need.WEIGHTS}:
        return Evidence()
    divided, notes = divide_sources(pruner, sources)
    batch_size = 1 if Need.GRADIENTS in pruner.needs else how.batch_size
    statistics = collect(
        model,
        axes,
        [join_batches(source, batch_size, pruner.shards) for source in divided],
        pruner.needs,
        shards=pruner.shards,
        units=how.units,
        objective=how.objective,
        run=CollectionRun(
            visits=how.visits,
            ranks=how.ranks,
            done=how.done or {},
            on_done=how.on_done or (lambda source, shard, sums: None),
            progress=lambda name, count, total: how.progress(count, total, f"measuring {name}"),
        ),
    )
    return Evidence(statistics, {source.name: source for source in divided}, notes=notes)


def divide_sources(pruner: Pruner, sources: Sequence[Source]) -> tuple[list[Source], tuple[str, ...]]:
    """Return the sources that a method compares, and a note if one was split; given again, they are as they are.

    Where a method divides a source further, that of a loader is read once, so that parts do not overlap if it shuffles.
    """
    divided, notes = split_sources(sources, pruner.sources)
    if pruner.shards > 1 or pruner.sources > 1:
        divided = [
            replace(source, batches=list(source)) if hasattr(source.batches, "loader") else source for source in divided
        ]
    return divided, notes


def split_sources(sources: Sequence[Source], least: int) -> tuple[list[Source], tuple[str, ...]]:
    """Return at least ``least`` sources, by splitting the longest into interleaved parts, and a note if it was split.

    >>> parts, notes = split_sources([Source("news", [1, 2, 3, 4])], 3)
    >>> [(part.name, part.batches) for part in parts]
    [('news/1', [1, 4]), ('news/2', [2]), ('news/3', [3])]
    """
    missing = least - len(sources)
    if missing <= 0 or not sources:
        return list(sources), ()
    i = max(range(len(sources)), key=lambda i: len(sources[i]))
    longest, count = sources[i], missing + 1
    batches = list(longest.batches)  # read once: a loader may shuffle
    parts = [Source(f"{longest.name}/{k + 1}", batches[k::count], longest.origin) for k in range(count)]
    note = (
        f"this method compares at least {least} kinds of text and got {len(sources)}; {longest.name!r} was split "
        f"into {count} parts. Ranks differ between parts of one kind by chance alone, so units that only other kinds "
        "of text need are not recognised. Give more kinds with --source"
    )
    return [*sources[:i], *parts, *sources[i + 1 :]], (note,)


def with_timing(
    model: nn.Module,
    axes: AxisGraph,
    budget: Budget,
    *,
    known: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Budget:
    """Return the budget, with the network's timing if it counts time: ``known`` of an earlier measurement, or new."""
    if budget.measure != Measure.TIME or budget.timing is not None:
        return budget
    if known:
        return replace(budget, timing=Timing.from_record(known))
    batch, units = timed_input(axes, budget), budget.units(axes)
    timing = evaluation.timing(model, axes, units, batch, round_to=budget.round_to, progress=progress)
    return replace(budget, timing=timing)


def check_pruning(pruner: Pruner, axes: AxisGraph, budget: Budget, sources: Sequence[Source]) -> None:
    """Raise ValueError unless a method can meet a budget and has data to measure on."""
    if not pruner.needs <= {Need.WEIGHTS}:
        if not sources:
            raise ValueError("this method measures on text or images; give it at least one source, like --source news")
        counted: list[Any] = [range(len(source)) for source in sources]  # the batches are counted, not read
        numbered = [Source(source.name, batches) for source, batches in zip(sources, counted, strict=True)]
        check_sources(split_sources(numbered, pruner.sources)[0], pruner.shards)
    check_pruner(pruner, axes, budget)
