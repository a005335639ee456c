"""Recovery and reconstruction of a cut network within a run folder, with a checkpoint from which they resume."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow import store
from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError
from regrow.core.names import GENERATED
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Source
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import broadcast_file, broadcast_model, broadcast_record
from regrow.evaluation import Perplexity, paired_difference
from regrow.jobs.inputs import SourceHalves, count_windows
from regrow.jobs.parents import BEFORE, describe_plans
from regrow.jobs.prune_settings import read_pruning_settings, source_specs
from regrow.jobs.recording import Record
from regrow.methods import MethodKind, find_method, recovery
from regrow.methods.recovery import REFIT_FIELDS, Recovery, RecoveryTask, StreamedPair, set_bias
from regrow.nets import ModelError
from regrow.nets.devices import autocasting
from regrow.settings.prune import RECONSTRUCTION, Settings, complete_reconstruction
from regrow.settings.recover import CLOSED_FORM
from regrow.settings.recover import Settings as RecoverSettings
from regrow.store.errors import StoreError
from regrow.store.run_folder import RunFolder
from regrow.store.run_record import RUN, check_repeatable, convert_settings
from regrow.store.statistics import fingerprint, parameter_sums
from regrow.store.tensors import open_checkpoint
from regrow.training import checkpoint as training

LEAST_TOKENS = 8192
"""The fewest tokens of text to reconstruct on, unless another number is asked for."""


def recover(
    record: Record,
    task: RecoveryTask,
    by: str,
    settings: Mapping[str, object] | None = None,
    *,
    origin: object = None,
    number: int = 1,
    precision: str = "float32",
) -> dict[str, Any]:
    """Recover a cut network by a method, or resume an interrupted recovery; log and return a ``recovery`` row.

    Args:
        record: The run, whose folder gets the checkpoint, and which gets the row.
        task: The networks and the data; ``model`` is changed in place, and on all ranks that of rank 0 afterwards.
        by: One of ``regrow.methods.RECOVERIES``.
        settings: Settings of the recovery that differ from the defaults.
        origin: How the dense network was built.
        number: The number of this recovery of the network, from 1.
        precision: The precision of forward passes of a recovery that trains.
    """
    settings = dict(settings or {})
    work, identity = find_method(MethodKind.RECOVERY, by).made(by, settings), (by, settings, task.seed, str(origin))
    fitted = REFIT_FIELDS if by == "refit" else ()
    row = {"by": by, **_resume(record, task, "recovery", identity, work, by, precision, fitted)}
    row |= {"round": number} if number > 1 else {}
    record.log("recovery", **row)
    return row


def reconstruct(
    model: nn.Module,
    dense: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    sources: Sequence[Source],
    given: Mapping[str, object],
    record: Record | None = None,
    progress: Progress = silent,
    streamed: StreamedPair | None = None,
) -> dict[str, Any]:
    """Fit every layer that reads cut units by least squares, in place, or resume that; log a ``reconstruction`` row.

    Args:
        model: The network after the cut; changed in place.
        dense: The network before the cut.
        axes: The axes of the dense network.
        plan: The plan of the cut.
        sources: The data to fit on; layers are judged on each of them in turn, left out of the fit.
        given: Settings of ``recover --by refit`` that differ from the defaults of a reconstruction.
        record: The run, whose folder gets the checkpoint, and which gets the row; ``None``: nothing is written.
        progress: Called with (steps done, steps in all, what is being done).
        streamed: The two networks one block at a time, where they are larger than memory; the tensors that change are
            kept in its files, and ``model`` has no numbers.

    Returns:
        What :func:`regrow.methods.recovery.refit.refit` returns, with ``tokens`` and ``seconds``.

    Raises:
        ValueError: If a setting is of no use, the data are too few, or no layer can be fitted.
    """
    settings = complete_reconstruction(given, [source.name for source in sources])
    work = find_method(MethodKind.RECOVERY, RECONSTRUCTION).made(RECONSTRUCTION, settings)
    task = RecoveryTask(model, dense, axes, plan, sources, progress=progress, streamed=streamed)
    identity = ("reconstruct", settings)
    row = _resume(record, task, "reconstruction", identity, work, RECONSTRUCTION, "float32", REFIT_FIELDS)
    if record is not None:
        record.log("reconstruction", **row)
        if "note" in row:
            record.update(notes=[*record.run().get("notes", ()), f"reconstruction: {row['note']}"])
    return row


def _resume(
    record: Record | None,
    task: RecoveryTask,
    name: str,
    identity: Sequence[object],
    work: Recovery,
    by: str,
    precision: str,
    fitted: tuple[str, ...],
) -> dict[str, Any]:
    """Carry out a recovery, or what is left of an interrupted one; return its summary with ``tokens``, ``seconds``.

    ``fitted`` are the fields that are recorded of every tensor that a streamed recovery has changed.
    """
    key, spent, start, streamed = "", 0.0, time.perf_counter(), task.streamed
    if record is not None and record.kept:
        texts = [fingerprint(source) for source in task.sources]
        if streamed is None:
            sums = [parameter_sums(network) for network in (task.model, task.dense)]
        else:
            sums = [network.weights.sums() for network in (streamed.model, streamed.dense)]
        key = fingerprint(Source("", ()), *identity, texts, sums)
        path = record.path / "statistics" / f"{name}.safetensors"
        spent = float(open_checkpoint(path, key, training.FORMAT, recovery.FORMAT).get("seconds", 0))
        task = replace(task, checkpoint=path)
        if streamed is not None:
            streamed.changed.open(key, fitted)
    if record is not None and task.parallel.ranks.several:
        file = broadcast_file(task.parallel.ranks, task.checkpoint or record.path / "recovery.safetensors", record.path)
        task = replace(task, checkpoint=file)

    def header() -> dict[str, object]:
        return {"key": key, "seconds": spent + time.perf_counter() - start}

    summary = work_in(precision, by, work, replace(task, header=header))
    seconds = round(spent + time.perf_counter() - start, 1)
    return {"tokens": sum(source.tokens for source in task.sources), "seconds": seconds, **summary}


def work_in(precision: str, by: str, work: Recovery, task: RecoveryTask) -> dict[str, Any]:
    """Recover a network with forward passes in a precision, if the recovery trains, and return its summary."""
    precision = "float32" if by in CLOSED_FORM else precision
    with autocasting(task.model, precision), autocasting(task.dense, precision):
        return work(task)


def broadcast_recovered(ranks: ProcessRank, model: nn.Module) -> None:
    """Set a network to that of rank 0, in place; biases that its recovery has added are added on the other ranks."""
    if not ranks.several:
        return
    known = dict(model.named_parameters())
    shapes = {name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in known.items()}
    for name, (dtype, shape) in broadcast_record(ranks, shapes).items():
        if name not in known:
            set_bias(model, name, torch.zeros(shape, dtype=getattr(torch, dtype)))
    broadcast_model(ranks, model)


def log_differences(record: Record, perplexities: Mapping[str, Perplexity], number: int = 1) -> None:
    """Log the paired difference in log-perplexity of the recovered model to the pruned and dense ones in the run."""
    columns = {"round": number} if number > 1 else {}
    rows = {(row["model"], row["source"]): row for row in record.metrics() if row["what"] == "perplexity"}
    for name, after in perplexities.items():
        for model in ("pruned", "dense"):  # a page takes the last: what is left of the damage
            row = rows.get((model, name), {})
            nll = row.get("nll_per_window", [])
            if row.get("tokens") == sum(after.tokens) and len(nll) == len(after.nll) and None not in nll:
                pair = paired_difference(Perplexity(name, tuple(nll), after.tokens, after.bytes, after.origin), after)
                record.log(
                    "paired", source=name, delta_nll=pair.mean, se=pair.error, of=[model, "recovered"], **columns
                )


def check_recovery(by: str, sources: Sequence[str]) -> None:
    """Raise ValueError, before a run starts, if the wanted recovery is unknown, lacks a package or lacks data."""
    if by:
        find_method(MethodKind.RECOVERY, by).made(by, {})
        if not sources:
            raise ValueError(f"--recover {by} learns from text or images; give at least one source, like --source news")


def check_reconstruction(settings: Settings, *, several: bool = False) -> None:
    """Raise ValueError, before a run starts, if the reconstruction that is asked for cannot be done.

    ``several``: whether several processes share the run.
    """
    if not settings.reconstruct:
        return
    given = complete_reconstruction(settings.reconstruct_settings, settings.sources)
    find_method(MethodKind.RECOVERY, RECONSTRUCTION).made(RECONSTRUCTION, given)
    if several:
        raise InputError("--reconstruct runs in one process; leave out --reconstruct, or start without torchrun")
    if settings.recover == "bias":
        raise InputError("--reconstruct fits the biases that --recover bias would change again; leave out one of them")


def check_amount(
    settings: Settings, data: SourceHalves, read: Callable[[int, Tensor | None], Sequence[Source]], *, text: bool
) -> None:
    """Raise ValueError, before a run folder is made, if there is too little data to reconstruct on.

    Args:
        settings: The settings of the run.
        data: The data of the run.
        read: Returns calibration data of another amount.
        text: Whether the model takes text.

    Raises:
        ValueError: If there are no data, or a batch must be held out of a source that has no other.
    """
    if not settings.reconstruct:
        return
    if not data.calibration:
        raise InputError("reconstruct fits on data, and there are none; give --source news, or data= in Python")
    left_out = complete_reconstruction(settings.reconstruct_settings, ())["choose_on"] == "left_out_source"
    if left_out and len(data.calibration) > 1:
        return  # the ridge is not chosen on a held-out part of each source
    for source in choose_sources(settings, data, read, text=text):
        if len(source) < 2:
            raise InputError(
                f"source {source.name!r} has {len(source)} batches, and reconstruct holds one out; give more data (a "
                "larger --reconstruct-tokens), or a second source"
            )


def choose_sources(
    settings: Settings, data: SourceHalves, read: Callable[[int, Tensor | None], Sequence[Source]], *, text: bool
) -> Sequence[Source]:
    """Return the data that a run reconstructs on; arguments are as for :func:`check_amount`."""
    tokens = count_tokens(settings, text)
    return data.calibration if tokens == count_calibration(settings) else read(tokens, data.generated)


def count_tokens(settings: Settings, text: bool) -> int:
    """Return how many tokens (with ``text``) or images a run reconstructs on, over all sources together.

    >>> count_tokens(Settings("m", sources=("news", "code")), True)
    8192
    """
    calibration = count_calibration(settings)
    return settings.reconstruct_tokens or (max(LEAST_TOKENS, calibration) if text else calibration)


def count_calibration(settings: Settings) -> int:
    """Return how many tokens or images a run calibrates on, over all sources together.

    >>> count_calibration(Settings("m", sources=("news", "generated"), tokens=4096, generated_tokens=12288))
    16384
    """
    generated = settings.generated_tokens or settings.tokens
    return sum(generated if name == GENERATED else settings.tokens for name in settings.sources)


def count_generated(settings: Settings) -> int:
    """Return how many windows a pruning run generates at most, of the parts that use different amounts."""
    amounts = [settings.generated_tokens or settings.tokens]
    if settings.reconstruct and count_tokens(settings, text=True) != count_calibration(settings):
        amounts.append(source_specs(settings, count_tokens(settings, text=True)).tokens)
    if settings.recover:
        amounts.append(source_specs(settings, settings.recover_tokens).tokens)
    return count_windows(max(amounts), settings.seq_len)


def keep_dense(model: nn.Module) -> nn.Module:
    """Return a copy of a network that stays as it is when the network is cut; weights are shared, vectors are copied.

    A cut makes new weights and leaves the old ones as they are; a reconstruction changes weights that the cut made, and
    biases.
    """
    from regrow.tracing.meta_copy import copy_model

    return copy_model(model, lambda tensor: tensor if tensor.dim() > 1 else tensor.detach().clone())


@dataclass(frozen=True)
class LastCut:
    """The cut after which a network has kept its shape.

    Args:
        folder: The pruning run that made it, or a recovery of that run.
        settings: The settings of the pruning run.
        plan: The plan of the cut.
        before: The folder with a copy of the model before the cut; ``None`` if there is none.
    """

    folder: RunFolder
    settings: Settings
    plan: Plan
    before: Path | None


def find_cut(source: RunFolder, code: str = "") -> LastCut:
    """Return the cut that a recovery of a finished run makes up for.

    Args:
        source: The run.
        code: The function ``pkg.mod:fn`` that builds the network, if that is the user's own code.

    Raises:
        StoreError: If the network was not cut by ``regrow prune``, or has changed its shape since.
        ModelError: If ``code`` is missing.
    """
    folder = source
    while (verb := folder.run()["verb"]) not in ("prune", "recover"):
        if changed := describe_plans(folder.own_ledger.plans()):
            raise StoreError(
                f"{source.path}: `regrow {verb}` changed the shape last ({changed}); recovery makes up for a cut by "
                "`regrow prune`, so recover before that, or prune first"
            )
        if not (folder.path / BEFORE / RUN).is_file():
            raise StoreError(
                f"{source.path}: `regrow prune` has cut nothing of this network"
                f"{' that is recorded here' if folder.run().get('stages') else ''}; recovery makes up for a cut, so "
                "give the folder of a pruning run"
            )
        folder = RunFolder(folder.path / BEFORE)
    data = folder.run()
    check_repeatable(folder.path, data)
    values = data["settings"] if verb == "prune" else convert_settings(data["settings"], RecoverSettings).pruning
    try:
        settings = read_pruning_settings(values, code)
    except ModelError as error:
        raise ModelError(f"{source.path}: {error}") from None
    plans = folder.ledger.plans()
    if not plans or plans[-1].back or any(change.new_units for change in plans[-1].changes.values()):
        raise StoreError(f"{folder.path}: recovery needs a run whose last plan only cuts; restore ledger.json")
    before, at = folder.path / BEFORE, folder
    while at.run()["verb"] != "prune" and (before / RUN).is_file():
        at, before = RunFolder(before), before / BEFORE
    return LastCut(folder, settings, plans[-1], before if (before / store.SHAPES).is_file() else None)
