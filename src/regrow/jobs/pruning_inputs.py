"""What pruning runs derive from their settings: model, sources, budget, method and its measurements, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.amounts import Measure, Target
from regrow.core.axes import Axis, AxisGraph, Mark
from regrow.core.budget import Budget, Timing
from regrow.core.names import GENERATED, names_function
from regrow.core.objectives import Objective
from regrow.core.progress import Progress, silent
from regrow.core.scores import Evidence, Need, Statistics
from regrow.core.sources import Batch, Source, preserve_random_state
from regrow.data.batch_streams import join_batches
from regrow.distributed.parallel import broadcast_record
from regrow.evaluation.timing import time_widths
from regrow.jobs.inputs import SourceSpecs, count_windows, read_sources
from regrow.jobs.measuring import make_timed_input
from regrow.jobs.models import ModelSpec
from regrow.jobs.recording import ActiveRun
from regrow.jobs.run_networks import PrunedNetwork
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import Pruner, check_pruner
from regrow.nets import Loaded
from regrow.nets.load import check_code
from regrow.scoring.collect import CollectionOptions, check_sources, collect
from regrow.settings.prune import Settings
from regrow.store import statistics
from regrow.store.run_record import convert_settings

# Networks that read no text are fitted on about as many input values, and on as many examples at least.
MOST_FITTED, FEWEST_FITTED = 2**22, 128


def read_pruning_settings(values: Mapping[str, object], code: str = "") -> Settings:
    """Return the settings of a pruning run from ``values``, those in ``run.json``.

    ``code``: replaces a function that is named as the model; ModelError if it is empty then: no recorded code is run.
    """
    settings = convert_settings(values, Settings)
    if names_function(settings.model):
        check_code(settings.model, True, code)
        return replace(settings, model=code)
    return settings


def make_model_spec(settings: Settings) -> ModelSpec:
    """Return which model a run prunes, and its dtype, device and input."""
    sources = (*settings.sources, *settings.unseen)
    return ModelSpec(settings.model, settings.dtype, settings.device, settings.input, sources)


def make_source_specs(settings: Settings, total: int = 0) -> SourceSpecs:
    """Return which sources a run reads and how much: ``total`` calibration tokens in all, or (0) as settings say."""
    tokens, generated_tokens = settings.tokens, settings.generated_tokens
    if total:
        tokens = generated_tokens = total // max(1, len(settings.sources))
    specs = SourceSpecs(settings.eval_tokens, settings.seq_len, settings.sources, settings.unseen, tokens)
    return replace(specs, seed=settings.seed, generated_tokens=generated_tokens)


def make_budget(settings: Settings) -> Budget:
    """Return the budget of a run: how much may stay, and which axes may be cut; times are not measured yet."""
    return Budget(
        1.0 if settings.keep is None else settings.keep,
        only=settings.only,
        exclude=settings.exclude,
        marks=frozenset(map(Mark, settings.marks)),
        round_to=settings.round_to or 1,
        regular=settings.regular,
        target=Target.parse(settings.target) if settings.target else None,
    )


def build_pruner(method: str, settings: Mapping[str, object]) -> Pruner:
    """Return a pruning method by name; ValueError if the name or a setting is unknown or out of its range."""
    pruner: Pruner = find_method(MethodKind.PRUNING, method).create(method, settings)
    return pruner


def make_pruner(settings: Settings) -> Pruner:
    """Return the method of a run; its setting ``seed``, if it has one that is not set, is the run's."""
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
    options: CollectionOptions | None = None,
) -> Evidence:
    """Return what a method measures on the sources, which :func:`divide_sources` divides; nothing if it needs no data.

    ``batch_size``: examples at a time, where smaller batches can be joined. The rest is as for :func:`collect`.
    """
    if not _needs_data(pruner):
        return Evidence()
    divided, notes = divide_sources(pruner, sources)
    batch_size = 1 if Need.GRADIENTS in pruner.needs else batch_size
    joined = [join_batches(source, batch_size, pruner.shards) for source in divided]
    statistics = collect(
        model, axes, joined, pruner.needs, shards=pruner.shards, units=units, objective=objective, options=options
    )
    return Evidence(statistics, {source.name: source for source in divided}, notes=notes)


def _needs_data(pruner: Pruner) -> bool:
    """Whether a method measures activations or gradients on data, and does not score by weights alone."""
    return not pruner.needs <= {Need.WEIGHTS}


