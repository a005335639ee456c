"""Networks that are larger than memory, in the Python interface: opened by name, and read one block at a time."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from regrow.api.inputs import Arguments, Inputs, choose_reading
from regrow.core.errors import InputError
from regrow.core.objectives import choose_objective
from regrow.core.progress import Progress
from regrow.data.batch_streams import join_sources
from regrow.data.batches import to_sources
from regrow.jobs.evaluate import count_positions
from regrow.jobs.models import with_origin
from regrow.jobs.recording import Invocation
from regrow.jobs.streamed import plan_streaming
from regrow.methods.pruning.layer_orders import BATCH
from regrow.methods.pruning.pruner import Pruner
from regrow.settings.prune import Settings
from regrow.streaming.opening import OpenedNetwork, open_network
from regrow.streaming.requirements import MemoryPlan

Opened = tuple[OpenedNetwork, Inputs, MemoryPlan]
"""A network, the network without numbers with its data, and how a call stays within its memory."""


def open_to_prune(
    given: Arguments, memory: str, settings: Settings, pruner: Pruner, needs: Mapping[str, bool], progress: Progress
) -> Opened:
    """Open a network and read its data, and predict what pruning needs.

    Args:
        given: The name of the network, and the data, all batches of which are in memory.
        memory: The limit, such as ``"4GiB"``.
        settings: The settings of the run.
        pruner: The method.
        needs: What needs the whole network in memory → whether the call has it.
        progress: Called with one line that says how the call stays within the limit.

    Raises:
        InputError: If the network was given as a module, or something needs the whole network and that does not fit.
        ResourceError: If it does not fit even with one block in memory.
    """
    opened, inputs = open_from_files(given, memory)
    batches = list(join_sources(inputs.sources, BATCH if pruner.products else 1))
    positions, total = max(map(count_positions, batches), default=1), sum(map(count_positions, batches))
    names = tuple(f"data{i}" for i in range(len(inputs.sources)))
    described = replace(settings, sources=names, seq_len=positions, tokens=max(1, total // max(1, len(names))))
    needs = {**needs, "a model without text": opened.loaded.tokenizer is None}
    amounts = len(batches), positions
    call = Invocation(memory=memory, announce=lambda line: progress(0, 1, line))
    plan = plan_streaming(opened, call, described, pruner, amounts, needs)
    return opened, inputs, plan


def open_from_files(given: Arguments, memory: str) -> tuple[OpenedNetwork, Inputs]:
    """Open the network, and read the data with its tokenizer."""
    if not isinstance(given.model, str | Path):
        raise InputError(
            f"memory={memory!r} reads a network from its files, got a {type(given.model).__name__}; give the name of a "
            "model or a folder, or leave memory out"
        )
    opened = open_network(str(given.model))
    loaded = opened.loaded
    with_origin(loaded)
    tokenizer = given.tokenizer or loaded.tokenizer
    reading = choose_reading(loaded.model, tokenizer, given.batch_size)
    sources = tuple(to_sources(given.data, reading))
    tests = sources if given.validation is None else tuple(to_sources(given.validation, reading))
    labelled = next((source.batches[0] for source in (*sources, *tests)), None)
    objective = choose_objective(given.loss, labelled) if labelled is not None else None
    return opened, Inputs(loaded.model, loaded.example, sources, objective, tokenizer, tests, loaded.files)
