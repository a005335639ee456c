"""The memory of growth and of learning, predicted once model and data are read and before anything is trained."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from regrow.core.amounts import parse_bytes
from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError
from regrow.core.names import GENERATED
from regrow.core.plan import Plan
from regrow.core.process_memory import read_resident
from regrow.core.sources import Batch, device_of, logits_in
from regrow.core.tasks import Task, first_examples, run_network
from regrow.evaluation import UnpredictableError, predict_memory, training
from regrow.evaluation.generation import predict_generation
from regrow.evaluation.memory import Step
from regrow.jobs.inputs import count_windows
from regrow.jobs.recovery_memory import SPARE, text_batch
from regrow.nets import Loaded
from regrow.settings.grow import Settings
from regrow.settings.learn import Settings as LearnSettings
from regrow.streaming.requirements import MemoryTerms
from regrow.tracing.meta_copy import cast_example

COPIES: Mapping[str, float] = {"ewc": 3, "si": 4, "lwf": 1, "packnet": 3, "wsn": 6, "sparsegrow": 9}
"""Continual-learning method → how much it keeps besides the network, its gradients and moments, in weights of it."""
REPLAYS: Mapping[str, Callable[[Mapping[str, object]], bool]] = {
    "replay": lambda given: True,
    "sparsegrow": lambda given: bool(given.get("memory")),
    "naive": lambda given: given.get("keep") == "data",
}
"""Continual-learning method → whether, with the settings given, a step takes as many earlier examples as new ones."""
EVALUATED = 500
"""The most examples that are evaluated at a time while tasks are learned."""


def plan_learning(
    settings: LearnSettings,
    network: Callable[[], nn.Module],
    tasks: Sequence[Task],
    device: torch.device,
    memory: str,
    announce: Callable[[str], None],
) -> MemoryTerms | None:
    """Predict and announce what learning needs of a limit of memory, or refuse it.

    Args:
        settings: The settings of the run.
        network: Returns the network that is trained, or a copy of it.
        tasks: All tasks.
        device: The device that it is trained on.
        memory: The limit, such as ``4GiB``; empty: nothing is predicted.
        announce: Called with one line that says what the run needs.

    Returns:
        What it needs; ``None`` without a limit.

    Raises:
        InputError: If the run is not on the CPU, or its memory depends on data.
        ResourceError: If it needs more; names an amount that is enough.
    """
    if not memory:
        return None
    _check_device(device)
    held, limit = read_resident(), parse_bytes(memory)
    model = network()
    own, adam = _bytes_of(model), settings.optimizer == "adamw"
    optimizer = partial(torch.optim.AdamW if adam else partial(torch.optim.SGD, momentum=0.9), lr=settings.lr)
    there = [task for task in tasks if not task.gone] or tasks
    method = settings.method
    replays = method in REPLAYS and REPLAYS[method](settings.method_settings)
    size = settings.batch_size * (2 if replays else 1)
    first = first_examples(there[0].train, size)
    tested = first_examples(there[0].test, EVALUATED)
    trained = _predict(model, Batch((first.inputs,), labels=first.labels), _on_inputs(training(optimizer)))
    evaluated = _predict(model, Batch((tested.inputs,), labels=tested.labels), _evaluate)
    kept = own * (3 if adam else 2)
    terms = {
        "the process with model and data": held + SPARE,
        "the network that is trained": own,
        # Measured: training keeps about as much again as the gradients (SmolLM2-135M, benchmarks/command_memory.py).
        "a training step or an evaluation": max(trained, evaluated + kept),
        f"what {method} keeps": int(COPIES.get(method, 0) * own),
    }
    return _announce(MemoryTerms(limit, terms), f"learning by {method}", announce)


def plan_growth_memory(
    settings: Settings, loaded: Loaded, axes: AxisGraph, plan: Plan, memory: str, announce: Callable[[str], None]
) -> MemoryTerms | None:
    """Predict and announce what a growth needs of a limit of memory, or refuse it.

    Args:
        settings: The settings of the run.
        loaded: The model.
        axes: Its axes.
        plan: The plan of the growth.
        memory: The limit, such as ``4GiB``; empty: nothing is predicted.
        announce: Called with one line that says what the run needs.

    Returns:
        What it needs; ``None`` without a limit.

    Raises:
        InputError: If the run is not on the CPU, or its memory depends on data.
        ResourceError: If it needs more; names an amount that is enough.
    """
    if not memory:
        return None
    _check_device(device_of(loaded.model))
    model, own, added = loaded.model, _bytes_of(loaded.model), _added_bytes(loaded.model, plan)
    larger = (own + added) / max(1, own)
    scored = 0
    if loaded.tokenizer is not None:
        batch = text_batch(model, settings.seq_len)
        widest = max((one.shape[0] for one in model.parameters() if one.dim() == 2), default=1)
        scored = 3 * settings.seq_len * widest * 4  # logits, and what is made of them
    else:
        example = cast_example(axes.example, model)
        batch = Batch(example.args, dict(example.kwargs))
    forward = max(scored, larger * (_predict(model, batch, _evaluate) - own))
    blocks = axes.recording.blocks if axes.recording is not None else ()
    sizes = {name: one.numel() for name, one in model.named_parameters()}
    block = max((sum(sizes.get(name, 0) for name in one.states) for one in blocks), default=sum(sizes.values()))
    exact = int(2 * 8 * larger * block) if settings.proof else 0
    process = {"the process with the model": read_resident() + SPARE}
    terms = {
        "what grows": _changed_bytes(model, plan) + added,
        "a comparison in float64 or an evaluation": int(max(exact, forward)),
    }
    if settings.steps:
        if batch.labels is None:
            raise InputError("what training of a grown model needs is predicted for text alone; leave out --memory")
        step = _predict(model, batch, training(partial(torch.optim.AdamW, lr=settings.lr)))
        terms["training"] = int(larger * (step - own))
    if GENERATED in settings.on:
        windows = count_windows(settings.tokens, settings.seq_len)
        generating = {"generating text": predict_generation(model, windows, settings.seq_len)}
        terms = max(terms, generating, key=lambda one: sum(one.values()))
    return _announce(MemoryTerms(parse_bytes(memory), process | terms), "growth", announce)


def _announce(terms: MemoryTerms, what: str, announce: Callable[[str], None]) -> MemoryTerms:
    terms.check(what)
    announce(str(terms))
    return terms


def _check_device(device: torch.device) -> None:
    if device.type != "cpu":
        raise InputError(f"memory is predicted on the CPU alone, not on {device}; leave out --memory")


def _bytes_of(model: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))


def _predict(model: nn.Module, batch: Batch, step: Step) -> int:
    """Return the most bytes of live tensors in a step, the network included."""
    try:
        return predict_memory(model, batch, step).peak
    except UnpredictableError as error:
        raise InputError(f"what the run needs is not predicted: {error}; leave out --memory") from None


def _on_inputs(step: Step) -> Step:
    """Return a step that passes the inputs of an example to the network as a learning run does."""

    def run(model: nn.Module, batch: Batch) -> Any:
        inputs = batch.args[0]
        if isinstance(inputs, Mapping):
            return step(model, Batch((), inputs, batch.labels))
        return step(model, batch if not isinstance(inputs, tuple) else Batch(inputs, labels=batch.labels))

    return run


def _evaluate(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        answer = run_network(model, batch.args[0]) if not batch.kwargs else batch.run(model)
        logits_in(answer).float().argmax(-1)


def _changed_bytes(model: nn.Module, plan: Plan) -> int:
    """Return the bytes of the parameters that a growth replaces by larger ones."""
    touched = {slot.name for change in plan.changes.values() if change.grow for slot in change.slots}
    return sum(one.numel() * one.element_size() for name, one in model.named_parameters() if name in touched)


def _added_bytes(model: nn.Module, plan: Plan) -> int:
    """Return the bytes that a growth adds to a network."""
    factors: dict[str, dict[int, float]] = {}
    for change in plan.changes.values():
        for slot in change.slots if change.grow else ():
            factors.setdefault(slot.name, {})[slot.dim] = 1 + change.grow / max(1, change.size)
    added = 0.0
    for name, one in model.named_parameters():
        added += one.numel() * one.element_size() * (prod(factors.get(name, {}).values()) - 1)
    for path, insertion in plan.insert.items():
        stack = model.get_submodule(path)
        added += sum(_bytes_of(stack.get_submodule(f"{copy.of}")) for copy in insertion.copies)
    return int(added)