def divide_sources(pruner: Pruner, sources: Sequence[Source]) -> tuple[list[Source], tuple[str, ...]]:
    """Return the sources that a method compares, and a note for the user if one had to be split, else ``()``.

    If there are fewer than it compares, the longest is split into interleaved parts, named ``NAME/1`` and so on. Where
    a method divides data, those of a loader are read once, so that parts do not overlap if it shuffles.
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
    model: nn.Module, axes: AxisGraph, budget: Budget, recorded: Any = None, progress: Progress = silent
) -> Budget:
    """Return the budget; one in milliseconds with times, ``recorded`` in ``run.json`` or measured on ``model``."""
    if budget.measure != Measure.TIME:
        return budget
    if recorded:
        return replace(budget, timing=Timing.from_record(recorded))
    batch, units = make_timed_input(axes, budget), budget.units(axes)
    timing = time_widths(model, axes, units, batch, round_to=budget.round_to, progress=progress)
    return replace(budget, timing=timing)


def check_pruning(pruner: Pruner, axes: AxisGraph, budget: Budget, sources: Sequence[Source]) -> None:
    """Raise ValueError unless a method can meet a budget, in a trial with random scores, and has data (here unread)."""
    if _needs_data(pruner):
        if not sources:
            raise ValueError("this method measures on text or images; give it at least one source, like --source news")
        # Batches are counted, not read: numbers stand for them, which a range divides as a list would.
        counted = [replace(source, batches=cast(Any, range(len(source)))) for source in sources]
        divided, _ = divide_sources(pruner, counted)
        check_sources(divided, pruner.shards)
    check_pruner(pruner, axes, budget)


def read_training_text(settings: Settings, loaded: Loaded, calibration: Sequence[Source]) -> list[Source]:
    """Return ``settings.distil`` tokens of the written sources, over all together, in windows not calibrated on."""
    written = tuple(name for name in settings.sources if name != GENERATED)
    if not written:
        return []
    tokens = settings.distil or 0
    total = tokens + settings.tokens * len(written)
    whole = read_sources(make_source_specs(replace(settings, sources=written), total), loaded).calibration
    used = [source for source in calibration if source.name != GENERATED]
    # On text that layers were fitted on, the network is too good for training to be judged, and learns less.
    known = {batch.args[0].numpy().tobytes() for source in used for batch in source}
    n = count_windows(tokens // len(written), settings.seq_len)
    new = [[batch for batch in source if batch.args[0].numpy().tobytes() not in known][:n] for source in whole]
    pairs = zip(whole, new, strict=True)
    return [join_batches(replace(source, batches=batches), 2) for source, batches in pairs]  # two run faster than one


def explain_too_little(sources: Sequence[Source]) -> str:
    """Return why a cut network cannot be trained on sources, for lack of text or labels; empty: it can."""
    if not sources:
        return "no source has written text"
    few = next((source for source in sources if len(source) < 2 or source.batches[0].labels is None), None)
    return f"source {few.name!r} has too little text with labels" if few else ""


def take_for_fit(source: Source) -> Source:
    """Return the first batches of a source: at least two, ``MOST_FITTED`` input values and ``FEWEST_FITTED`` examples.

    While layers are fitted, what they compute for all examples is in memory.
    """
    batches, values, examples = list[Batch](), 0, 0
    with preserve_random_state(source.generators):
        for batch in source:
            batches.append(batch)
            inputs = [leaf for leaf in tree_leaves((batch.args, dict(batch.kwargs))) if isinstance(leaf, Tensor)]
            values += sum(map(Tensor.numel, inputs))
            examples += next((len(leaf) for leaf in inputs if leaf.dim()), 1)
            if len(batches) > 1 and values >= MOST_FITTED and examples >= FEWEST_FITTED:
                break
    return replace(source, batches=batches)


def calibrate(
    run: ActiveRun,
    network: PrunedNetwork,
    sources: Sequence[Source],
    axes: AxisGraph,
    pruner: Pruner,
    units: Sequence[Axis],
    batch_size: int,
    objective: Objective | None,
) -> tuple[Evidence, str]:
    """Measure what a method needs, or resume that; return it, and a digest of what it depends on ("" without a folder).

    ``units``: the axes that are measured. The ranks share the batches, and rank 0 alone gets the sums.
    """
    record, ranks = run.record, run.ranks
    sources, notes = divide_sources(pruner, sources)
    keys: dict[str, str] = {}
    done: dict[tuple[str, int], Statistics] = {}
    if record.is_kept:
        needs, measured = sorted({*pruner.needs} - {Need.WEIGHTS}), [axis.key for axis in units]
        origin, sums = str(network.loaded.origin.record()), network.sum_parameters()
        keys = {
            source.name: statistics.fingerprint(source, pruner.shards, needs, origin, sums, batch_size, measured)
            for source in sources
        }
        done = statistics.read_finished_shards(record.path, keys, pruner.shards)

    def save_shard(source: str, shard: int, sums: Statistics) -> None:
        if record.is_kept:
            statistics.save_statistics(record.path, source, shard, sums, key=keys[source])

    finished = broadcast_record(ranks, [[*key] for key in done])
    if not ranks.leads:  # empty sums: such a rank only needs to know what not to measure
        done = {(source, shard): Statistics(source) for source, shard in finished}
    evidence = collect_evidence(
        network.loaded.model,
        axes,
        pruner,
        sources,
        batch_size=batch_size,
        units=units,
        objective=objective,
        options=CollectionOptions(network.streamed, ranks, done, save_shard, run.progress),
    )
    return replace(evidence, notes=notes), statistics.fingerprint(Source("", ()), keys) if record.is_kept else ""
