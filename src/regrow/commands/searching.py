"""The parts of a search that the command and the Python interface share: the method, and its training."""

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from regrow.allocation.timed import Prices, spread_times
from regrow.amounts import Measure
from regrow.axes import AxisGraph
from regrow.candidates import candidates_in
from regrow.commands.targets import find_granularities, parse_target
from regrow.evaluation import Latency
from regrow.methods import MethodEntry, MethodKind, find_method
from regrow.methods.search.assembly import Search
from regrow.methods.search.state import SearchState
from regrow.nets.bench201 import Bench201
from regrow.nets.cells import Cells
from regrow.nets.mobile import Mobile
from regrow.sources import Batch
from regrow.training import tune
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import Fitted
from regrow.training.learner import Boundary, Context, Event
from regrow.training.state import TrainState

MOST_BATCHES = 100
"""How many batches of training examples the statistics of BatchNorms are measured on."""


def select_known(entry: MethodEntry, given: Mapping[str, object]) -> dict[str, object]:
    """Return those of some settings that a method has.

    Args:
        entry: The method.
        given: The settings.
    """
    return {name: given[name] for name in (one.name for one in fields(entry.settings)) if name in given}


def build_method(
    method: str,
    settings: Mapping[str, object],
    model: nn.Module,
    axes: AxisGraph,
    target: str,
    *,
    seed: int = 0,
    epochs: int = 0,
    table: Latency | None = None,
) -> Search:
    """Return a search method with the target, granularities and stages that follow from the network.

    Args:
        method: The name of the method.
        settings: Its settings that differ from the defaults.
        model: The whole space as a network.
        axes: The axes of the space.
        target: The target as text (:func:`regrow.commands.targets.parse_target`).
        seed: Seed of everything random.
        epochs: Epochs of the search.
        table: The measured latencies, for a target in ms.

    Raises:
        ValueError: If there is no such method, a setting of it is wrong, or the target cannot be met.
    """
    entry = find_method(MethodKind.SEARCH, method)
    measure, most = parse_target(target, axes, table)
    given: dict[str, object] = {
        "target": most,
        "measure": str(measure),
        "levels": find_granularities(measure),
        "seed": seed,
        "stages": tuple(sorted(map(int, model.heads))) if isinstance(model, Cells | Mobile) else (),
    }
    if isinstance(model, Bench201):
        given["levels"] = ("operations",)
    elif measure == Measure.TIME:
        # A narrow layer may take longer than a wide one.
        given["levels"] = ("operations",) if candidates_in(model) else ("filters",)
    prices: Prices | None = None
    if table:
        tables = {"ops": table.ops, "beside": table.sums, "layers": table.layers}
        prices = spread_times(axes, candidates_in(model), **tables, rest=table.rest)
    own = select_known(entry, given) | dict(settings)
    search: Search = entry.made(method, own, **({"prices": prices} if prices else {}))
    if epochs < 1 and search.needs_epochs:
        raise ValueError(f"{method} learns in epochs: take --epochs 1 or more")
    if prices and most <= prices.rest:
        raise ValueError(f"{prices.rest:.3g} ms are left whatever goes: a target of {most:g} ms is below that")
    space = search.rules.space
    if isinstance(model, Bench201) and "filters" in space.granularities:
        raise ValueError("networks of NAS-Bench-201 have the widths they have: search operations, or weights too")
    return search


def train_space(
    search: Search, context: Context, schedule: TaskSchedule | None, *, state: TrainState[SearchState], **more: Any
) -> Fitted[SearchState]:
    """Train the search space, and let plans change it; without a schedule only the state is started.

    Args:
        search: The method.
        context: The network, its axes and data as the search begins or goes on.
        schedule: How it is trained; ``None``: not at all.
        state: The state of the training.
        **more: Further arguments of :func:`regrow.training.continual.learn`.
    """
    model, axes, task = context.model, context.axes, context.task
    if schedule:
        return learn(model, axes, [task], search.learner, schedule, state=state, undo=context.undo, **more)
    own = search.learner.boundary(state.learner, context, Boundary(Event.TASK_START))
    return Fitted(model, axes, replace(state, learner=own))


def measure_statistics(model: nn.Module, context: Context, batch_size: int) -> None:
    """Measure the running statistics of a found network's BatchNorms again, on training examples in random order.

    Args:
        model: The network; changed in place.
        context: The context of the search, with its data and its seed.
        batch_size: Examples per batch.
    """
    if not tune.find_running(model):
        return
    examples = context.task.train.batches(batch_size, seed=context.seed)
    tune.recalibrate(model, [(_as_batch(part.inputs) for part in islice(examples, MOST_BATCHES))])


def _as_batch(inputs: Any) -> Batch:
    if isinstance(inputs, Mapping):
        return Batch((), inputs)
    return Batch((inputs,) if isinstance(inputs, Tensor) else tuple(inputs))
