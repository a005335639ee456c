"""What a search starts from: a network and its axes, data split by purpose, and the method."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from regrow.allocation.cost import Cost
from regrow.allocation.latency import Latency
from regrow.allocation.levels import GRANULARITIES
from regrow.allocation.stages import MemoryStages
from regrow.core.amounts import Measure, format_bytes, parse_bytes
from regrow.core.axes import AxisGraph
from regrow.core.candidates import candidate_paths
from regrow.core.names import names_function
from regrow.core.objectives import CLASSIFICATION, NEXT_TOKEN, Objective
from regrow.core.sources import Batch, device_of, move_inputs
from regrow.core.tasks import ExampleSet, ExamplesView, Task, first_examples, pack_batch
from regrow.distributed.parallel import broadcast_record
from regrow.evaluation.timing import measure_latency
from regrow.jobs.recording import ActiveRun
from regrow.jobs.starting import TaskSpecs, make_task_schedule, read_tasks, select_method_settings
from regrow.methods import MethodKind, find_method
from regrow.methods.search import Search
from regrow.nets import Loaded
from regrow.nets.cells import Cells
from regrow.nets.loaded import Origin
from regrow.nets.mobile import Mobile
from regrow.settings.search import Settings, parse_search_target
from regrow.tracing import trace, with_branches
from regrow.training import tune
from regrow.training.continual import TaskSchedule
from regrow.training.learner import Context

# How many batches of training examples the statistics of BatchNorms are measured on.
MOST_BATCHES = 100
# The fraction of the training examples that is held out for validation.
HELD_OUT = 0.2
# The most windows of text that are evaluated in one pass: each has as many outputs as there are tokens.
WINDOWS = 4


@dataclass(frozen=True)
class SearchData:
    """The data of a search, split by purpose."""

    search: Task  # training examples, and validation examples as its test examples
    # All of these to train on, for retraining; the validation examples are its test examples, too, which are reported
    whole: Task
    test: ExampleSet | None  # test examples, evaluated once at the end; `None`: there are none
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # flags of the network's forward, such as `use_cache`
    objective: Objective = CLASSIFICATION


@dataclass(frozen=True)
class SearchInputs:
    """What a run searches, and on which data."""

    model: nn.Module  # the space, or the network whose units are searched
    origin: Origin  # how to build it again
    axes: AxisGraph
    data: SearchData
    schedule: TaskSchedule
    # The network as it was loaded, if it has weights that are searched; `None`: it is new
    start: Loaded | None = None
    stages: MemoryStages | None = None  # stages that keep within the memory budget; `None`: there is none
    in_place: bool = False  # whether the network is the user's own, which is searched as it is
    python_call: dict[str, object] | None = None  # what the result depends on besides settings, in a call from Python


def make_schedule(settings: Settings, objective: Objective, epochs: int, decay: str = "constant") -> TaskSchedule:
    """Return how to train for ``epochs`` (at least 1); ``decay``: of the learning rate, ``constant`` or ``cosine``."""
    return replace(make_task_schedule(replace(settings, epochs=max(1, epochs)), objective), decay=decay)


def read_search_data(settings: Settings, start: Loaded | None = None) -> SearchData:
    """Return the data of a search, a fifth of the training examples held out at random for validation.

    ``start``: the network with weights, in whose input form data are read; ``None``: it is new. ValueError for too few.
    """
    specs = TaskSpecs((settings.data,), settings.train, settings.test, seed=settings.seed)
    specs = replace(specs, normalised=names_function(settings.space)).adapt_to(start, settings.seq_len)
    (base,) = read_tasks(specs)
    is_text = specs.tokenizer is not None
    n = len(base.train)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))
    held_out = max(1, round(HELD_OUT * n))
    if n - held_out < 2:
        raise ValueError(f"{n} examples leave {n - held_out} to learn from; give more data")
    validation, training = (base.train.subset(part) for part in order.split([held_out, n - held_out]))
    if is_text:
        validation = ExamplesView(validation, most=WINDOWS)
    flags = start.example.kwargs if start and is_text else {}
    return SearchData(
        search=Task("search", training, validation, base.classes),
        whole=Task("retraining", base.train, validation, base.classes),
        test=base.test,
        kwargs={name: value for name, value in flags.items() if isinstance(value, bool)},
        objective=NEXT_TOKEN if is_text else CLASSIFICATION,
    )


def trace_examples(model: nn.Module, task: Task, data: SearchData) -> AxisGraph:
    """Return the axes of a network, traced with two training examples of a task, and with ``data.kwargs`` as flags."""
    return trace(model, move_inputs(first_examples(task.train, 2).inputs, device_of(model)), **data.kwargs)


def parse_target(text: str, axes: AxisGraph, table: Latency | None = None) -> tuple[Measure, float]:
    """Return the measure of a target, and the largest size in it; ValueError unless the space is larger.

    ``text``: such as ``params=50%``; ``axes``: of the space; ``table``: its times, for a target in ms.
    """
    target = parse_search_target(text)
    measure = target.measure
    if measure == Measure.TIME and table is None:
        raise ValueError("how long the space takes was not measured: measure_latency(…) does it")
    counted = Measure.PARAMETERS if measure == Measure.NONZERO else measure
    whole: float = table.total if table else Cost(axes, counted).total
    amount = target.amount or target.share * whole
    if not 0 < amount < whole:
        has = f"{whole:.4g}" if table else f"{whole:,.0f}"
        raise ValueError(f"the target {text} is not below what the whole space has, {has} {measure}")
    return measure, amount


def make_search(
    settings: Settings, measure: Measure, derived: Mapping[str, object], table: Latency | None = None
) -> Search:
    """Return the search method of the settings for a measure; raise ValueError for settings that it cannot have.

    ``derived``: settings that follow from the run, of which it takes those that it has; ``table``: the times of a pass,
    for a target in ms. Single weights are searched under ``nonzero`` only: elsewhere zeros cost, too.
    """
    for name in ("target", "measure", "stages"):
        if name in settings.method_settings:
            given = f"--set {name}={settings.method_settings[name]}"
            raise ValueError(f"{given}: it follows from --target and --stages; leave it out")
    levels = GRANULARITIES if measure == Measure.NONZERO else GRANULARITIES[:2]
    entry = find_method(MethodKind.SEARCH, settings.method)
    derived = select_method_settings(entry, {"measure": str(measure), "levels": levels, **derived})
    search: Search = entry.create(settings.method, derived | dict(settings.method_settings))
    search.space = replace(search.space, latency=table, round_to=settings.round_to)
    return search


def derive_settings(settings: Settings, model: nn.Module) -> dict[str, object]:
    """Return the settings of a method that follow from the run's and from the space."""
    stages = tuple(sorted(map(int, model.heads))) if isinstance(model, Cells | Mobile) else ()
    return {"seed": settings.seed, "stages": stages}


