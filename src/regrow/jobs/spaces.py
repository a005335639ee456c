"""Search spaces by name, the memory of their stages, and the plain network that remains after a search."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from regrow.allocation.stages import MemoryBudgetError, MemoryStages, Peak, plan_stages
from regrow.core.amounts import format_bytes, parse_bytes
from regrow.core.candidates import Prefix, Staged, fold_scales
from regrow.core.errors import InputError
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

Describe = Callable[..., Mapping[str, Any]]
# Space that can be searched in stages → its network, its description, the same with fewer operations in the parts
# before one, and what its parts are.
STAGED: Mapping[str, tuple[type[Cells | Mobile], Describe, Describe, str]] = {
    "cells": (Cells, cells.supernet_config, cells.thin_config, "cells"),
    "mobile": (Mobile, mobile.supernet_config, mobile.thin_config, "blocks"),
}
# The predicted memory of a step with masks is that of one without, times this, and ``Search.mask_bytes`` per weight.
MASK_FACTOR = 1.02


def build_space(
    settings: Settings, task: Task, start: Loaded | None = None
) -> tuple[nn.Module, Origin, MemoryStages | None]:
    """Return a search space as a network, its origin, and its stages if a memory budget sets them, else ``None``.

    The network has random weights of the seed, for inputs and classes of ``task``, or is ``start``, the network with
    weights that is searched. Raises ValueError for stages that the space cannot have, and MemoryBudgetError if no stage
    fits the budget.
    """
    space, stages, seed = settings.space, settings.stages, settings.seed
    # cells:WIDTH-CELLS-NODES or mobile:WIDTH-BLOCKS
    match = re.fullmatch(r"cells:(\d{1,3})-(\d{1,2})-(\d{1,2})|mobile:(\d{1,3})-(\d{1,2})", space)
    if (start or not match) and (settings.memory or stages > 1):
        option = "memory" if settings.memory else f"stages {stages}"
        raise ValueError(f"{space} is searched in one stage: no --{option}")
    if settings.input and not start:
        raise InputError(f"--input {settings.input} is of a MODEL, and {space} takes the data as it is: drop it")
    if start:
        if start.tokenizer is None:
            check_outputs(start, task, 1 + max(task.classes))
        return start.model, start.origin, None
    shape, classes = list(input_shape(task.train)), 1 + max(task.classes)
    if names_function(space):
        builder = import_builder(space)
        origin = Origin("callable", space, {}, space, builder)
        return _build_named(space, builder, task, seed), origin, None
    if not match:
        return *small(space, shape, classes, seed), None
    kind = space.partition(":")[0]
    network_class, configure, thin, parts = STAGED[kind]
    sizes = zip(("width", parts, "nodes"), (int(size) for size in match.groups() if size), strict=False)
    configure = partial(configure, shape, classes, stride=settings.stride, **dict(sizes))
    whole, plan = configure(), None
    check_space_fits(network_class, whole, f"a search of {space}")
    count = len(whole[parts])
    if settings.memory:
        # Where stages end is not known yet: a classifier behind every part is no less than there will be.
        build = partial(_build_prefix, network_class, partial(thin, configure(heads=range(count))))
        plan = _plan_stages_in_memory(settings, task, build, count)
    config = configure(heads=plan.ends if plan else choose_stage_ends(count, stages or min(3, count)))
    net = _build_seeded(network_class, config, seed)
    net.recomputed = plan is not None and plan.recomputed
    return net, Origin(kind, kind, config, space), plan


def _build_named(space: str, builder: Builder, task: Task, seed: int) -> nn.Module:
    """Return a network that the user's code builds from the seed; ValueError unless it has an output per class.

    ``space`` is its name on the command line. The global random state is unchanged.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _ = call_builder(builder, space)
    logits = logits_in(model.eval()(first_examples(task.train, 2).inputs))
    classes = 1 + max(task.classes)
    if logits.shape != (2, classes):
        raise ValueError(f"{space} returns {tuple(logits.shape)} for two images; return logits of {classes} classes")
    return model


def _build_prefix(
    network_class: type[Cells | Mobile], thin: Describe, share: float, recomputes: bool, first: int, last: int
) -> Prefix:
    net = network_class(thin(first, share))
    net.recomputed = recomputes
    return Prefix(net, last)


