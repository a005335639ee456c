"""Networks that are larger than memory, in the Python interface: opened by name, and read one block at a time."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from regrow.api.inputs import Arguments, Inputs, choose_reading
from regrow.core.amounts import parse_bytes
from regrow.core.errors import InputError
from regrow.core.objectives import choose_objective
from regrow.core.progress import Progress
from regrow.core.sources import Batch
from regrow.data.batch_streams import join_sources
from regrow.data.batches import to_sources
from regrow.jobs.recording import Invocation
from regrow.jobs.streamed import plan_streaming, start_streaming
from regrow.methods.pruning.pruner import Pruner
from regrow.scoring.layer_orders import BATCH
from regrow.settings.prune import Settings
from regrow.streaming.opening import OpenedNetwork, open_network
from regrow.streaming.requirements import MemoryPlan, plan_memory

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
    opened, inputs = _open(given, memory)
    batches = list(join_sources(inputs.sources, BATCH if pruner.products else 1))
    positions, total = max(map(_count_positions, batches), default=1), sum(map(_count_positions, batches))
    names = tuple(f"data{i}" for i in range(len(inputs.sources)))
    described = replace(settings, sources=names, seq_len=positions, tokens=max(1, total // max(1, len(names))))
    needs = {**needs, "a model without text": opened.loaded.tokenizer is None}
    amounts = len(batches), positions
    call = Invocation(memory=memory, announce=lambda line: progress(0, 1, line))
    plan = plan_streaming(opened, call, described, pruner, amounts, needs)
    return opened, inputs, plan


def open_to_evaluate(given: Arguments, memory: str, progress: Progress) -> Opened:
    """Open a network and read its data, and predict what an evaluation needs.

    Args:
        given: As for :func:`open_to_prune`.
        memory: As for :func:`open_to_prune`.
        progress: As for :func:`open_to_prune`.

    Raises:
        ValueError: As :func:`open_to_prune`.
    """
    opened, inputs = _open(given, memory)
    batches = list(join_sources(inputs.sources, 1))
    positions = max(map(_count_positions, batches), default=1)
    plan = plan_memory(opened.network(), parse_bytes(memory), len(batches), positions, what="evaluating")
    needs = {
        f"device={given.device}": given.device not in (None, "cpu"),
        f"precision={given.precision}": given.precision != "float32",
        "a model without text": opened.loaded.tokenizer is None,
    }
    start_streaming(opened, plan, needs, lambda line: progress(0, 1, line))
    return opened, inputs, plan


def _open(given: Arguments, memory: str) -> tuple[OpenedNetwork, Inputs]:
    """Open the network, and read the data with its tokenizer."""
    if not isinstance(given.model, str | Path):
        raise InputError(
            f"memory={memory!r} reads a network from its files, got a {type(given.model).__name__}; give the name of a "
            "model or a folder, or leave memory out"
        )
    opened = open_network(str(given.model))
    loaded = opened.loaded
    for name, value in (("origin", loaded.origin), ("tokenizer", loaded.tokenizer)):
        if value is not None and not hasattr(loaded.model, name):
            setattr(loaded.model, name, value)  # as in a network that is loaded whole
    tokenizer = given.tokenizer or loaded.tokenizer
    reading = choose_reading(loaded.model, tokenizer, given.batch_size)
    sources = tuple(to_sources(given.data, reading))
    tests = sources if given.validation is None else tuple(to_sources(given.validation, reading))
    labelled = next((source.batches[0] for source in (*sources, *tests)), None)
    objective = choose_objective(given.loss, labelled) if labelled is not None else None
    return opened, Inputs(loaded.model, loaded.example, sources, objective, tokenizer, tests, loaded.files)


def _count_positions(batch: Batch) -> int:
    """Return how many positions a batch has, padded and unlabelled ones included; its size if it has no ids."""
    inputs = (leaf for leaf in tree_leaves((batch.args, dict(batch.kwargs))) if isinstance(leaf, Tensor))
    ids = next((leaf for leaf in inputs if leaf.dtype in (torch.int32, torch.int64)), None)
    return batch.size if ids is None else ids.numel()
