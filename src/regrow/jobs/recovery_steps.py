"""Steps of recovery: find the cut of a run, recover or reconstruct its network, with a checkpoint to resume from."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regrow import store
from regrow.core.plan import Plan
from regrow.core.sources import Source
from regrow.distributed.parallel import broadcast_file
from regrow.jobs.parents import describe_plans
from regrow.jobs.pruning_inputs import read_pruning_settings
from regrow.jobs.recording import UNRECORDED, Record
from regrow.methods import MethodKind, find_method
from regrow.methods.recovery import Recovery, RecoveryTask
from regrow.nets import ModelError
from regrow.nets.devices import autocasting
from regrow.settings.prune import Settings, make_reconstruction_settings
from regrow.settings.recover import Settings as RecoverSettings
from regrow.store.errors import StoreError
from regrow.store.run_folder import RunFolder
from regrow.store.run_record import BEFORE, RUN, check_repeatable, convert_settings
from regrow.store.statistics import fingerprint, parameter_sums
from regrow.store.tensors import open_checkpoint
from regrow.training import state as training


def recover(
    record: Record,
    task: RecoveryTask,
    by: str,
    settings: Mapping[str, object],
    *,
    name: str = "recovery",
    origin: object = None,
    precision: str = "float32",
) -> dict[str, Any]:
    """Recover ``task.model`` in place by method ``by``, or resume that; return its summary, ``tokens`` and ``seconds``.

    ``name`` is that of the checkpoint, and ``origin`` says how the dense network was built: both with a folder only.
    ``precision``: of forward passes. On all ranks ``task.model`` is afterwards that of rank 0.
    """
    method: Recovery = find_method(MethodKind.RECOVERY, by).create(by, settings)
    key, spent_seconds = "", 0.0  # in earlier attempts
    start, streamed = time.perf_counter(), task.streamed
    if record.is_kept:
        sources = [fingerprint(source) for source in task.sources]
        if streamed is None:
            sums = [parameter_sums(network) for network in (task.model, task.dense)]
        else:
            sums = [network.weights.sums() for network in (streamed.model, streamed.dense)]
        key = fingerprint(Source("", ()), by, dict(settings), task.seed, str(origin), sources, sums)
        path = record.path / "statistics" / f"{name}.safetensors"
        spent_seconds = float(open_checkpoint(path, key, training.FORMAT).get("seconds", 0))
        task = replace(task, checkpoint=path)
    if task.parallel.ranks.several:
        file = broadcast_file(task.parallel.ranks, task.checkpoint or record.path / "recovery.safetensors", record.path)
        task = replace(task, checkpoint=file)

    def header() -> dict[str, object]:
        return {"key": key, "seconds": spent_seconds + time.perf_counter() - start}

    with autocasting(task.model, precision), autocasting(task.dense, precision):
        summary = method(replace(task, header=header, precision=precision))
    seconds = round(spent_seconds + time.perf_counter() - start, 1)
    return {"tokens": sum(source.tokens for source in task.sources), "seconds": seconds, **summary}


def reconstruct(
    task: RecoveryTask,
    changed: Mapping[str, object] | None = None,
    record: Record = UNRECORDED,
    precision: str = "float32",
) -> dict[str, Any]:
    """Fit every layer of ``task.model`` that reads cut units by least squares, in place, or resume that.

    Logs and returns the summary of :func:`recover`. ``changed``: settings of ``refit`` unlike ``prune --reconstruct``;
    ``precision``: of forward passes; sums are in float32 at least.
    """
    settings = {**make_reconstruction_settings([source.name for source in task.sources]), **(changed or {})}
    row = recover(record, task, "refit", settings, name="reconstruction", precision=precision)
    record.log("reconstruction", row)
    if "note" in row:
        record.update(notes=[*record.read_record().get("notes", ()), f"reconstruction: {row['note']}"])
    return row


@dataclass(frozen=True)
class LastCut:
    """The last cut of a network, after which nothing has changed its shape."""

    folder: RunFolder  # the pruning run, or the last recovery after it
    settings: Settings  # of the pruning run
    plan: Plan
    before: Path | None  # the folder with a copy of the model before the cut; `None` if there is none


def find_last_cut(source: RunFolder, code: str = "") -> LastCut:
    """Return the cut that a recovery of the finished run ``source`` makes up for; StoreError if there is none such.

    ``code``: as for :func:`read_pruning_settings`. Later runs that changed no shape are passed over.
    """
    folder = source
    while (verb := folder.read_record()["verb"]) not in ("prune", "recover"):
        changed = describe_plans(folder.own_ledger.plans())
        if changed or not (folder.path / BEFORE / RUN).is_file():
            raise StoreError(
                f"{source.path}: recovery makes up for a cut by `regrow prune`, and the last change of shape is by "
                f"`regrow {verb}` ({changed or 'nothing was cut'}); give the folder of a pruning run"
            )
        folder = RunFolder(folder.path / BEFORE)
    data = folder.read_record()
    check_repeatable(folder.path, data)
    values = data["settings"] if verb == "prune" else convert_settings(data["settings"], RecoverSettings).pruning
    try:
        settings = read_pruning_settings(values, code)
    except ModelError as error:
        raise ModelError(f"{source.path}: {error}") from None
    plans = folder.ledger.plans()
    if not plans or plans[-1].back or any(change.grow for change in plans[-1].changes.values()):
        raise StoreError(f"{folder.path}: recovery needs a run whose last plan only cuts; restore ledger.json")
    before, ancestor = folder.path / BEFORE, folder
    while ancestor.read_record()["verb"] != "prune" and (before / RUN).is_file():
        ancestor, before = RunFolder(before), before / BEFORE
    return LastCut(folder, settings, plans[-1], before if (before / store.SHAPES).is_file() else None)