def _plan_stages_in_memory(settings: Settings, task: Task, build: Callable[..., Prefix], parts: int) -> MemoryStages:
    """Return the fewest stages within the memory budget, if need be with recomputation, else raise MemoryBudgetError.

    ``parts``: how many cells or blocks the space has; ``build``: (the fraction that earlier stages keep, whether
    activations are recomputed, index of the first part with all its candidates, of the last that runs) → the network.
    """
    target = parse_search_target(settings.target)
    search = make_search(settings, target.measure, {})
    left = max(search.stage_share, target.share or 0.0)
    first, budget = first_examples(task.train, settings.batch_size), parse_bytes(settings.memory)
    batch = pack_batch(first.inputs, first.labels)

    def plan(*, recomputes: bool) -> MemoryStages:
        peak = make_peak_predictor(search, partial(build, left, recomputes), batch)
        return replace(plan_stages(peak, parts, budget), recomputed=recomputes)

    try:
        return plan(recomputes=False)
    except MemoryBudgetError:
        return plan(recomputes=True)


def _build_seeded(network_class: type[Cells | Mobile], config: Mapping[str, Any], seed: int) -> Cells | Mobile:
    """Return ``network_class(config)`` with random weights of a seed; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network_class(config)


def choose_stage_ends(parts: int, stages: int) -> tuple[int, ...]:
    """Return the index of the last part (cell or block) of each of nearly equal stages; ValueError if too many or 0.

    >>> choose_stage_ends(8, 3), choose_stage_ends(6, 1)
    ((2, 4, 7), (5,))
    """
    if not 1 <= stages <= parts:
        raise ValueError(f"stages are from 1 to the number of cells or blocks, {parts}; got --stages {stages}")
    return tuple(round(parts * (i + 1) / stages) - 1 for i in range(stages))


def extract_network(model: nn.Module, origin: Origin, *, in_place: bool = False) -> tuple[nn.Module, Origin]:
    """Fold the scales of a searched space into its weights, in place; return the network, in eval mode, and its origin.

    Cells and blocks are built again as a plain network with an origin of its own. Any other space, and any with
    ``in_place``, is ``model`` itself, with the same origin.
    """
    removed = find_placeholders(model).keys()
    fold_scales(model)
    if in_place or not isinstance(model, Cells | Mobile):
        return model.eval(), origin
    if isinstance(model, Cells):
        config = cells.describe_result(model, origin.config, removed)
    else:
        config = mobile.describe_result(model, origin.config, removed)
    return rebuild_network(config, model), replace(origin, config=config)


def rebuild_network(config: Mapping[str, Any], model: Cells | Mobile) -> Cells | Mobile:
    """Return a new network of a config, in eval mode, with copies of the weights of the searched ``model``."""
    network = type(model)(config)
    network.recomputed = model.recomputed  # a budget that needs it holds while it is trained anew, too
    names = network.state_dict().keys()
    state = {name: value for name, value in model.state_dict().items() if name in names}
    for path, node in model.named_modules():
        if f"{path}.scale" in state:
            removed = find_placeholders(node)
            indices = [i for i, name in enumerate(node.get_submodule("ops")._modules) if f"ops.{name}" not in removed]
            state[f"{path}.scale"] = state[f"{path}.scale"][indices]
    network.load_state_dict(state)
    return network.eval()


def make_peak_predictor(search: Search, prefix: Callable[[int, int], Prefix], batch: Batch) -> Peak:
    """Return a function (index of the first part with all candidates, of the last that runs) → peak bytes of a stage.

    ``prefix``: the same arguments → the network that runs in the stage; ``batch``: of a training step.
    """
    step = _make_step(search)

    @cache
    def peak(first: int, last: int) -> int:
        plain = predict_memory(partial(prefix, first, last), batch, step).peak
        with torch.device("meta"):
            weights = prefix(first, last).count_parameters()
        return int(MASK_FACTOR * plain) + search.mask_bytes * weights

    return peak


def predict_stage_bytes(search: Search, state: SearchState, context: Context, batch: Batch) -> int:
    """Predict the peak bytes of a training step on ``batch`` in the current stage, with weights kept to undo cuts."""
    net = Prefix(context.model, search.space.part(state.stage))
    removed = context.undo.contents().values() if context.undo else ()
    cut_bytes = sum(tensor.untyped_storage().nbytes() for tensor in removed)
    plain = predict_memory(net, batch, _make_step(search)).peak
    return int(MASK_FACTOR * plain) + search.mask_bytes * net.count_parameters() + cut_bytes


def _make_step(search: Search) -> Callable[[nn.Module, Batch], Any]:
    """Return a function (network, batch) that takes the steps of a search, by SGD with momentum, to predict memory."""
    train = make_training_step(partial(torch.optim.SGD, lr=0.1, momentum=0.9))

    def train_scales_too(net: nn.Module, batch: Batch) -> None:
        train(net, batch)
        scales = [p for name, p in net.named_parameters() if name.endswith("scale")]
        loss = F.cross_entropy(logits_in(batch.run(net)), cast(torch.Tensor, batch.labels))
        torch.autograd.grad(loss, scales, allow_unused=True)  # keeps recomputed activations that it does not use

    return train_scales_too if search.second_share else train


@dataclass
class MemoryWatch:
    """Keeps each stage of a search within a memory budget, and measures steps of it with and without masks trained."""

    search: Search
    budget: int  # the budget in bytes; 0: none, and nothing is measured
    batch_size: int
    rows: dict[str, StageMemory] = field(default_factory=dict)  # stage → its measured memory
    # Stage that started in this process → its predicted peak, in bytes
    predictions: dict[int, int] = field(default_factory=dict)

    def __call__(self, state: SearchState, context: Context, step: int) -> AbstractContextManager[None]:
        """Return a context manager around a training step; of each stage, steps with and without masks are measured.

        ``step``: its index in the epoch. At the start of a stage after the first its peak is predicted;
        MemoryBudgetError is raised if it exceeds the budget.
        """
        if not self.budget:
            return nullcontext()
        stage = state.stage
        if stage and stage not in self.predictions:
            self.predictions[stage] = self._fit_to_budget(state, context)
        if step > 1:
            return nullcontext()
        row, trains = self.rows.get(f"{stage}"), self.search.trains(state, context)
        if row is None or row.epoch == context.epoch + 1 or trains > row.joint:
            return self._measure(context, stage, trains)
        return nullcontext()

    def measure_trial(self, state: SearchState, context: Context) -> AbstractContextManager[None]:
        """Return a context manager around the training of proposals, which is measured where there is a budget."""
        return self._measure(context, state.stage, trains=False, outside=1) if self.budget else nullcontext()

    def _fit_to_budget(self, state: SearchState, context: Context) -> int:
        """Return a stage's predicted peak in bytes, with the network's ``recomputed`` set if it must, or raise.

        MemoryBudgetError says that even so it exceeds the budget.
        """
        net, first = cast(Staged, context.model), first_examples(context.task.train, self.batch_size)
        batch = pack_batch(first.inputs, first.labels)
        needed = predict_stage_bytes(self.search, state, context, batch)
        if needed > self.budget and not net.recomputed:
            net.recomputed = True
            needed = predict_stage_bytes(self.search, state, context, batch)
        if needed > self.budget:
            raise MemoryBudgetError(
                f"{format_bytes(self.budget)} of memory do not suffice: stage {state.stage + 1} needs "
                f"{format_bytes(needed)} ({needed} bytes), as earlier ones left the network and with parts computed "
                "anew. What they found is kept, but cannot go on with another budget: search anew, with more --memory "
                "or a smaller --batch-size"
            )
        return needed

    @contextmanager
    def _measure(self, context: Context, stage: int, trains: bool, outside: int = 0) -> Iterator[None]:
        """Context manager: measure steps that ``trains`` masks or not; keep the stage's latest row that needs most.

        ``outside``: the number of moments of each parameter that exist besides those that the steps use.
        """
        removed = context.undo.contents().values() if context.undo else ()
        moments = outside * sum(p.nbytes for p in context.model.parameters())
        live = MemoryCounterMode([*context.model.parameters(), *context.model.buffers(), *removed])
        resident = start_peak_meter(device_of(context.model))
        with live:
            yield
        extra = resident()
        row = StageMemory(
            stage,
            context.epoch + 1,
            trains,
            live.held + moments,
            live.peak + moments,
            None if extra is None else extra + live.held + moments,
            self.predictions.get(stage),
            cast(Staged, context.model).recomputed,
        )
        before = self.rows.get(f"{stage}", row)
        if before.joint < row.joint or before.peak <= row.peak:
            self.rows[f"{stage}"] = row
