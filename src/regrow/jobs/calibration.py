"""Calibration in a run folder: each finished shard is stored, so that a killed run resumes there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.core.axes import Axis, AxisGraph
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.scores import Evidence, Scores, Statistics
from regrow.core.sources import Source
from regrow.distributed.parallel import broadcast_record
from regrow.jobs import pruning
from regrow.jobs.recording import ActiveRun, Record
from regrow.jobs.shared_work import SharedWork
from regrow.jobs.streamed_run import PrunedNetwork
from regrow.methods.pruning.pruner import Pruner
from regrow.scoring.metrics import energy, massive
from regrow.scoring.weights import readers
from regrow.store import statistics
from regrow.store.tensors import open_checkpoint
from regrow.training.state import FORMAT


def write_scores(
    folder: Record, weights: Mapping[str, Tensor], axes: AxisGraph, plan: Plan, scores: Scores, evidence: Evidence
) -> None:
    """Write a summary of the scores from which a plan was made into a run folder.

    Args:
        folder: The run folder.
        weights: The parameters of the model by name.
        axes: Its axes.
        plan: The plan.
        scores: The scores of the units.
        evidence: The measured activations.
    """
    entries: dict[str, dict[str, Any]] = {}
    for key, values in scores.values.items():
        steps = torch.quantile(values.double(), torch.linspace(0, 1, 21, dtype=torch.float64)).tolist()
        keep = list(plan.changes[key].keep) if key in plan.changes else list(range(len(values)))
        dropped = list(plan.changes[key].dropped) if key in plan.changes else []
        entries[key] = {
            "quantiles": steps,
            "kept_min": float(values[keep].min()),
            "dropped_max": float(values[dropped].max()) if dropped else None,
            "massive": [],
        }
    if evidence.statistics and (measured := evidence.pooled(gradients=False)).moments:
        some = [axes[key] for key in scores.values if key in axes.axes]
        some = [one for one in some if all(read.weight in measured.moments for read in readers(axes, [one]))]
        units = massive(axes, energy(weights, axes, measured, units=some))
        for one in units:
            if one.axis in entries:
                entries[one.axis]["massive"].append({"unit": one.unit, "ratio": one.ratio, "share": one.share})
    folder.write_scores(scores.metric, entries)


def calibrate(
    run: ActiveRun,
    network: PrunedNetwork,
    axes: AxisGraph,
    pruner: Pruner,
    sources: Sequence[Source],
    *,
    units: Sequence[Axis],
    batch_size: int = 1,
    objective: Objective | None = None,
    shared: SharedWork,
) -> tuple[Evidence, str]:
    """Measure what a pruning method needs on the sources, or resume an interrupted measurement.

    Args:
        run: The run, in whose folder finished shards are stored; its processes share the batches, rank 0 gets the sums.
        network: The network.
        axes: Its axes.
        pruner: The method, which says what is measured.
        sources: The calibration data.
        units: The axes that may be cut, which are measured.
        batch_size: How many examples run at a time, as for :func:`regrow.jobs.pruning.collect_evidence`.
        objective: What the model is trained for; ``None``: what fits the labels.
        shared: What earlier runs of this process measured; gets what this one measures.

    Returns:
        The measurements, and a digest of everything that they depend on; empty if nothing is recorded.
    """
    record, ranks = run.record, run.ranks
    several, notes = pruning.divide_sources(pruner, sources)
    done: dict[tuple[str, int], Statistics] = {}
    digests: dict[str, str] = {}
    keys: dict[str, str] = {}
    if record.kept:
        sums, name = network.sums(), str(network.loaded.origin.record())
        rest = [name, sums, batch_size, [axis.key for axis in units]]
        needs = sorted(pruner.needs)
        keys = {source.name: statistics.fingerprint(source, pruner.shards, needs, *rest) for source in several}
        shared.check_weights(sums)
        digests = shared.digests(several, pruner.needs, pruner.shards, *rest)
        done = shared.finished(digests, pruner.shards)
        done |= statistics.read_finished_shards(record.path, keys, pruner.shards)

    def keep(source: str, shard: int, sums: Statistics) -> None:
        if record.kept:
            statistics.save_statistics(record.path, source, shard, sums, key=keys[source])

    finished = broadcast_record(ranks, [[*key] for key in done])
    if not ranks.leads:
        done = {(source, shard): Statistics(source) for source, shard in finished}
    evidence = pruning.collect_evidence(
        network.loaded.model,
        axes,
        pruner,
        several,
        run.progress,
        batch_size,
        units,
        done=done,
        on_done=keep,
        visits=network.visits,
        ranks=ranks,
        objective=objective,
    )
    for source, shards in evidence.statistics.items() if record.kept else ():
        shared.sums.update({(digests[source], i): shard for i, shard in enumerate(shards)})
    return replace(evidence, notes=notes), statistics.fingerprint(Source("", ()), keys) if record.kept else ""


def open_journal(record: Record, key: str) -> Path | None:
    """Return the file from which the learning of a plan resumes after an interruption; ``None`` if nothing is kept.

    Args:
        record: The run.
        key: The digest of the measurements, as :func:`calibrate` returns it.
    """
    if not record.kept:
        return None
    path = record.path / "statistics" / "learned.safetensors"
    open_checkpoint(path, key, FORMAT)
    return path
