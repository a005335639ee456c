"""Calibration in a run folder: each finished shard is stored, so that a killed run resumes there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from regrow.axes import Axis, AxisGraph
from regrow.commands import pruning as prune
from regrow.commands.shared_work import SharedWork
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.exchange import broadcast_record
from regrow.evidence import Evidence
from regrow.methods.pruning.pruner import Pruner
from regrow.nets import Loaded
from regrow.objectives import Objective
from regrow.progress import Progress
from regrow.run_folder import RunFolder
from regrow.scores import Statistics
from regrow.sources import Source
from regrow.store import statistics
from regrow.store.tensors import open_checkpoint
from regrow.streaming.network import StreamedNetwork
from regrow.training.checkpoint import FORMAT


def calibrate(
    folder: RunFolder,
    loaded: Loaded,
    axes: AxisGraph,
    pruner: Pruner,
    sources: Sequence[Source],
    progress: Progress,
    objective: Objective | None = None,
    network: StreamedNetwork | None = None,
    ranks: ProcessRank = SINGLE,
    batch_size: int = 1,
    shared: SharedWork | None = None,
    units: Sequence[Axis] | None = None,
) -> tuple[Evidence, str]:
    """Measure what a pruning method needs on the sources, or resume an interrupted measurement.

    Args:
        folder: The run folder, where finished shards are stored.
        loaded: The model.
        axes: The axes of the model.
        pruner: The method, which says what is measured.
        sources: The calibration data.
        progress: Called with (steps done, steps in all, what is being done).
        objective: What the model is trained for; ``None``: what fits the labels.
        network: The network, if it runs one block at a time.
        ranks: The processes that share the batches; the others call :func:`share_calibration`.
        batch_size: How many examples run at a time, as for :func:`regrow.commands.pruning.collect_evidence`.
        shared: What earlier runs of this process measured; gets what this one measures.
        units: The axes that may be cut, which are measured; ``None``: ``axes.units()``.

    Returns:
        The measurements, and a digest of everything that they depend on.
    """
    model, (several, notes) = loaded.origin.record(), prune.divide_sources(pruner, sources)
    sums = parameter_sums(loaded.model) if network is None else network.weights.sums()
    more: list[object] = [batch_size, [axis.key for axis in (axes.units() if units is None else units)]]
    keys = {
        source.name: statistics.fingerprint(source, pruner.shards, sorted(pruner.needs), str(model), sums, *more)
        for source in several
    }
    done = statistics.read_finished_shards(folder.path, keys, pruner.shards)
    shared = shared or SharedWork()
    shared.check_weights(sums)
    digests = shared.digests(several, pruner.needs, pruner.shards, str(model), sums, *more)
    done = {**shared.finished(digests, pruner.shards), **done}

    def keep(source: str, shard: int, sums: Statistics) -> None:
        statistics.save_statistics(folder.path, source, shard, sums, key=keys[source])

    if ranks.several:
        broadcast_record(ranks, [list(one) for one in done])
    given: Any = {"done": done, "on_done": keep, "visits": network, "ranks": ranks, "objective": objective}
    basis = loaded.model, axes, pruner, several, progress, batch_size
    evidence = replace(prune.collect_evidence(*basis, units, **given), notes=notes)
    for name, shards in evidence.statistics.items():
        shared.sums.update({(digests[name], i): shard for i, shard in enumerate(shards)})
    return evidence, statistics.fingerprint(Source("", ()), keys)


def share_calibration(
    model: nn.Module,
    axes: AxisGraph,
    pruner: Pruner,
    sources: Sequence[Source],
    ranks: ProcessRank,
    network: StreamedNetwork | None = None,
    batch_size: int = 1,
    units: Sequence[Axis] | None = None,
) -> None:
    """Measure the share of this rank in a calibration that rank 0 leads and stores.

    Args:
        model: The network.
        axes: The axes of the network.
        pruner: The method, which says what is measured.
        sources: The calibration data.
        ranks: The processes.
        network: The network, if it runs one block at a time.
        batch_size: As for :func:`calibrate`.
        units: As for :func:`calibrate`.
    """
    done = {(source, shard): Statistics(source) for source, shard in broadcast_record(ranks)}
    more: Any = {"done": done, "visits": network, "ranks": ranks, "batch_size": batch_size, "units": units}
    prune.collect_evidence(model, axes, pruner, sources, **more)


def open_journal(folder: RunFolder, key: str) -> dict[str, Any]:
    """Return the arguments of ``plan_cut`` that let it go on where an interrupted run stopped.

    Args:
        folder: The run folder.
        key: The digest of the measurements, as :func:`calibrate` returns it.
    """
    path = folder.path / "statistics" / "learned.safetensors"
    open_checkpoint(path, key, FORMAT)
    return {"checkpoint": path, "header": lambda: {"key": key}}


def parameter_sums(model: nn.Module) -> list[float]:
    """Return one sum per parameter, which tells different weights apart cheaply.

    Args:
        model: The network.
    """
    return [float(p.detach().flatten()[:4096].float().double().sum()) for p in model.parameters()]
