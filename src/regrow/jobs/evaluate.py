"""``regrow evaluate``: evaluate a model by name, with all results in one record."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from regrow import evaluation
from regrow.core.amounts import parse_bytes
from regrow.core.process_memory import reset_peak
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch
from regrow.data.batch_streams import join_batches
from regrow.jobs.inputs import SourceSpecs, read_sources
from regrow.jobs.models import DTYPES, ModelSpec, load_model
from regrow.jobs.streamed import needs_of_model, start_streaming
from regrow.nets import Loaded
from regrow.nets.devices import autocasting
from regrow.nets.loaded import check_unchanged
from regrow.settings.declaration import check_settings
from regrow.settings.evaluate import Settings
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import OpenedNetwork, open_network
from regrow.streaming.requirements import MemoryPlan, plan_memory, record_peak


def evaluate(
    settings: Settings,
    progress: Progress = silent,
    *,
    code: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a run folder, or any model that can be loaded by name, and return all results.

    Args:
        settings: The model and what is measured; of each source the evaluation half is used.
        progress: Called with (steps done, steps in all, what is being done).
        code: The function ``pkg.mod:fn`` that builds the network of the folder, if that is the user's own code.
        memory: How much memory the evaluation may use, such as ``4GiB``: a network that does not fit is read one block
            at a time, with the same result. Empty: it is loaded whole.
        announce: Called with one line that says how the evaluation stays within that memory.

    Returns:
        ``size``, ``perplexity``, ``accuracy``, ``choices``, ``harness`` and ``speed``, as JSON data; with a limit of
        memory, also ``memory``.

    Raises:
        ValueError: If the model or a source cannot be used.
    """
    check_settings(settings)
    model = settings.model
    spec = ModelSpec(model, settings.dtype, settings.device, settings.input, settings.sources)
    if not memory:
        loaded = load_model(spec, progress, code)
        with autocasting(loaded.model, settings.precision):
            result = _evaluate(settings, loaded, progress)
        check_unchanged(loaded.files)
        return result
    reset_peak()
    opened = open_network(spec.name, DTYPES.get(spec.dtype))
    plan = _plan(settings, opened, parse_bytes(memory))
    own = {"--harness": bool(settings.harness), "--speed": settings.speed}
    streams = start_streaming(opened, plan, {**own, **needs_of_model(spec, settings.precision, opened)}, announce)
    with TemporaryDirectory(prefix="regrow-") as place:
        network = opened.network(Path(place) if plan.on_disk else None) if streams else None
        loaded = opened.loaded if network else load_model(spec, progress, code)
        with autocasting(loaded.model, settings.precision):
            result = _evaluate(settings, loaded, progress, network)
    check_unchanged(loaded.files)
    return {**result, "memory": record_peak(plan)}


def _plan(settings: Settings, opened: OpenedNetwork, limit: int) -> MemoryPlan:
    """Predict the memory of an evaluation from the tokens of its longest part."""
    longest = settings.seq_len * settings.batch_size
    tokens = len(settings.sources) * settings.eval_tokens
    if settings.choices and opened.loaded.tokenizer is not None:
        longest = max(longest, evaluation.CHOICE_TOKENS)
        for path in map(Path, settings.choices):
            items = evaluation.items_in(path, settings.items)
            own = evaluation.count_choice_tokens(opened.loaded.model, opened.loaded.tokenizer, items)
            tokens = max(tokens, own)
    return plan_memory(opened.network(), limit, -(-tokens // longest), longest, what="evaluating")


def _evaluate(
    settings: Settings, loaded: Loaded, progress: Progress, network: StreamedNetwork | None = None
) -> dict[str, Any]:
    model, items = settings.model, settings.items
    specs = SourceSpecs(settings.eval_tokens, settings.seq_len, unseen=settings.sources)
    tests = read_sources(specs, loaded).evaluation
    if loaded.tokenizer is not None:
        tests = tuple(join_batches(test, settings.batch_size) for test in tests)
    walk = network.outputs([batch for test in tests for batch in test]) if network and tests else None
    first = next(loaded.model.parameters()).dtype
    result: dict[str, Any] = {
        "model": Path(model).name,
        "size": evaluation.size(loaded.model, (), first).record(),
        "perplexity": [],
        "accuracy": [],
        "choices": [],
        "harness": [],
        "speed": None,
    }
    for i, test in enumerate(tests):
        progress(i, len(tests), f"evaluating on {test.name}")
        if loaded.tokenizer is None:
            result["accuracy"].append(evaluation.accuracy(loaded.model, test).record())
        else:
            outputs = None if walk is None else islice(walk, len(test))
            one = evaluation.perplexity(loaded.model, test, tokenizer=loaded.tokenizer, outputs=outputs)
            result["perplexity"].append(one.record())
    for file in map(Path, settings.choices):
        if loaded.tokenizer is None:
            raise ValueError(f"--choices {file} needs a tokenizer, and {model} has none; leave it out")
        task, run = file.name.split(".")[0], cast(Any, network).outputs if network else None
        held = evaluation.items_in(file, items)
        score = evaluation.choices(loaded.model, loaded.tokenizer, held, task=task, outputs=run)
        result["choices"].append(score.record())
    for task in settings.harness:
        tasks = evaluation.harness(loaded.model, loaded.tokenizer, task, items=items, progress=progress)
        result["harness"] += [one.record() for one in tasks]
    if settings.speed:
        batch = tests[0].batches[0] if tests else Batch(loaded.example.args, loaded.example.kwargs)
        result["speed"] = evaluation.speed(loaded.model, batch, progress=progress).record()
    return result
