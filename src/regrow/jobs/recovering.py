"""Recovery and reconstruction of a cut network within a run folder, with a checkpoint from which they resume."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from regrow import store
from regrow.core.plan import Plan
from regrow.core.sources import Source
from regrow.distributed.parallel import broadcast_file
from regrow.evaluation import Perplexity
from regrow.jobs.measuring import log_pairs
from regrow.jobs.parents import BEFORE, describe_plans
from regrow.jobs.pruning import read_pruning_settings
from regrow.jobs.recording import UNRECORDED, Record
from regrow.methods import MethodKind, find_method, recovery
from regrow.methods.recovery import REFIT_FIELDS, Recovery, RecoveryTask
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
from regrow.tracing.meta_copy import copy_model
from regrow.training import state as training


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

    ``origin`` says how the dense network was built, ``number`` counts the recoveries of the network from 1. On all
    ranks ``task.model`` is afterwards that of rank 0.
    """
    settings = dict(settings or {})
    identity = (by, settings, task.seed, str(origin))
    row = {"by": by, **_resume(record, task, "recovery", by, settings, identity, precision)}
    row |= {"round": number} if number > 1 else {}
    record.log("recovery", row)
    return row


def reconstruct(task: RecoveryTask, changed: Mapping[str, object], record: Record = UNRECORDED) -> dict[str, Any]:
    """Fit every layer that reads cut units by least squares, or resume that; log and return a ``reconstruction`` row.

    ``changed`` are settings of ``recover --by refit`` that differ from the defaults of a reconstruction.
    """
    settings = complete_reconstruction(changed, [source.name for source in task.sources])
    row = _resume(record, task, "reconstruction", RECONSTRUCTION, settings, ("reconstruct", settings), "float32")
    record.log("reconstruction", row)
    if "note" in row:
        record.update(notes=[*record.run().get("notes", ()), f"reconstruction: {row['note']}"])
    return row


def _resume(
    record: Record,
    task: RecoveryTask,
    name: str,
    by: str,
    settings: Mapping[str, object],
    identity: tuple[object, ...],
    precision: str,
) -> dict[str, Any]:
    """Carry out a recovery, or what is left of an interrupted one; return its summary with ``tokens``, ``seconds``."""
    work: Recovery = find_method(MethodKind.RECOVERY, by).made(by, settings)
    key, spent, start, streamed = "", 0.0, time.perf_counter(), task.streamed
    if record.kept:
        texts = [fingerprint(source) for source in task.sources]
        if streamed is None:
            sums = [parameter_sums(network) for network in (task.model, task.dense)]
        else:
            sums = [network.weights.sums() for network in (streamed.model, streamed.dense)]
        key = fingerprint(Source("", ()), (*identity, texts, sums))
        path = record.path / "statistics" / f"{name}.safetensors"
        spent = float(open_checkpoint(path, key, training.FORMAT, recovery.FORMAT).get("seconds", 0))
        task = replace(task, checkpoint=path)
        if streamed is not None:
            streamed.changed.open(key, REFIT_FIELDS if by == "refit" else ())
    if task.parallel.ranks.several:
        file = broadcast_file(task.parallel.ranks, task.checkpoint or record.path / "recovery.safetensors", record.path)
        task = replace(task, checkpoint=file)

    def header() -> dict[str, object]:
        return {"key": key, "seconds": spent + time.perf_counter() - start}

    precision = "float32" if by in CLOSED_FORM else precision
    with autocasting(task.model, precision), autocasting(task.dense, precision):
        summary = work(replace(task, header=header))
    seconds = round(spent + time.perf_counter() - start, 1)
    return {"tokens": sum(source.tokens for source in task.sources), "seconds": seconds, **summary}


def log_differences(record: Record, perplexities: Mapping[str, Perplexity], number: int = 1) -> None:
    """Log the paired difference in log-perplexity of the recovered model to the pruned and dense ones in the run."""
    columns: dict[str, object] = {"round": number} if number > 1 else {}
    rows = {(row["model"], row["source"]): row for row in record.metrics() if row["what"] == "perplexity"}
    for name, after in perplexities.items():
        for model in ("pruned", "dense"):  # a page takes the last: what is left of the damage
            row = rows.get((model, name), {})
            nll = row.get("nll_per_window", [])
            if row.get("tokens") == sum(after.tokens) and len(nll) == len(after.nll) and None not in nll:
                before = Perplexity(name, tuple(nll), after.tokens, after.bytes, after.origin)
                log_pairs(record, {name: before}, {name: after}, {"of": [model, "recovered"], **columns})


def keep_dense(model: nn.Module) -> nn.Module:
    """Return a copy of a network that stays as it is when the network is cut; weights are shared, vectors are copied.

    A cut makes new weights and leaves the old ones as they are; a reconstruction changes weights that the cut made, and
    biases.
    """
    return copy_model(model, lambda tensor: tensor if tensor.dim() > 1 else tensor.detach().clone())


@dataclass(frozen=True)
class LastCut:
    """The cut after which a network has kept its shape."""

    folder: RunFolder
    settings: Settings
    plan: Plan
    before: Path | None  # the folder with a copy of the model before the cut; `None` if there is none


def find_cut(source: RunFolder, code: str = "") -> LastCut:
    """Return the cut that a recovery of a finished run makes up for."""
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
    if not plans or plans[-1].back or any(change.grow for change in plans[-1].changes.values()):
        raise StoreError(f"{folder.path}: recovery needs a run whose last plan only cuts; restore ledger.json")
    before, at = folder.path / BEFORE, folder
    while at.run()["verb"] != "prune" and (before / RUN).is_file():
        at, before = RunFolder(before), before / BEFORE
    return LastCut(folder, settings, plans[-1], before if (before / store.SHAPES).is_file() else None)
