"""Evaluate a network, whether named on the command line or given in Python, whole or one block at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from regrow import evaluation
from regrow.core.amounts import parse_bytes
from regrow.core.errors import InputError
from regrow.core.objectives import Objective
from regrow.core.process_memory import reset_peak
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source
from regrow.data.batch_streams import join_batches
from regrow.evaluation.choice import CHOICE_TOKENS, count_choice_tokens
from regrow.evaluation.measure import count_positions
from regrow.evaluation.scores import Evaluation, evaluate_objective
from regrow.jobs.inputs import SourceSpecs, read_sources
from regrow.jobs.memory_needs import check_memory_plan, list_model_needs
from regrow.jobs.models import DTYPES, ModelSpec, load_model
from regrow.jobs.recording import Invocation
from regrow.nets import Loaded
from regrow.nets.devices import autocasting
from regrow.nets.loaded import check_unchanged
from regrow.settings.declaration import check_settings
from regrow.settings.evaluate import Settings
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import OpenedNetwork, open_network
from regrow.streaming.requirements import MemoryPlan, plan_memory


@dataclass(frozen=True)
class EvaluateInputs:
    """What is evaluated, and on which data."""

    loaded: Loaded  # the network; without numbers, if it is read one block at a time
    tests: tuple[Source, ...]  # the evaluation halves of the sources
    # What is measured; `None`: the perplexity of text, otherwise the accuracy of classes
    objective: Objective | None = None
    opened: OpenedNetwork | None = None  # the network as it is read one block at a time; `None`: it is in memory
    memory: MemoryPlan | None = None  # how the evaluation stays within a limit of memory; `None`: there is none


@dataclass(frozen=True)
class EvaluateResult:
    """The result of an evaluation."""

    model: nn.Module  # the network; without numbers, if it was read one block at a time
    sources: tuple[evaluation.Perplexity | evaluation.Accuracy | Evaluation, ...]  # one per source, in their order
    choices: tuple[evaluation.Choices, ...]  # one per file of multiple-choice items
    speed: Mapping[str, Any] | None  # the row of `evaluation.speed`; `None`: it is not wanted
    memory: Mapping[str, int | None] | None  # limit, prediction and peak in bytes; `None` without a limit

    def record(self, name: str) -> dict[str, Any]:
        """Return the result as JSON data (results of a custom objective are left out); ``name``: of the model in it."""
        size = evaluation.size(self.model, (), next(self.model.parameters()).dtype)
        result = {
            "model": name,
            "size": size,
            "perplexity": [row.record() for row in self.sources if isinstance(row, evaluation.Perplexity)],
            "accuracy": [row.record() for row in self.sources if isinstance(row, evaluation.Accuracy)],
            "choices": [row.record() for row in self.choices],
            "speed": self.speed,
        }
        return result if self.memory is None else {**result, "memory": self.memory}


def evaluate_network(
    settings: Settings, open_inputs: Callable[[], EvaluateInputs], *, progress: Progress = silent
) -> EvaluateResult:
    """Open a network and measure it as the settings say; the network is not changed.

    ``open_inputs``: called once, after the settings are checked. Raises InputError for such a setting, and if the
    network's weight files have changed meanwhile; ValueError if ``--choices`` needs a tokenizer that it lacks.
    """
    check_settings(settings)
    opened = open_inputs()
    loaded, plan = opened.loaded, opened.memory
    model, tokenizer = loaded.model, loaded.tokenizer
    with TemporaryDirectory(prefix="regrow-") as folder, autocasting(model, settings.precision):
        network = None
        if opened.opened is not None:
            network = opened.opened.network(Path(folder) if plan and plan.on_disk else None)
        sources = _measure_sources(opened, network, progress)
        choices = []
        for file in map(Path, settings.choices):
            if tokenizer is None:
                raise ValueError(f"--choices {file} needs a tokenizer, and {settings.model} has none; leave it out")
            items = evaluation.items_in(file, settings.items)
            outputs = network.outputs if network else None
            choices.append(evaluation.choices(model, tokenizer, items, task=file.name.split(".")[0], outputs=outputs))
        speed = None
        if settings.speed:
            example = Batch(loaded.example.args, loaded.example.kwargs)
            batch = opened.tests[0].batches[0] if opened.tests else example
            speed = evaluation.speed(model, batch, progress=progress)
    check_unchanged(loaded.files)
    memory = plan.record() if plan else None
    return EvaluateResult(model, sources, tuple(choices), speed, memory)


def _measure_sources(
    inputs: EvaluateInputs, network: StreamedNetwork | None, progress: Progress
) -> tuple[evaluation.Perplexity | evaluation.Accuracy | Evaluation, ...]:
    """Return the measurement on each of ``inputs.tests``, in their order.

    ``network``: the network if it is read block by block (then it runs on all together); ``None``: it is in memory.
    """
    model, tokenizer, tests = inputs.loaded.model, inputs.loaded.tokenizer, inputs.tests
    rows: list[evaluation.Perplexity | evaluation.Accuracy | Evaluation] = []
    walk = network.outputs([batch for test in tests for batch in test]) if network and tests else None
    for i, test in enumerate(tests):
        progress(i, len(tests), f"evaluating on {test.name}")
        outputs = None if walk is None else islice(walk, len(test))
        if inputs.objective is not None:
            rows.append(evaluate_objective(model, test, inputs.objective, outputs=outputs, progress=progress))
        elif tokenizer is None:
            rows.append(evaluation.accuracy(model, test))
        else:
            rows.append(evaluation.perplexity(model, test, tokenizer=tokenizer, outputs=outputs))
    return tuple(rows)


# Ends of the names of transformers' classes that take text, and have other outputs than the next token.
NOT_CAUSAL = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def open_named(settings: Settings, invocation: Invocation) -> EvaluateInputs:
    """Open the network, one block at a time if it exceeds ``--memory``, and the evaluation halves of its sources."""
    spec = ModelSpec(settings.model, settings.dtype, settings.device, settings.input, settings.sources)
    plan = None
    if invocation.memory:
        reset_peak()
        opened = open_network(spec.name, DTYPES.get(spec.dtype))
        tests = _read_tests(settings, opened.loaded)
        plan = plan_evaluation_memory(opened, tests, invocation.memory, settings)
        needs = {"--speed": settings.speed} | list_model_needs(spec, settings.precision, opened)
        if check_memory_plan(opened, plan, needs, invocation.announce):
            return EvaluateInputs(opened.loaded, tests, opened=opened, memory=plan)
    loaded = load_model(spec, invocation.progress, invocation.code)
    return EvaluateInputs(loaded, _read_tests(settings, loaded), memory=plan)


def _read_tests(settings: Settings, loaded: Loaded) -> tuple[Source, ...]:
    """Return the evaluation halves of the settings' sources, text in batches of the settings' batch size."""
    specs = SourceSpecs(settings.eval_tokens, settings.seq_len, unseen=settings.sources)
    kind = type(loaded.model).__name__
    whole = getattr(getattr(loaded.model, "config", None), "is_encoder_decoder", False)
    if settings.sources and loaded.tokenizer is not None and (whole or kind.endswith(NOT_CAUSAL)):
        raise InputError(f"{kind} does not predict the next token, as --source needs; use regrow.evaluate with labels")
    tests = read_sources(specs, loaded).evaluation
    return tests if loaded.tokenizer is None else tuple(join_batches(test, settings.batch_size) for test in tests)


def plan_evaluation_memory(
    opened: OpenedNetwork, tests: Sequence[Source], memory: str, settings: Settings
) -> MemoryPlan:
    """Predict the memory of an evaluation from its batches (``tests``) and the multiple-choice items of the settings.

    ``memory``: the limit, such as ``4GiB``; whether it suffices is not checked here.
    """
    positions = [count_positions(batch) for test in tests for batch in test]
    longest, total = max(positions, default=settings.seq_len * settings.batch_size), sum(positions)
    if settings.choices and opened.loaded.tokenizer is not None:
        longest = max(longest, CHOICE_TOKENS)
        for path in map(Path, settings.choices):
            items = evaluation.items_in(path, settings.items)
            tokens = count_choice_tokens(opened.loaded.model, opened.loaded.tokenizer, items)
            total = max(total, tokens)
    return plan_memory(opened.network(), parse_bytes(memory), -(-total // longest), longest, what="evaluating")


def evaluate_named(settings: Settings, invocation: Invocation) -> dict[str, Any]:
    """Evaluate the model that settings name, as ``regrow evaluate`` does, and return the result as JSON data."""
    result = evaluate_network(settings, partial(open_named, settings, invocation), progress=invocation.progress)
    return result.record(Path(settings.model).name)
