"""Search spaces by name, the memory of their stages, and the plain network that remains after a search."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import nn

from regrow.allocation.stages import MemoryBudgetError, MemoryStages, Peak
from regrow.allocation.stages import plan_stages as cut
from regrow.core.amounts import format_bytes, parse_bytes
from regrow.core.candidates import Prefix, Staged, fold_scales
from regrow.core.names import names_function
from regrow.core.sources import Batch, device_of, logits_in
from regrow.core.tasks import Task, first_examples, input_shape, pack_batch
from regrow.evaluation.memory import MemoryCounterMode, make_training_step, predict_memory, start_peak_meter
from regrow.jobs.search_inputs import make_search
from regrow.jobs.starting import check_outputs
from regrow.methods.search import Search
from regrow.methods.search.space import SearchState, StageMemory
from regrow.nets import Loaded, cells, mobile
from regrow.nets.cells import Cells
from regrow.nets.load import Builder, call_builder, import_builder
from regrow.nets.loaded import Origin
from regrow.nets.mobile import Mobile
from regrow.nets.staged import check_space_fits
from regrow.nets.vision import small
from regrow.settings.search import Settings, parse_search_target
from regrow.tracing.branches import find_placeholders
from regrow.training.learner import Context

STAGED: Mapping[str, tuple[type[Cells | Mobile], Callable[..., Mapping[str, Any]], Callable[..., Prefix], str]] = {
    "cells": (Cells, cells.supernet_config, cells.build_prefix, "cells"),
    "mobile": (Mobile, mobile.supernet_config, mobile.build_prefix, "blocks"),
}
"""Space that can be searched in stages → its network, its description, a part of it, and what its parts are."""
MASKS, WEIGHT, GRANULARITY = 1.02, 60, {"operations": 8, "filters": 14, "weights": 22}
"""The memory of a step with masks, relative to one without: a factor, and additional bytes per weight; and further
bytes per weight for each granularity that is searched."""


def build_space(
    settings: Settings, task: Task, start: Loaded | None = None
) -> tuple[nn.Module, Origin, MemoryStages | None]:
    """Return a search space as a network, its origin, and its stages if a memory budget sets them.

    The network has random weights, or is the one that is searched instead of a new one (``start``).
    """
    space, stages, seed = settings.space, settings.stages, settings.seed
    fit = re.fullmatch(r"cells:(\d{1,3})-(\d{1,2})-(\d{1,2})|mobile:(\d{1,3})-(\d{1,2})", space)
    if (start or not fit) and (settings.memory or stages > 1):
        option = "memory" if settings.memory else f"stages {stages}"
        raise ValueError(f"{space} is searched in one stage: no --{option}")
    if start:
        if start.tokenizer is None:
            check_outputs(start, task, 1 + max(task.classes))
        return start.model, start.origin, None
    shape, classes = list(input_shape(task.train)), 1 + max(task.classes)
    if names_function(space):
        builder = import_builder(space)
        return _build_named(space, builder, task, seed), Origin("callable", space, {}, space, builder), None
    if not fit:
        return *small(space, shape, classes, seed), None
    kind = space.partition(":")[0]
    network, supernet, prefix, parts = STAGED[kind]
    named = zip(("width", parts, "nodes"), (int(size) for size in fit.groups() if size), strict=False)
    describe = partial(supernet, shape, classes, stride=settings.stride, **dict(named))
    whole, plan = describe(), None
    check_space_fits(network, whole, f"a search of {space}")
    count = len(whole[parts])
    if settings.memory:
        # Where stages end is not known yet: a classifier behind every part is no less than there will be.
        plan = _plan_stages(settings, task, partial(prefix, describe(heads=range(count))), count)
    config = describe(heads=plan.ends if plan else stage_ends(count, stages or min(3, count)))
    net = _initialise(network, config, seed)
    net.recomputed = plan is not None and plan.recomputed
    return net, Origin(kind, kind, config, space), plan


def _build_named(space: str, builder: Builder, task: Task, seed: int) -> nn.Module:
    """Build a network by the user's own code, with random weights, and check its outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _ = call_builder(builder, space)
    outputs = logits_in(model.eval()(first_examples(task.train, 2).inputs))
    classes = 1 + max(task.classes)
    if outputs.shape != (2, classes):
        raise ValueError(f"{space} answers {tuple(outputs.shape)} to two images of {classes} classes")
    return model


def _plan_stages(settings: Settings, task: Task, build: Callable[..., Prefix], parts: int) -> MemoryStages:
    """Return the fewest stages within a memory budget; if there are none, with recomputation in the backward pass."""
    search = make_search(settings, parse_search_target(settings.target).measure, {})
    first, budget = first_examples(task.train, settings.batch_size), parse_bytes(settings.memory)
    batch = pack_batch(first.inputs, first.labels)

    def build_prefix(recomputes: bool, first: int, last: int) -> Prefix:
        prefix = build(first, last, search.stage_share)
        if recomputes:
            cast(Staged, prefix.net).recomputed = True
        return prefix

    peaks = [predict_peaks(search.masked, partial(build_prefix, recomputes), batch) for recomputes in (False, True)]
    try:
        return cut(peaks[0], parts, budget)
    except MemoryBudgetError:
        return replace(cut(peaks[1], parts, budget), recomputed=True)


def _initialise(network: type[Cells | Mobile], config: Mapping[str, Any], seed: int) -> Cells | Mobile:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(config)


def stage_ends(parts: int, stages: int) -> tuple[int, ...]:
    """Return the last part of each stage, for stages of nearly equal numbers of parts (cells or blocks).

    >>> stage_ends(8, 3), stage_ends(6, 1)
    ((2, 4, 7), (5,))
    """
    if not 1 <= stages <= parts:
        raise ValueError(f"stages are from 1 to the number of cells or blocks, {parts}; got --stages {stages}")
    return tuple(round(parts * (i + 1) / stages) - 1 for i in range(stages))


