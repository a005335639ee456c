"""Calibration of a pruning run: each finished shard is stored, so that a killed run, or the next plan, has it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow import evaluation
from regrow.core.axes import Axis, AxisGraph
from regrow.core.budget import Timing
from regrow.core.errors import InputError
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.scores import Evidence, Need, Scores, Statistics
from regrow.core.sources import Source
from regrow.distributed.parallel import broadcast_record
from regrow.jobs.inputs import SourceHalves, SourceSpecs
from regrow.jobs.pruning import Measuring, collect_evidence, divide_sources
from regrow.jobs.recording import ActiveRun
from regrow.jobs.run_networks import PrunedNetwork
from regrow.methods.pruning.pruner import Pruner
from regrow.settings.prune import Settings
from regrow.store import statistics
from regrow.store.replacing import settle
from regrow.store.run_folder import RunFolder
from regrow.store.run_record import RUN, is_resumable, read_run, run_identity
from regrow.streaming.requirements import MemoryPlan


@dataclass(frozen=True)
class PruneInputs:
    """What a run prunes, and on which data."""

    network: PrunedNetwork
    axes: AxisGraph
    data: SourceHalves
    specs: SourceSpecs | None = None  # the sources of the data; `None`: they have no names
    objective: Objective | None = None  # what the network is trained for; `None`: what fits the labels
    lenient: bool = False  # whether the data for evaluation are those for calibration, whose labels need not fit
    call: dict[str, object] | None = None  # what the result depends on besides settings, for a call from Python
    memory: MemoryPlan | None = None  # how the run stays within a limit of memory; `None`: there is none
    timing: Timing | None = None


@dataclass(eq=False)
class SharedWork:
    """What runs of one model on the same data need not do again: its axes, calibration sums and dense measurements."""

    axes: AxisGraph | None = None
    sums: dict[tuple[str, int], Statistics] = field(default_factory=dict)  # (key of a source, shard) → sums
    weights: Sequence[float] = ()  # a sum of each parameter
    dense: dict[str, evaluation.Perplexity | evaluation.Accuracy] = field(default_factory=dict)
    memory: MemoryPlan | None = None
    generated: Tensor | None = None


def is_finished(settings: Settings, folder: Path) -> bool:
    """Whether a folder holds the finished pruning run of these settings; StoreError if it holds something else."""
    settle(folder)
    wanted = run_identity("prune", asdict(settings), None)
    if (folder / RUN).is_file():
        data = read_run(folder)
        if data.get("finished") and data["verb"] == "prune" and data["settings"] == wanted["settings"]:
            return True
    is_resumable(folder, wanted)
    return False


def calibrate(
    run: ActiveRun, inputs: PruneInputs, pruner: Pruner, units: Sequence[Axis], batch_size: int, shared: SharedWork
) -> tuple[Evidence, str]:
    """Measure what a method needs, or resume that; return it, and a digest of what it depends on if that is recorded.

    The processes of the run share the batches, and rank 0 gets the sums.
    """
    network, record, ranks = inputs.network, run.record, run.ranks
    sources, notes = divide_sources(pruner, inputs.data.calibration)
    keys: dict[str, str] = {}
    done: dict[tuple[str, int], Statistics] = {}
    if record.kept:
        sums, origin = network.sums(), str(network.loaded.origin.record())
        shared.weights = shared.weights or sums
        if shared.weights != sums:
            raise InputError("the model has other weights each time it is built; seed it, or make one plan at a time")
        needs, measured = sorted({*pruner.needs} - {Need.WEIGHTS}), [axis.key for axis in units]
        for source in sources:
            key = statistics.fingerprint(source, pruner.shards, needs, origin, sums, batch_size, measured)
            keys[source.name] = key
            known = (shard for shard in range(pruner.shards) if (key, shard) in shared.sums)
            done |= {(source.name, shard): shared.sums[key, shard] for shard in known}
        done |= statistics.read_finished_shards(record.path, keys, pruner.shards)

    def keep(source: str, shard: int, sums: Statistics) -> None:
        if record.kept:
            statistics.save_statistics(record.path, source, shard, sums, key=keys[source])

    finished = broadcast_record(ranks, [[*key] for key in done])
    if not ranks.leads:
        done = {(source, shard): Statistics(source) for source, shard in finished}
    how = Measuring(batch_size, units, inputs.objective, network.visits, done, keep, run.progress, ranks)
    evidence = collect_evidence(network.loaded.model, inputs.axes, pruner, sources, how)
    for name, key in keys.items():
        shared.sums |= {(key, i): shard for i, shard in enumerate(evidence.statistics.get(name, ()))}
    return replace(evidence, notes=notes), statistics.fingerprint(Source("", ()), keys) if record.kept else ""


def write_scores(record: RunFolder, plan: Plan, scores: Scores) -> None:
    """Write a summary of the scores from which a plan was made into a run folder."""
    entries: dict[str, dict[str, Any]] = {}
    for key, values in scores.values.items():
        change = plan.changes.get(key)
        kept = values[list(change.keep)] if change else values
        dropped = values[list(change.dropped)] if change else values[:0]
        entries[key] = {
            "quantiles": torch.quantile(values.double(), torch.linspace(0, 1, 21, dtype=torch.float64)).tolist(),
            "kept_min": float(kept.min()),
            "dropped_max": float(dropped.max()) if len(dropped) else None,
        }
    record.write_scores(scores.metric, entries)