def check_epochs(settings: Settings, model: nn.Module) -> str:
    """Raise ValueError if the method cannot search the space ``model``, not yet traced, in so few epochs.

    Return a line for the user about few epochs; empty: none.
    """
    measure = parse_search_target(settings.target).measure
    search = make_search(settings, measure, derive_settings(settings, model))
    search.check_epochs(settings.epochs)
    return search.note_epochs(settings.epochs)


def build_search(
    settings: Settings,
    model: nn.Module,
    axes: AxisGraph,
    plan: MemoryStages | None = None,
    table: Latency | None = None,
    *,
    augments: bool = True,
) -> Search:
    """Return the search method of a run by :func:`make_search`, with target and stages that follow from its network.

    ``plan``: the stages that a memory budget needs, ``None`` without one; ``table``: the times of a pass, for a target
    in ms; ``augments``: whether the method may augment images. Raises ValueError for a target or stages that the method
    cannot have.
    """
    measure, limit = parse_target(settings.target, axes, table)
    derived = derive_settings(settings, model) | {"target": limit}
    if not augments:
        derived["augment"] = False
    search = make_search(settings, measure, derived, table)
    space = search.space
    if settings.stages > 1 and not space.ends[1:]:
        raise ValueError(f"--stages {settings.stages}: a search of {settings.space} by {settings.method} has one stage")
    if plan is not None and space.ends != plan.ends:
        ends = ", ".join(str(end + 1) for end in plan.ends)
        raise ValueError(
            f"within {format_bytes(parse_bytes(settings.memory))}, stages end at parts {ends}, and {settings.method} "
            "does not search in these: give more --memory or none, or a method and settings that do"
        )
    return search


def add_blocks(search: Search, model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the axes with the branches that ``search``, changed in place, takes as operations.

    They are those of :attr:`regrow.core.axes.operations.Branch.scales`; none where the network has candidates.
    """
    if "operations" not in search.space.cuts or candidate_paths(model):
        return axes
    axes = with_branches(model, axes)
    blocks = {path: branch for path, branch in axes.branches.items() if branch.scales}
    search.space = replace(search.space, blocks=blocks)
    return axes


def remeasure_batchnorms(model: nn.Module, context: Context, batch_size: int) -> None:
    """Measure BatchNorms' running statistics again, in place, on up to ``MOST_BATCHES`` shuffled training batches."""
    if tune.find_batch_norms(model):
        examples = context.task.train.batches(batch_size, seed=context.seed)
        tune.recalibrate(model, [(pack_batch(part.inputs) for part in islice(examples, MOST_BATCHES))])


def measure_times(
    settings: Settings, inputs: SearchInputs, recorded: dict[str, Any] | None, run: ActiveRun
) -> tuple[Batch | None, Latency | None]:
    """Return a batch and its pass's times, ``recorded`` or measured on rank 0; ``None``s unless the target is in ms."""
    if parse_search_target(settings.target).measure != Measure.TIME:
        return None, None
    first = first_examples(inputs.data.search.train, settings.batch_size)
    batch = pack_batch(first.inputs).to(device_of(inputs.model))
    if run.ranks.leads and not recorded:
        table = measure_latency(inputs.model, inputs.axes, batch, round_to=settings.round_to, progress=run.progress)
        recorded = asdict(table)
    return batch, Latency(**broadcast_record(run.ranks, recorded))
