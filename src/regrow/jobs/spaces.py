"""Search spaces by name, and the plain network that remains of one after a search."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from regrow.allocation.stages import MemoryBudgetError, MemoryStages
from regrow.allocation.stages import stages as cut
from regrow.core.amounts import parse_bytes
from regrow.core.candidates import Prefix, Staged, fold_scales
from regrow.core.references import names_code
from regrow.core.sources import Batch, logits_in
from regrow.core.tasks import Task, first_examples, input_shape, pack_batch
from regrow.jobs.search_inputs import select_known
from regrow.jobs.stage_memory import predict_peaks
from regrow.jobs.starting import check_outputs
from regrow.jobs.targets import find_granularities
from regrow.methods import MethodKind, find_method
from regrow.methods.search.assembly import Search
from regrow.nets import Loaded, bench201, cells, mobile
from regrow.nets.bench201 import Bench201
from regrow.nets.cells import Cells
from regrow.nets.load import Builder, call_builder, import_builder
from regrow.nets.loaded import Origin
from regrow.nets.mobile import Mobile
from regrow.nets.small import small
from regrow.nets.staged import check_space_fits
from regrow.settings.search import Settings, parse_search_target
from regrow.tracing.placeholder import find_placeholders

SpaceNetwork = Cells | Mobile | Bench201
"""A network of one of the built-in search spaces."""


def build_space(
    settings: Settings, task: Task, start: Loaded | None = None
) -> tuple[nn.Module, Origin, MemoryStages | None]:
    """Return a search space as a network with random weights, its origin, and its stages if a memory budget sets them.

    Args:
        settings: The settings of the search.
        task: The data of the search.
        start: The network with its weights that is searched instead of a new one.

    Raises:
        ValueError: If there is no such space, the budget is too small for any stages, or there are none to cut.
    """
    space, stages, memory = settings.space, settings.stages, settings.memory
    if start:
        refuse_stages(space, stages, memory)
        if start.tokenizer is None:
            check_outputs(start, task, 1 + max(task.classes))
        return start.model, start.origin, None
    entry = find_method(MethodKind.SEARCH, settings.method)
    measure = parse_search_target(settings.target).measure
    known = {"measure": str(measure), "levels": find_granularities(measure)}
    search: Search = entry.made(settings.method, select_known(entry, known) | dict(settings.method_settings))
    shape, classes = list(input_shape(task.train)), 1 + max(task.classes)
    if fit := re.fullmatch(r"bench201:(\d{1,3})-(\d{1,2})", space):
        refuse_stages(f"{space} has one topology for all cells, so it", stages, memory)
        edges = bench201.supernet(shape, classes, width=int(fit[1]), cells=int(fit[2]), stride=settings.stride)
        check_space_fits(edges, f"a search of {space}")
        return _initialise(Bench201, edges, settings.seed), Origin("bench201", "bench201", edges, space), None
    found = _find_staged(space, shape, classes, settings.stride)
    if found is None:
        refuse_stages(space, stages, memory)
        if names_code(space):
            builder = import_builder(space)
            return _build_own(space, builder, task, settings.seed), Origin("callable", space, {}, space, builder), None
        return *small(space, shape, classes, settings.seed), None
    check_space_fits(found.whole(), f"a search of {space}")
    plan = None
    if memory:
        first = first_examples(task.train, settings.batch_size)
        batch = pack_batch(first.inputs, first.labels)
        plan = _plan_stages(found, batch, parse_bytes(memory), search.stage_share, search.masked)
    config = found.whole(heads=plan.ends if plan else stage_ends(found.parts, stages or min(3, found.parts)))
    net = _initialise(found.net, config, settings.seed)
    net.recomputed = plan is not None and plan.recomputed
    return net, Origin(found.kind, found.kind, config, space), plan


def refuse_stages(what: str, stages: int, memory: str) -> None:
    """Raise ValueError if stages or a memory budget are asked for of a network that is searched in one stage.

    Args:
        what: The network, for the message.
        stages: The number of stages that is asked for; 0: none.
        memory: The memory budget; empty: none.

    Raises:
        ValueError: Names the option.
    """
    if memory or stages > 1:
        raise ValueError(f"{what} is searched in one stage: no --{'memory' if memory else f'stages {stages}'}")


def _build_own(space: str, builder: Builder, task: Task, seed: int) -> nn.Module:
    """Build a network by the user's own code, with random weights, and check its outputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, _ = call_builder(builder, space)
    said = logits_in(model.eval()(first_examples(task.train, 2).inputs))
    classes = 1 + max(task.classes)
    if said.shape != (2, classes):
        raise ValueError(f"{space} answers {tuple(said.shape)} to two images of {classes} classes")
    return model


