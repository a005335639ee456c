"""Recovery of a cut network within a run folder, with a checkpoint from which it resumes."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.core.axes import AxisGraph
from regrow.core.objectives import Objective
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Source
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import ALONE, Parallel, broadcast_file, broadcast_model, broadcast_record
from regrow.evaluation import Perplexity, paired_difference
from regrow.jobs.recording import Record
from regrow.methods import MethodKind, find_method
from regrow.methods.recovery import Recovery, RecoveryTask
from regrow.methods.recovery import task as recovery
from regrow.methods.recovery.bias import set_bias
from regrow.methods.recovery.streamed import REFIT_FIELDS, StreamedPair
from regrow.nets import Loaded
from regrow.nets.precision import autocasting
from regrow.settings.recover import CLOSED_FORM
from regrow.store.statistics import fingerprint, parameter_sums
from regrow.store.tensors import open_checkpoint
from regrow.training import checkpoint as training


def recover(
    record: Record,
    model: nn.Module,
    dense: Loaded,
    axes: AxisGraph,
    plan: Plan,
    sources: Sequence[Source],
    by: str,
    *,
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    number: int = 1,
    precision: str = "float32",
    objective: Objective | None = None,
    progress: Progress = silent,
    parallel: Parallel = ALONE,
    streamed: StreamedPair | None = None,
) -> dict[str, Any]:
    """Recover a cut network by a method, or resume an interrupted recovery, and log a ``recovery`` row.

    Args:
        record: The run, whose folder gets the checkpoint, and which gets the row.
        model: The network after the cut; changed in place, and on all ranks that of rank 0 afterwards.
        dense: The model before the cut.
        axes: The axes of the dense model.
        plan: The plan of the cut.
        sources: The data to learn from.
        by: One of ``regrow.methods.RECOVERIES``.
        settings: Settings of the recovery that differ from the defaults.
        seed: Seed of all random choices.
        number: The number of this recovery of the network, from 1.
        precision: The precision of forward passes of a recovery that trains.
        objective: What the network is trained for; ``None``: what fits the labels.
        progress: Called with (steps done, steps in all, what is being done).
        parallel: The processes that train together; all of them call this.
        streamed: The two networks one block at a time, where they are larger than memory; changed tensors are kept in
            its files, and ``model`` has no numbers.

    Returns:
        The logged row.

    Raises:
        ValueError: If the recovery or a setting is unknown, or the text is of no use for it.
    """
    work = find_method(MethodKind.RECOVERY, by).made(by, settings or {})
    key, spent, start = "", 0.0, time.perf_counter()
    path: Path | None = None
    if record.kept:
        texts = [fingerprint(source) for source in sources]
        if streamed is None:
            weights = [parameter_sums(net) for net in (model, dense.model)]
        else:
            weights = [net.weights.sums() for net in (streamed.model, streamed.dense)]
        key = fingerprint(Source("", ()), by, dict(settings or {}), seed, texts, weights, str(dense.origin.record()))
        path = record.path / "statistics" / "recovery.safetensors"
        spent = float(open_checkpoint(path, key, training.FORMAT, recovery.FORMAT).get("seconds", 0))
    if parallel.ranks.several:
        path = broadcast_file(parallel.ranks, path or Path("recovery.safetensors"), record.path)
    seconds = lambda: spent + time.perf_counter() - start  # noqa: E731
    header = lambda: {"key": key, "seconds": seconds()}  # noqa: E731
    if streamed is not None:
        streamed.changed.open(key, REFIT_FIELDS if by == "refit" else ())
    task = RecoveryTask(
        model, dense.model, axes, plan, sources, seed, path, header, progress, objective, parallel, streamed
    )
    outcome = work_in(precision, by, work, task)
    tokens = sum(source.tokens for source in sources)
    row = {"by": by, "tokens": tokens, "seconds": round(seconds(), 1), **outcome}
    row |= {"round": number} if number > 1 else {}
    record.log("recovery", **row)
    return row


def broadcast_recovered(ranks: ProcessRank, model: nn.Module) -> None:
    """Set a network to that of rank 0, in place; biases that its recovery has added are added on the other ranks.

    Args:
        ranks: The processes; all of them call this.
        model: The network after the cut, recovered on rank 0.
    """
    if not ranks.several:
        return
    own = dict(model.named_parameters())
    shapes = {name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in own.items()}
    for name, (dtype, shape) in broadcast_record(ranks, shapes).items():
        if name not in own:
            set_bias(model, name, torch.zeros(shape, dtype=getattr(torch, dtype)))
    broadcast_model(ranks, model)


def work_in(precision: str, by: str, work: Recovery, task: RecoveryTask) -> dict[str, Any]:
    """Recover a network with forward passes in a precision, if the recovery trains, and return its summary.

    Args:
        precision: The precision.
        by: The name of the recovery.
        work: The recovery.
        task: The networks and the data.
    """
    precision = "float32" if by in CLOSED_FORM else precision
    with autocasting(task.model, precision), autocasting(task.dense, precision):
        return work(task)


def check_recovery(by: str, sources: Sequence[str]) -> None:
    """Raise ValueError, before a run starts, if the wanted recovery is unknown, lacks a package or lacks data.

    Args:
        by: The name of the recovery; empty: none is wanted.
        sources: The sources, as ``--source`` takes them.

    Raises:
        ValueError: If there is no such recovery, it needs a package that is missing, or there is no source.
    """
    if by:
        find_method(MethodKind.RECOVERY, by).made(by, {})
        if not sources:
            raise ValueError(f"--recover {by} learns from text or images; give at least one source, like --source news")


def log_differences(folder: Record, perplexities: Mapping[str, Perplexity], number: int = 1) -> None:
    """Log the paired difference in log-perplexity of the recovered model to the pruned one, and to the dense one.

    Args:
        folder: The run folder, with the perplexities of those two models.
        perplexities: Source name → the perplexity of the recovered model.
        number: The number of this recovery of the network, from 1.
    """
    more = {"round": number} if number > 1 else {}
    rows = {(row["model"], row["source"]): row for row in folder.metrics() if row["what"] == "perplexity"}
    for name, after in perplexities.items():
        for model in ("pruned", "dense"):  # a page takes the last: what is left of the damage
            row = rows.get((model, name), {})
            nll = row.get("nll_per_window", [])
            if row.get("tokens") == sum(after.tokens) and len(nll) == len(after.nll) and None not in nll:
                pair = paired_difference(Perplexity(name, tuple(nll), after.tokens, after.bytes, after.origin), after)
                folder.log("paired", source=name, delta_nll=pair.mean, se=pair.error, of=[model, "recovered"], **more)
