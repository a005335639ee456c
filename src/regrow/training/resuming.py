"""The checkpoint from which several ranks resume: that of rank 0, which alone reads the run folder."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from torch import nn

from regrow.core.axes import AxisGraph
from regrow.core.plan import Plan
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import broadcast_file, broadcast_record
from regrow.surgery import UndoStore
from regrow.training.checkpoint import History, read_checkpoint
from regrow.training.state import TrainState

S = TypeVar("S")


def broadcast_start(ranks: ProcessRank, history: History | None, checkpoint: Path) -> None:
    """Send the other ranks, which call :func:`receive_start`, what training resumes from.

    Args:
        ranks: The processes; this one is rank 0.
        history: The parts of the state that the run stores outside its checkpoint; ``None``: training starts anew.
        checkpoint: The checkpoint.
    """
    if not ranks.several:
        return
    record = history and {
        "plans": [plan.to_json() for plan in history.plans],
        "rows": history.rows,
        "sizes": history.sizes,
        "events": history.events,
    }
    broadcast_record(ranks, record)
    if history:
        broadcast_file(ranks, checkpoint, checkpoint.parent)


def receive_start(
    ranks: ProcessRank, model: nn.Module, axes: AxisGraph, learner: S, undo: UndoStore | None = None
) -> tuple[nn.Module, AxisGraph, TrainState[S]]:
    """Return network, axes and training state as rank 0 has them, which calls :func:`broadcast_start`.

    Args:
        ranks: The processes; this one is not rank 0.
        model: The network as it was first built; changed in place.
        axes: The axes of that network.
        learner: The learner's initial state.
        undo: An empty store, which is filled with what plans removed, for learners that restore units.
    """
    record = broadcast_record(ranks)
    if record is None:
        return model, axes, TrainState(learner)
    plans, rows = [Plan.from_json(one) for one in record["plans"]], [tuple(row) for row in record["rows"]]
    history = History(plans, rows, record["sizes"], record["events"])
    with TemporaryDirectory(prefix="regrow-") as folder:
        place = broadcast_file(ranks, Path("checkpoint.safetensors"), Path(folder))
        return read_checkpoint(place, model, axes, learner, history, undo)


def read_start(
    ranks: ProcessRank,
    history: History | None,
    checkpoint: Path,
    model: nn.Module,
    axes: AxisGraph,
    learner: S,
    undo: UndoStore | None = None,
) -> tuple[nn.Module, AxisGraph, TrainState[S]]:
    """Return network, axes and training state from which training resumes; all ranks call this, and rank 0 reads them.

    Args:
        ranks: The processes.
        history: As for :func:`broadcast_start`; only that of rank 0 counts.
        checkpoint: The checkpoint, on rank 0.
        model: As for :func:`receive_start`.
        axes: As for :func:`receive_start`.
        learner: As for :func:`receive_start`.
        undo: As for :func:`receive_start`.
    """
    if not ranks.leads:
        return receive_start(ranks, model, axes, learner, undo)
    broadcast_start(ranks, history, checkpoint)
    if history is None:
        return model, axes, TrainState(learner)
    return read_checkpoint(checkpoint, model, axes, learner, history, undo)
