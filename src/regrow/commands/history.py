"""The training history of a run, read from its ``metrics.jsonl`` and ``ledger.json``."""

from math import nan

from regrow.run_folder import RunFolder
from regrow.store.errors import StoreError
from regrow.training.checkpoint import History


def read_history(folder: RunFolder, events: str = "growth") -> History:
    """Read the plans, the accuracy matrix, the task rows and the growth events of a run, for its checkpoint.

    Args:
        folder: The run folder.
        events: The kind of rows about changes of shape: ``"growth"`` (learning) or ``"commit"`` (search).

    Raises:
        StoreError: If a file is damaged.
    """
    metrics = folder.metrics()
    tasks = [dict(row) for row in metrics if row["what"] == "task"]
    if wrong := [i for i, row in enumerate(tasks) if row["task"] != i]:
        raise StoreError(
            f"{folder.path / 'metrics.jsonl'}: row {wrong[0] + 1} of the kind 'task' is of task "
            f"{tasks[wrong[0]]['task']}, not {wrong[0]}; restore it"
        )
    rows = [tuple(nan if share is None else share for share in row.pop("accuracy", ())) for row in tasks]
    sizes = [{name: value for name, value in row.items() if name not in ("what", "name")} for row in tasks]
    changes = [{k: v for k, v in row.items() if k != "what"} for row in metrics if row["what"] == events]
    return History(folder.own_ledger.plans(), rows, sizes, changes)
