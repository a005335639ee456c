"""The Pareto front of a search: the networks at the epochs of its last stage, on the way to the target, as files."""

from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from torch import nn

from regrow import store
from regrow.commands import spaces
from regrow.commands.searching import measure_statistics
from regrow.evaluation.continual import mean_score
from regrow.methods.search.assembly import Search
from regrow.methods.search.importance import copy_state
from regrow.methods.search.state import SearchState
from regrow.nets.loaded import Loaded, Origin
from regrow.run_folder import RunFolder
from regrow.surgery import UndoStore
from regrow.tracing.meta_copy import clone_model
from regrow.training.fit import Fitted, finish
from regrow.training.learner import Context
from regrow.training.state import TrainState

FOLDER = "front"


def write_passed(
    folder: RunFolder,
    search: Search,
    state: TrainState[SearchState],
    context: Context,
    batch_size: int,
    origin: Origin,
    start: Loaded | None = None,
) -> None:
    """Write the network that the masks keep at the end of an epoch of the last stage to ``front/EPOCH``.

    Args:
        folder: The run folder; a row with the network's size and validation accuracy is logged.
        search: The method; its state is not changed.
        state: The state of the search at the end of the epoch.
        context: The network at the end of the epoch.
        batch_size: Examples per batch, with which the statistics of BatchNorms are measured.
        origin: The record of how the space was built.
        start: The network that the search started from, if it is not a new one.
    """
    space, own = search.rules.space, state.learner
    if not search.shrinks or space.part(own.stage) != space.part(-1) or not search.rules.trains(own, context):
        return
    sizes: list[float] = []

    def log(kind: str, /, **row: Any) -> None:
        if kind == "levels":
            sizes.append(row["size"])

    model, epoch = clone_model(context.model), context.epoch + 1
    there = replace(context, model=model, epoch=epoch, undo=UndoStore(), log=log)
    learner = replace(search.learner, plan=partial(_finalize, search))
    fitted, _ = finish(learner, Fitted(model, context.axes, replace(state, learner=copy_state(own))), there)
    net, described = spaces.extract_network(fitted.model, origin)
    measure_statistics(net, context, batch_size)
    write_network(net, folder.path / FOLDER / f"{epoch:04d}", described, start)
    accuracy = mean_score(net, context.task.test, context.objective)
    folder.log("front", epoch=epoch, size=sizes[-1], accuracy=accuracy, **count_parameters(net))


def _finalize(search: Search, state: SearchState, context: Context) -> Any:
    return search.finalize(state, context, inf)


def write_network(model: nn.Module, folder: Path, origin: Origin, start: Loaded | None) -> None:
    """Write a network that a search left into a folder, with the tokenizer of the network that it started from.

    Args:
        model: The network.
        folder: The folder.
        origin: The record of how to build the network.
        start: The network that the search started from, if it is not a new one.
    """
    given = replace(start, model=model, origin=origin) if start else model
    store.write_model(given, folder, origin=origin)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of a network, and how many of them are not 0.

    Args:
        model: The network.
    """
    parameters = [*model.parameters()]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters),
    }