def extract_network(model: nn.Module, origin: Origin, *, in_place: bool = False) -> tuple[nn.Module, Origin]:
    """Return what a search left of a space as a plain network with folded scales, and the record of how to build it."""
    gone = find_placeholders(model).keys()
    fold_scales(model)
    config: Mapping[str, object]
    match model:
        case _ if in_place:
            return model.eval(), origin
        case Cells():
            config = cells.describe_result(model, origin.config, gone)
        case Mobile():
            config = mobile.describe_result(model, origin.config, gone)
        case _:
            return model.eval(), origin
    return rebuild(config, model), replace(origin, config=config)


def rebuild(config: Mapping[str, Any], model: Cells | Mobile) -> Cells | Mobile:
    """Build the network that a description gives, with the parameters of the searched super-network (``model``)."""
    network = type(model)(config)
    network.recomputed = model.recomputed  # a budget that needs it holds while it is trained anew, too
    names = network.state_dict().keys()
    state = {name: value for name, value in model.state_dict().items() if name in names}
    for path, node in model.named_modules():
        if f"{path}.scale" in state:
            gone = find_placeholders(node)
            alive = [i for i, name in enumerate(node.get_submodule("ops")._modules) if f"ops.{name}" not in gone]
            state[f"{path}.scale"] = state[f"{path}.scale"][alive]
    network.load_state_dict(state)
    return network.eval()


def predict_peaks(masked: Collection[str], prefix: Callable[[int, int], Prefix], batch: Batch) -> Peak:
    """Return a function (first part that is complete, last part that runs) → the predicted peak of a stage in bytes.

    ``masked`` are the granularities whose masks need memory; ``prefix`` returns the part that runs in a stage.
    """
    step = _step()

    @cache
    def peak(first: int, last: int) -> int:
        plain = predict_memory(partial(prefix, first, last), batch, step).peak
        with torch.device("meta"):
            many = prefix(first, last).count_parameters()
        return _add_masks(masked, plain, many)

    return peak


def predict_stage(search: Search, state: SearchState, context: Context, batch: Batch) -> int:
    """Predict the peak memory of the current stage in bytes, without running the network."""
    net = Prefix(context.model, search.space.part(state.stage))
    removed = context.undo.contents().values() if context.undo else ()
    cut_bytes = sum(tensor.untyped_storage().nbytes() for tensor in removed)
    return _add_masks(search.masked, predict_memory(net, batch, _step()).peak, net.count_parameters()) + cut_bytes


def _step() -> Callable[[nn.Module, Batch], Any]:
    return make_training_step(partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def _add_masks(masked: Collection[str], plain: int, weights: int) -> int:
    return int(MASKS * plain) + (WEIGHT + sum(GRANULARITY[name] for name in masked)) * weights


@dataclass
class MemoryWatch:
    """Keeps each stage of a search within a memory budget, and measures steps of it with and without masks trained."""

    search: Search
    budget: int  # the budget in bytes; 0: none, and nothing is measured
    size: int
    rows: dict[str, StageMemory] = field(default_factory=dict)  # stage → its measured memory
    # Stage that started in this process → its predicted peak, in bytes
    predictions: dict[int, int] = field(default_factory=dict)

    def __call__(self, state: SearchState, context: Context, step: int) -> AbstractContextManager[None]:
        """Return a context manager around a training step; of each stage, steps with and without masks are measured."""
        if not self.budget:
            return nullcontext()
        stage = state.stage
        if stage and stage not in self.predictions:
            self.predictions[stage] = self._fit(state, context)
        if step > 1:
            return nullcontext()
        row, trains = self.rows.get(f"{stage}"), self.search.trains(state, context)
        if row is None or row.epoch == context.epoch + 1 or trains > row.joint:
            return self._measure(context, stage, trains)
        return nullcontext()

    def _fit(self, state: SearchState, context: Context) -> int:
        """Return a stage's predicted peak in bytes; turn recomputation on if it exceeds the budget."""
        net, first = cast(Staged, context.model), first_examples(context.task.train, self.size)
        batch = pack_batch(first.inputs, first.labels)
        needed = predict_stage(self.search, state, context, batch)
        if needed > self.budget and not net.recomputed:
            net.recomputed = True
            needed = predict_stage(self.search, state, context, batch)
        if needed > self.budget:
            raise MemoryBudgetError(
                f"{format_bytes(self.budget)} of memory do not suffice: stage {state.stage + 1} needs "
                f"{format_bytes(needed)} ({needed} bytes), as earlier ones left the network and with parts computed "
                "anew. What they found is kept, but cannot go on with another budget: search anew, with more --memory "
                "or a smaller --batch-size",
                needed,
                self.search.space.part(state.stage),
            )
        return needed

    @contextmanager
    def _measure(self, context: Context, stage: int, trains: bool) -> Iterator[None]:
        removed = context.undo.contents().values() if context.undo else ()
        live = MemoryCounterMode([*context.model.parameters(), *context.model.buffers(), *removed])
        resident = start_peak_meter(device_of(context.model))
        with live:
            yield
        extra = resident()
        row = StageMemory(
            stage,
            context.epoch + 1,
            trains,
            live.held,
            live.peak,
            None if extra is None else extra + live.held,
            self.predictions.get(stage),
            cast(Staged, context.model).recomputed,
        )
        before = self.rows.get(f"{stage}", row)
        if before.epoch < row.epoch or before.peak <= row.peak:
            self.rows[f"{stage}"] = row
