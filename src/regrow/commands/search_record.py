"""The record of a search in the folder of its run: plans, changes of shape and rows, each written once."""

from dataclasses import dataclass, field
from typing import Any

from regrow.run_folder import RunFolder
from regrow.training.state import TrainState


@dataclass
class SearchRecord:
    """Writes what a search has reached into the folder of its run.

    Args:
        folder: The run.
        plans: How many plans are in the ledger.
        events: How many changes of shape were written.
        rows: Rows that are to be written: their kind and their values.
    """

    folder: RunFolder
    plans: int = 0
    events: int = 0
    rows: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def log(self, kind: str, /, **row: Any) -> None:
        """Take a row, which :meth:`write` writes with the state that it belongs to.

        Args:
            kind: The kind of row.
            **row: The values.
        """
        if kind != "status":
            self.rows.append((kind, row))

    def write(self, now: TrainState[Any]) -> None:
        """Write what is new since the last call.

        Args:
            now: The state of the search.
        """
        for plan in now.plans[self.plans :]:
            self.folder.own_ledger.append(plan)
        for i in range(self.events, len(now.events)):
            self.folder.log("commit", number=i, **now.events[i])
        self.plans, self.events = len(now.plans), len(now.events)
        for kind, row in self.rows:
            self.folder.log(kind, **row)
        self.rows.clear()
