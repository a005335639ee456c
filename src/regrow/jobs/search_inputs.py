"""What a search starts from: a network and its axes, data split by purpose, and the method."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from regrow.allocation.cost import Cost
from regrow.allocation.stages import MemoryStages
from regrow.allocation.timed import Prices, spread_times
from regrow.core.amounts import Measure, format_bytes, parse_bytes
from regrow.core.axes import AxisGraph
from regrow.core.candidates import candidate_paths
from regrow.core.names import names_function
from regrow.core.objectives import CLASSIFICATION, NEXT_TOKEN, Objective
from regrow.core.sources import Batch, device_of, move_inputs
from regrow.core.tasks import ExampleSet, ExamplesView, Task, first_examples, pack_batch
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import broadcast_record
from regrow.evaluation.timing import Latency, measure_latency
from regrow.jobs.starting import TaskSpecs, make_task_schedule, read_tasks, select_known
from regrow.methods import MethodKind, find_method
from regrow.methods.search import Search
from regrow.methods.search.space import GRANULARITIES
from regrow.nets import Loaded
from regrow.nets.cells import Cells
from regrow.nets.loaded import Origin
from regrow.nets.mobile import Mobile
from regrow.settings.search import Settings, parse_search_target
from regrow.tracing import trace
from regrow.training import tune
from regrow.training.continual import TaskSchedule
from regrow.training.learner import Context

MOST_BATCHES = 100
"""How many batches of training examples the statistics of BatchNorms are measured on."""
HELD_OUT = 0.2
"""The fraction of the training examples that is held out for validation."""
WINDOWS = 4
"""The most windows of text that are evaluated in one pass: each has as many outputs as there are tokens."""


@dataclass(frozen=True)
class Parts:
    """The data of a search, split by purpose."""

    search: Task
    # Both together, for retraining; the validation examples are also its test examples, which are only reported
    whole: Task
    test: ExampleSet | None  # test examples, evaluated once at the end; `None`: there are none
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective = CLASSIFICATION


@dataclass(frozen=True)
class SearchInputs:
    """What a run searches, and on which data."""

    model: nn.Module
    origin: Origin
    axes: AxisGraph
    parts: Parts
    schedule: TaskSchedule
    # The network as it was loaded, if it has weights that are searched; `None`: it is new
    start: Loaded | None = None
    stages: MemoryStages | None = None
    in_place: bool = False
    call: dict[str, object] | None = None


def make_schedule(settings: Settings, objective: Objective, epochs: int, decay: str = "constant") -> TaskSchedule:
    """Return how a network is trained by the settings of a search, for a number of epochs."""
    return replace(make_task_schedule(replace(settings, epochs=max(1, epochs)), objective), decay=decay)


def read_parts(settings: Settings, start: Loaded | None = None) -> Parts:
    """Return the data of a search, split into training, validation and test examples."""
    specs = TaskSpecs((settings.data,), settings.train, settings.test, seed=settings.seed)
    specs = replace(specs, normalised=names_function(settings.space)).fit(start, settings.seq_len)
    base, text = read_tasks(specs)[0], specs.tokenizer is not None
    n = len(base.train)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))
    many = max(1, round(HELD_OUT * n))
    if n - many < 2:
        raise ValueError(f"{n} examples leave {n - many} to learn from; give more data")
    held, learned = (base.train.subset(part) for part in order.split([many, n - many]))
    if text:
        held = ExamplesView(held, most=WINDOWS)
    flags = start.example.kwargs if start and text else {}
    return Parts(
        search=Task("search", learned, held, base.classes),
        whole=Task("retraining", base.train, held, base.classes),
        test=base.test,
        kwargs={name: value for name, value in flags.items() if isinstance(value, bool)},
        objective=NEXT_TOKEN if text else CLASSIFICATION,
    )


def trace_examples(model: nn.Module, task: Task, parts: Parts) -> AxisGraph:
    """Return the axes of a network, traced with two training examples of a task among the data."""
    return trace(model, move_inputs(first_examples(task.train, 2).inputs, device_of(model)), **parts.kwargs)


def parse_target(text: str, axes: AxisGraph, table: Latency | None = None) -> tuple[Measure, float]:
    """Return a target as a measure and a number."""
    target = parse_search_target(text)
    measure = target.measure
    if measure == Measure.TIME and table is None:
        raise ValueError("how long the space takes was not measured: measure_latency(…) does it")
    counted = Measure.PARAMETERS if measure == Measure.NONZERO else measure
    whole: float = table.total if table else Cost(axes, counted).total
    number = target.amount or target.share * whole
    if not 0 < number < whole:
        has = f"{whole:.4g}" if table else f"{whole:,.0f}"
        raise ValueError(f"the target {text} is not below what the whole space has, {has} {measure}")
    return measure, number


def make_search(
    settings: Settings, measure: Measure, known: Mapping[str, object], prices: Prices | None = None
) -> Search:
    """Return the search method of a run, with those settings that it has and that follow from its network.

    Zeroed weights count as removed under ``nonzero`` only, so the method does not search them for another measure.
    """
    levels = GRANULARITIES if measure == Measure.NONZERO else GRANULARITIES[:2]
    entry = find_method(MethodKind.SEARCH, settings.method)
    known = select_known(entry, {"measure": str(measure), "levels": levels, **known})
    search: Search = entry.create(
        settings.method,
        known | dict(settings.method_settings),
        **({} if prices is None else {"prices": prices}),
    )
    return search


def build_search(
    settings: Settings,
    model: nn.Module,
    axes: AxisGraph,
    plan: MemoryStages | None = None,
    table: Latency | None = None,
    *,
    augments: bool = True,
) -> Search:
    """Return the search method of a run, with the target, granularities and stages that follow from its network."""
    measure, most = parse_target(settings.target, axes, table)
    stages = tuple(sorted(map(int, model.heads))) if isinstance(model, Cells | Mobile) else ()
    known: dict[str, object] = {"target": most, "seed": settings.seed, "stages": stages}
    if not augments:
        known["augment"] = False
    candidates = candidate_paths(model)
    if measure == Measure.TIME:  # a narrow layer may take longer than a wide one
        known["levels"] = ("operations",) if candidates else ("filters",)
    prices = None
    if table:
        prices = spread_times(axes, candidates, ops=table.ops, beside=table.sums, layers=table.layers, rest=table.rest)
        if most <= prices.rest:
            raise ValueError(f"{prices.rest:.3g} ms are left whatever goes: a target of {most:g} ms is below that")
    search = make_search(settings, measure, known, prices)
    if settings.epochs < 1 and search.needs_epochs:
        raise ValueError(f"{settings.method} learns in epochs: take --epochs 1 or more")
    space = search.space
    if plan is not None and space.ends != plan.ends:
        ends = ", ".join(str(end + 1) for end in plan.ends)
        raise ValueError(
            f"within {format_bytes(parse_bytes(settings.memory))}, stages end at parts {ends}, and {settings.method} "
            "does not search in these: give more --memory or none, or a method and settings that do"
        )
    return search


def measure_statistics(model: nn.Module, context: Context, batch_size: int) -> None:
    """Measure the running statistics of a found network's BatchNorms again, on training examples in random order."""
    if tune.find_batch_norms(model):
        examples = context.task.train.batches(batch_size, seed=context.seed)
        tune.recalibrate(model, [(pack_batch(part.inputs) for part in islice(examples, MOST_BATCHES))])


def measure_times(
    settings: Settings, inputs: SearchInputs, known: dict[str, Any] | None, ranks: ProcessRank
) -> tuple[Batch | None, Latency | None]:
    """Return a batch and the times of a pass, known or measured on rank 0, if the target is a time."""
    if parse_search_target(settings.target).measure != Measure.TIME:
        return None, None
    first = first_examples(inputs.parts.search.train, settings.batch_size)
    batch = pack_batch(first.inputs).to(device_of(inputs.model))
    table = None if known or not ranks.leads else asdict(measure_latency(inputs.model, batch))
    return batch, Latency(**broadcast_record(ranks, known or table))
