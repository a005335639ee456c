"""The runs that made a network: what a run records of the one before it, and the copy of the model to return to."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from regrow import store
from regrow.core.plan import Plan
from regrow.nets import Loaded
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.ledger import Ledger
from regrow.store.replacing import (
    check_recorded_files,
    clear_leftovers,
    copy_folder,
    count_bytes,
    record_files,
    replace_folder,
)
from regrow.store.run_folder import RunFolder
from regrow.store.run_record import BEFORE, RUN, read_run
from regrow.store.shapes import Shapes, TensorKind
from regrow.store.weights import OutsideTensors, check_file, require_file

# Kinds of networks that a search builds again from what is left of its space, so that its plans do not fit them.
_REBUILT = ("cells", "mobile")


@dataclass(frozen=True)
class Parent:
    """The saved model that a run starts from."""

    name: str  # the name of its folder
    weights_digest: str  # by `digest_weights`; empty: it is not saved in a run folder
    plans: tuple[Plan, ...]  # the plans that led to it
    stages: tuple[dict[str, Any], ...]  # the records of the runs that made it, by `describe_stage`


def record_parent(
    folder: RunFolder, model: str, loaded: Loaded, *, undo: bool = True, outside: OutsideTensors | None = None
) -> None:
    """Record the model that a run starts from, copy it if ``undo``, and begin the ledger with the plans that led to it.

    ``model``: its folder or name; ``outside``: what gives the tensors of a network without numbers. In a resumed run,
    raise StoreError if the model is another now; nothing else is done.
    """
    source, is_saved = Path(model), Path(model, store.SHAPES).is_file()
    parent = read_parent(source) if is_saved else Parent(source.name, "", (), ())
    files = {file.path.name: file.record for file in loaded.files}
    folder.inputs.extend(loaded.files)
    if (recorded := folder.read_record().get("parent")) is not None:
        old_files = recorded.get("files", {})
        changed = any(old_files.get(name, record) != record for name, record in files.items())
        if is_saved:
            changed = recorded["weights"] != parent.weights_digest
        if changed:
            raise StoreError(f"{model} was changed since this run was started; choose another folder, or delete it")
        return
    snapshot = _write_snapshot(source if is_saved else None, loaded, folder.path / BEFORE, outside) if undo else None
    if parent.plans:
        ledger = folder.path / "ledger.json"
        ledger.unlink(missing_ok=True)
        for plan in parent.plans:
            Ledger(ledger).append(plan)
    folder.update(
        parent={
            "name": parent.name,
            "weights": parent.weights_digest,
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "plans": len(parent.plans),
            **({} if is_saved else {"files": files}),
        },
        snapshot=snapshot,
        stages=list(parent.stages) or None,
    )


def read_parent(folder: Path) -> Parent:
    """Return what a run records of the saved model in ``folder`` that it starts from; StoreError if it is damaged."""
    shapes = store.read_shapes(folder)
    ledger = Ledger(folder / "ledger.json")
    run = read_run(folder) if (folder / RUN).is_file() else None
    rebuilt = run is not None and run["verb"] == "search" and shapes.origin.kind in _REBUILT
    stages = () if run is None else (*run.get("stages", ()), describe_stage(RunFolder(folder)))
    return Parent(folder.resolve().name, digest_weights(shapes), () if rebuilt else ledger.plans(), stages)


def describe_stage(folder: RunFolder) -> dict[str, Any]:
    """Return a summary of a run whose model is saved, as JSON data, for ``stages`` in ``run.json`` of later runs."""
    shapes = store.read_shapes(folder.path)
    run = folder.read_record()
    plans = folder.own_ledger.plans()
    return {
        "name": (folder.out or folder.path).resolve().name,
        "verb": run["verb"],
        "command": run["command"],
        "changed": describe_plans(plans) or "weights",
        "before": run["parent"]["parameters"] if "parent" in run else 0,
        "parameters": count_parameters(shapes),
        "plans": len(plans),
        "weights": digest_weights(shapes),
    }


def describe_plans(plans: Sequence[Plan]) -> str:
    """Return in words how many units and modules plans, all together, cut, added and restored; empty if none.

    >>> from regrow.core.plan import Change
    >>> describe_plans([Plan({"fc.weight:0": Change(8, (0, 1, 2), ())})])
    '5 units cut'
    """
    changes = [change for plan in plans for change in plan.changes.values()]
    counts = {
        "units cut": sum(change.size - len(change.keep) for change in changes),
        "units added": sum(change.grow for change in changes),
        "units restored": sum(len(change.restore) for change in changes),
        "modules removed": sum(len(plan.drop) for plan in plans),
        "modules restored": sum(len(plan.back) for plan in plans),
    }
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def digest_weights(shapes: Shapes) -> str:
    """Return the SHA-256, in hexadecimal, of the recorded names and digests of all tensors of a saved model."""
    lines = (f"{name} {stored.sha256}\n" for name, stored in sorted(shapes.tensors.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def count_parameters(shapes: Shapes) -> int:
    """Return the number of parameters of a saved model."""
    return sum(prod(stored.shape) for stored in shapes.tensors.values() if stored.kind is TensorKind.PARAMETER)


def _write_snapshot(
    source: Path | None, loaded: Loaded, target: Path, outside: OutsideTensors | None
) -> dict[str, Any]:
    """Copy a saved model to ``target``, replacing what is there; return ``{"bytes": …, "files": …}`` for ``run.json``.

    ``source``: the folder of the saved model; ``None``: ``loaded`` is written, with tensors from ``outside``, if any.
    """
    with explain_os_errors(target):
        if target.exists():
            shutil.rmtree(target)
        if source is None:
            store.write_model(loaded, target, outside=outside)
        else:
            target.mkdir()
            copy_folder(source, target)
        files = record_files(target)
    for name, expected in store.read_shapes(target).files.items():
        check_file(require_file(target, name), expected)
    return {"bytes": count_bytes(target), "files": files}


@dataclass(frozen=True)
class Stage:
    """A run among those that made a network."""

    record: dict[str, Any]  # by `describe_stage`
    snapshot: Path | None  # the folder with the model before it; `None` if there is none


def read_stages(run: Path) -> list[Stage]:
    """Return the runs that made the network of a finished run folder, from the first to this one."""
    folder = RunFolder.open(run)
    records = [*folder.read_record().get("stages", ()), describe_stage(folder)]
    stages, snapshot = [], folder.path
    for record in reversed(records):
        snapshot = snapshot / BEFORE
        stages.append(Stage(record, snapshot if (snapshot / store.SHAPES).is_file() else None))
    return stages[::-1]


def undo_run(run: Path, out: Path | None = None) -> Path:
    """Write the model that a run started from, bit for bit, to ``out``, or (``None``) replace the run's folder by it.

    Returns the folder. Raises StoreError if the run holds no such copy, the copy is damaged, or ``out`` is not empty.
    """
    folder = RunFolder.open(run)
    before, snapshot = run / BEFORE, folder.read_record().get("snapshot")
    if snapshot is None:
        reason = "it was started with --no-undo" if "parent" in folder.read_record() else "the network was new"
        raise StoreError(f"{run} holds no model from before the run ({reason}); give a run folder with {BEFORE}/")
    if before.is_symlink() or not before.is_dir():
        raise StoreError(f"{before} is no folder any more; put the one of the run there again")
    out = out or run
    clear_leftovers(out)
    if out != run and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} exists and is not empty; choose another folder, or delete it")
    with explain_os_errors(out), replace_folder(out) as new:
        copy_folder(before, new, link=out == run)
        check_recorded_files(new, snapshot["files"], before)
    return out
