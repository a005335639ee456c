"""The record of a learning run: plans, growth events, finished tasks and the matrix, each written once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from regrow.core.tasks import Task
from regrow.evaluation.continual import Matrix
from regrow.jobs.recording import Record
from regrow.store.run_folder import RunFolder
from regrow.training.state import TrainState
from regrow.training.step import is_settled


@dataclass
class LearningRecord:
    """Writes what a training has reached into its run, if that is in a folder.

    Args:
        run: The run.
        tasks: The tasks.
        plans: How many plans are in the ledger.
        events: How many growth events were written.
        over: How many finished tasks were written.
    """

    run: Record
    tasks: Sequence[Task]
    plans: int = 0
    events: int = 0
    over: int = 0

    def resume(self, start: TrainState[Any]) -> None:
        """Take back plans that the training does not have yet, and write what is missing.

        Args:
            start: The state of the training.
        """
        if isinstance(self.run, RunFolder):
            self.run.own_ledger.truncate(len(start.plans))
            self.plans = len(self.run.own_ledger)
            self.write(start)  # version 0.1 stores before it logs

    def write(self, now: TrainState[Any]) -> None:
        """Write what is new since the last call.

        Args:
            now: The state of the training.
        """
        if not isinstance(self.run, RunFolder):
            return
        for plan in now.plans[self.plans :]:
            self.run.own_ledger.append(plan)
        for i in range(self.events, settled := _count_settled(now)):
            self.run.log("growth", number=i, **now.events[i])
        for i in range(self.over, now.number):
            scores = list(now.rows[i])
            # Scores that are no shares, of values or of a loss of one's own, are beside the accuracy.
            own: dict[str, Any] = {} if _are_shares(scores) else {"scores": scores}
            accuracy = [None if own else one for one in scores]
            self.run.log("task", name=self.tasks[i].name, accuracy=accuracy, **now.sizes[i], **own)
        self.plans, self.events, self.over = len(now.plans), settled, now.number


def record_matrix(matrix: Matrix) -> dict[str, Any]:
    """Return the scores of all tasks as JSON data; if they are no shares, they are in ``scores``, and accuracy is none.

    Args:
        matrix: The scores.

    >>> record_matrix(Matrix(((-0.5,),), (-2.0,)))["matrix"]
    [[None]]
    """
    record: dict[str, Any] = dict(matrix.record())
    if all(map(_are_shares, (*matrix.rows, matrix.before))):
        return record
    nothing: dict[str, Any] = dict.fromkeys(record)
    nothing |= {"matrix": [[None] * len(row) for row in matrix.rows], "before": [None] * len(matrix.before)}
    return nothing | {"scores": record}


def _are_shares(scores: Sequence[float]) -> bool:
    return all(0 <= score <= 1 or score != score for score in scores)


def _count_settled(state: TrainState[Any]) -> int:
    """Return the number of growth events that need no more watching; the others are logged at the end of their task."""
    return len(list(takewhile(lambda event: is_settled(event) or event["task"] < state.number, state.events)))
