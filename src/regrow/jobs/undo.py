"""``regrow undo`` and ``regrow history``: return to the model before a run, and list the runs that made a network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow import store
from regrow.jobs.parents import BEFORE, describe_stage
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.replacing import check_files, clear_leftovers, copy_folder, replace_folder
from regrow.store.run_folder import RunFolder


@dataclass(frozen=True)
class Stage:
    """A run among those that made a network.

    Args:
        record: Its record: ``name``, ``verb``, ``command``, ``changed``, ``before`` and ``parameters``.
        snapshot: The folder with the model before it; ``None`` if there is none.
    """

    record: dict[str, Any]
    snapshot: Path | None


def read_stages(run: Path) -> list[Stage]:
    """Return the runs that made the network of a run folder, in order.

    Args:
        run: A finished run folder.

    Raises:
        StoreError: If it is no finished run, or a file is damaged.
    """
    folder = RunFolder.open(run)
    records = [*folder.run().get("stages", ()), describe_stage(folder)]
    stages, at = [], folder.path
    for record in reversed(records):
        at = at / BEFORE
        stages.append(Stage(record, at if (at / store.SHAPES).is_file() else None))
    return stages[::-1]


def undo(run: Path, out: Path | None = None) -> Path:
    """Replace a run by what it started from: the earlier run, or the model as it was loaded, bit for bit.

    Args:
        run: A finished run folder.
        out: The folder to write, new or empty; ``None``: the run folder itself, which is replaced in one step.

    Returns:
        The folder written.

    Raises:
        StoreError: If the run kept no copy of the model before it, a file of that is damaged, or ``out`` is not empty;
            nothing is changed.
    """
    folder = RunFolder.open(run)
    before, snapshot = run / BEFORE, folder.run().get("snapshot")
    if snapshot is None:
        why = "it was started with --no-undo" if "parent" in folder.run() else "the network was new"
        raise StoreError(f"{run} holds no model from before the run ({why}); give a run folder with {BEFORE}/")
    if before.is_symlink() or not before.is_dir():
        raise StoreError(f"{before} is no folder any more; put the one of the run there again")
    out = out or run
    clear_leftovers(out)
    if out != run and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} exists and is not empty; choose another folder, or delete it")
    with explain_os_errors(out), replace_folder(out) as new:
        copy_folder(before, new, link=out == run)
        check_files(new, snapshot["files"], before)
    return out