@dataclass(frozen=True)
class _StagedSpace:
    """A space that can be searched in stages: its network, its description, and its number of parts."""

    kind: str
    net: type[Cells] | type[Mobile]
    whole: Callable[..., Mapping[str, object]]
    prefix: Callable[..., Prefix]
    parts: int


def _find_staged(space: str, shape: Sequence[int], classes: int, stride: int) -> _StagedSpace | None:
    if fit := re.fullmatch(r"cells:(\d{1,3})-(\d{1,2})-(\d{1,2})", space):
        width, many, nodes = map(int, fit.groups())
        whole = partial(cells.supernet, shape, classes, width=width, cells=many, nodes=nodes, stride=stride)
        return _StagedSpace("cells", Cells, whole, cells.prefix, many)
    if fit := re.fullmatch(r"mobile:(\d{1,3})-(\d{1,2})", space):
        width, many = map(int, fit.groups())
        blocks = partial(mobile.supernet, shape, classes, width=width, blocks=many, stride=stride)
        return _StagedSpace("mobile", Mobile, blocks, mobile.prefix, len(blocks()["blocks"]))
    return None


def _plan_stages(found: _StagedSpace, batch: Batch, budget: int, share: float, masked: Collection[str]) -> MemoryStages:
    """Return the fewest stages within a memory budget; if there are none, with recomputation in the backward pass."""
    # Where stages end is not known yet: a classifier behind every part is no less than there will be.
    prefix = partial(found.prefix, found.whole(heads=range(found.parts)), share=share)

    def recomputed(first: int, last: int) -> Prefix:
        made = prefix(first, last)
        cast(Staged, made.net).recomputed = True
        return made

    try:
        return cut(predict_peaks(masked, prefix, batch), found.parts, budget)
    except MemoryBudgetError:
        return replace(cut(predict_peaks(masked, recomputed, batch), found.parts, budget), recomputed=True)


def _initialise(kind: type[SpaceNetwork], config: Mapping[str, Any], seed: int) -> SpaceNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def stage_ends(parts: int, stages: int) -> tuple[int, ...]:
    """Return the last part of each stage, for stages of nearly equal numbers of parts.

    Args:
        parts: The number of parts (cells or blocks) of the space.
        stages: The number of stages.

    >>> stage_ends(8, 3), stage_ends(6, 1)
    ((2, 4, 7), (5,))
    """
    if not 1 <= stages <= parts:
        raise ValueError(f"stages are from 1 to the number of cells or blocks, {parts}; got --stages {stages}")
    return tuple(round(parts * (i + 1) / stages) - 1 for i in range(stages))


def extract_network(model: nn.Module, origin: Origin, *, in_place: bool = False) -> tuple[nn.Module, Origin]:
    """Return what a search left of a space as a plain network with folded scales, and the record of how to build it.

    Args:
        model: The network, cut by plans; its scales are folded in place.
        origin: The record of how the space was built.
        in_place: Whether the network is returned as it is, with placeholders, even if it is of a built-in space.
    """
    gone = find_placeholders(model).keys()
    fold_scales(model)
    config: Mapping[str, object]
    match model:
        case _ if in_place:
            return model.eval(), origin
        case Cells():
            config = cells.describe(model, origin.config, gone)
        case Mobile():
            config = mobile.describe(model, origin.config, gone)
        case Bench201():
            config = bench201.describe(origin.config, gone)
        case _:
            return model.eval(), origin
    return rebuild(config, model), replace(origin, config=config)


def rebuild(config: Mapping[str, Any], model: SpaceNetwork) -> SpaceNetwork:
    """Build the network that a description gives, with the parameters of the super-network that it describes.

    Args:
        config: The description of the network.
        model: The super-network after the search.
    """
    found = type(model)(config)
    if isinstance(model, Cells | Mobile):
        found.recomputed = model.recomputed  # a budget that needs it holds while it is trained anew, too
    names = found.state_dict().keys()
    state = {name: value for name, value in model.state_dict().items() if name in names}
    for path, node in model.named_modules():
        if f"{path}.scale" in state:
            gone = find_placeholders(node)
            alive = [i for i, name in enumerate(node.get_submodule("ops")._modules) if f"ops.{name}" not in gone]
            state[f"{path}.scale"] = state[f"{path}.scale"][alive]
    found.load_state_dict(state)
    return found.eval()
