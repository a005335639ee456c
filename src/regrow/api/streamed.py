"""Networks that are larger than memory, in the Python interface: opened by name, and read one block at a time."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.amounts import parse_bytes
from regrow.api.inputs import Inputs, choose_reading
from regrow.api.quality import measure_run
from regrow.api.runs import Destination, complete, loaded_of, run_of
from regrow.budget import Budget
from regrow.commands.calibration import calibrate, open_journal
from regrow.commands.cutting import record_plan
from regrow.commands.measuring import log_budget, log_pairs
from regrow.commands.pruning import check_pruning
from regrow.commands.score_summary import write_scores
from regrow.commands.streamed import StreamedRun, start_streaming
from regrow.data.batches import to_sources
from regrow.data.joined import join_sources
from regrow.errors import InputError
from regrow.methods.pruning.pruner import Pruner, plan_cut
from regrow.objectives import choose_objective
from regrow.plan import Plan
from regrow.progress import Progress
from regrow.progress_bar import visible
from regrow.scoring.layer_orders import BATCH
from regrow.settings.prune import Settings
from regrow.sources import Batch
from regrow.streaming.opening import OpenedNetwork, open_network
from regrow.streaming.requirements import plan_memory, with_products


@dataclass(frozen=True, eq=False)
class StreamedInputs:
    """A network that is read one block at a time, and data for it.

    Args:
        run: The network.
        inputs: The network without numbers, and the data.
    """

    run: StreamedRun
    inputs: Inputs


def open_within(
    model: object,
    data: Any,
    memory: str,
    needs: Mapping[str, bool],
    progress: Progress,
    *,
    what: str,
    pruner: Pruner | None = None,
    limits: Budget | None = None,
    loss: Any = None,
    tokenizer: Any = None,
    batch_size: int = 32,
) -> StreamedInputs | None:
    """Open a network and read its data, unless the network fits into memory as a whole.

    Args:
        model: A model's name or a run folder.
        data: The data; all batches are in memory.
        memory: The limit, such as ``"4GiB"``.
        needs: What needs the whole network in memory → whether the call has it.
        progress: Called with one line that says how the call stays within the limit.
        what: ``"pruning"`` or ``"evaluating"``.
        pruner: The method that prunes.
        limits: Its budget, which says what may be cut.
        loss: The loss, as for :func:`regrow.prune`.
        tokenizer: The tokenizer; ``None``: that of the model.
        batch_size: Examples per batch.

    Returns:
        The network to be read one block at a time; ``None`` if it fits.

    Raises:
        InputError: If the network was given as a module, or something needs the whole network and that does not fit.
        ResourceError: If it does not fit even with one block in memory.
    """
    if not isinstance(model, str | Path):
        raise InputError(
            f"memory={memory!r} reads a network from its files, got a {type(model).__name__}; give the name of a model "
            "or a folder, or leave memory out"
        )
    opened = open_network(str(model))
    inputs = _read(opened, data, loss, tokenizer, batch_size)
    products = pruner is not None and pruner.products
    batches = list(join_sources(inputs.sources, BATCH if products else 1))
    tokens = max(map(_count_positions, batches), default=1)
    plan = plan_memory(opened.network(), parse_bytes(memory), len(batches), tokens, what=what)
    if products:
        plan = with_products(plan, opened.network(), opened.axes, (limits or Budget()).units(opened.axes))
    own = {"a model without text": opened.loaded.tokenizer is None}
    run = start_streaming(opened, plan, {**needs, **own}, lambda line: progress(0, 1, line))
    return None if run is None else StreamedInputs(run, inputs)


def _count_positions(batch: Batch) -> int:
    """Return how many positions a batch has, padded and unlabelled ones included; its size if it has no ids."""
    inputs = (one for one in tree_leaves((batch.args, dict(batch.kwargs))) if isinstance(one, Tensor))
    ids = next((one for one in inputs if one.dtype in (torch.int32, torch.int64)), None)
    return batch.size if ids is None else ids.numel()


def _read(opened: OpenedNetwork, data: Any, loss: Any, tokenizer: Any, batch_size: int) -> Inputs:
    loaded = opened.loaded
    for name, value in (("origin", loaded.origin), ("tokenizer", loaded.tokenizer)):
        if value is not None and not hasattr(loaded.model, name):
            setattr(loaded.model, name, value)  # as in a network that is loaded whole
    tokenizer = tokenizer or loaded.tokenizer
    sources = tuple(to_sources(data, choose_reading(loaded.model, tokenizer, batch_size)))
    objective = choose_objective(loss, sources[0].batches[0]) if sources else None
    return Inputs(loaded.model, loaded.example, sources, objective, tokenizer, sources, loaded.files)


def prune_streamed(
    streamed: StreamedInputs,
    pruner: Pruner,
    limits: Budget,
    place: Destination,
    settings: Settings,
    model: str,
    loss: str,
    progress: Progress,
) -> tuple[nn.Module, Plan]:
    """Prune a network one block at a time and write the run, or resume it, as :func:`regrow.prune` does with ``out=``.

    Args:
        streamed: The network and the data.
        pruner: The method.
        limits: The budget.
        place: The run folder.
        settings: The settings of the command that say what the call does.
        model: The name of the network.
        loss: The name of the loss.
        progress: Called with (steps done, steps in all, what is being done).

    Returns:
        The cut network without numbers, and the plan.

    Raises:
        InputError: If there is no run folder.
    """
    if place.out is None:
        raise InputError(
            "the network does not fit into memory, so that the cut one is written to a folder; give out=, for example "
            "out='runs/pruned'"
        )
    inputs, axes, start = streamed.inputs, streamed.run.opened.axes, time.perf_counter()
    check_pruning(pruner, axes, limits, inputs.sources)
    loaded, data = loaded_of(inputs), place.describe(inputs.sources)
    given = "prune", settings, model, loaded, streamed.run
    with run_of(place, *given, data=data, loss=loss) as folder, visible(progress) as shown:
        run = streamed.run.with_results(folder.path)
        network = run.network()
        weights = network.weights.parameters()
        basis = folder, loaded, axes, pruner, inputs.sources, shown, inputs.objective, network
        evidence, key = calibrate(*basis, units=limits.units(axes))
        for note in evidence.notes:
            warnings.warn(note, stacklevel=4)  # at the call of prune
        saved = {**open_journal(folder, key), "weights": weights, "progress": shown, "visits": network}
        chosen = plan_cut(pruner, inputs.model, axes, limits, evidence, **saved)
        write_scores(folder, weights, axes, chosen.plan, chosen.scores, evidence)
        if chosen.findings:
            folder.write_findings(settings.method, chosen.findings)
        del weights  # its buffers, before the cut needs memory
        before = measure_run(folder, inputs, axes, "dense", "float32", shown, run.network())
        cut = run.cut(folder, chosen.plan, proof=True, progress=shown)
        record_plan(folder, chosen.plan, axes, cut.axes)
        network = cut.network(folder.path, run.results)
        after = measure_run(folder, inputs, cut.axes, "pruned", "float32", shown, network)
        log_budget(folder, cut.loaded.model, axes, cut.axes, limits)
        log_pairs(folder, before, after, {})
        complete(folder, prune=time.perf_counter() - start)
    return cut.loaded.model, chosen.plan
