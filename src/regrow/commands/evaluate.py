"""``regrow evaluate``: evaluate a model by name, with all results in one record."""

from pathlib import Path
from typing import Any

from regrow import evaluation
from regrow.commands.inputs import SourceSpecs, read_sources
from regrow.commands.models import ModelSpec, load_model
from regrow.nets import Loaded
from regrow.nets.precision import autocasting
from regrow.progress import Progress, silent
from regrow.settings.declaration import check_settings
from regrow.settings.evaluate import Settings
from regrow.sources import Batch


def evaluate(settings: Settings, progress: Progress = silent, *, code: str = "") -> dict[str, Any]:
    """Evaluate a run folder, or any model that can be loaded by name, and return all results.

    Args:
        settings: The model and what is measured; of each source the evaluation half is used.
        progress: Called with (steps done, steps in all, what is being done).
        code: The function ``pkg.mod:fn`` that builds the network of the folder, if that is the user's own code.

    Returns:
        ``size``, ``perplexity``, ``accuracy``, ``choices``, ``harness`` and ``speed``, as JSON data.

    Raises:
        ValueError: If the model or a source cannot be used.
    """
    check_settings(settings)
    model = settings.model
    spec = ModelSpec(model, settings.dtype, settings.device, settings.input, settings.sources)
    loaded = load_model(spec, progress, code)
    with autocasting(loaded.model, settings.precision):
        return _evaluate(settings, loaded, progress)


def _evaluate(settings: Settings, loaded: Loaded, progress: Progress) -> dict[str, Any]:
    model, items = settings.model, settings.items
    specs = SourceSpecs(settings.eval_tokens, settings.seq_len, unseen=settings.sources)
    tests = read_sources(specs, loaded).evaluation
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
            one = evaluation.perplexity(loaded.model, test, tokenizer=loaded.tokenizer)
            result["perplexity"].append(one.record())
    for file in map(Path, settings.choices):
        if loaded.tokenizer is None:
            raise ValueError(f"--choices {file} needs a tokenizer, and {model} has none; leave it out")
        found = evaluation.choices(
            loaded.model, loaded.tokenizer, evaluation.items_in(file, items), task=file.name.split(".")[0]
        )
        result["choices"].append(found.record())
    for task in settings.harness:
        tasks = evaluation.harness(loaded.model, loaded.tokenizer, task, items=items, progress=progress)
        result["harness"] += [one.record() for one in tasks]
    if settings.speed:
        batch = tests[0].batches[0] if tests else Batch(loaded.example.args, loaded.example.kwargs)
        result["speed"] = evaluation.speed({"model": loaded.model}, batch, progress=progress)["model"].record()
    return result
