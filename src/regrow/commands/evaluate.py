"""Evaluating a model by name, with everything that was asked for in one record."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from regrow import evaluation, store
from regrow.axes import Example
from regrow.commands.checks import EVALUATE, check_numbers
from regrow.commands.example_inputs import input_of
from regrow.commands.inputs import sources_of
from regrow.commands.prune import DTYPES, Settings, load_model
from regrow.commands.record import RUN, read_run
from regrow.nets import Loaded, ModelError
from regrow.nets.code import called, check_code, imported
from regrow.nets.examples import read_shape, shaped_example
from regrow.nets.files import check_files
from regrow.progress import Progress, silent
from regrow.sources import Batch


def evaluated(
    model: str,
    *,
    sources: Sequence[str] = (),
    choices: Sequence[Path] = (),
    harness: Sequence[str] = (),
    items: int = 200,
    speed: bool = False,
    eval_tokens: int = 2048,
    seq_len: int = 256,
    dtype: str = "",
    device: str = "cpu",
    code: str = "",
    input: str = "",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Evaluate a run folder, or any model that can be loaded by name.

    Args:
        model: A run folder or a name.
        sources: Kinds of text or images; their evaluation half is used.
        choices: Files of multiple-choice items.
        harness: Tasks of lm-eval by name, or files of items for it to run.
        items: How many items of each file and task.
        speed: Whether to time a forward pass.
        eval_tokens: Tokens (or images) per source.
        seq_len: Tokens per window.
        dtype: What the model is loaded in; as stored, unless given.
        device: Where it runs.
        code: The function ``pkg.mod:fn`` that builds the network of the folder, where the user's own code does.
        input: The shape of the input, like ``1x3x32x32``, unless the run or its sources say it.
        progress: Called as work goes on.

    Returns:
        ``size``, ``perplexity``, ``accuracy``, ``choices``, ``harness`` and ``speed``, as JSON data.

    Raises:
        ValueError: If the model or a source cannot be used.
    """
    check_numbers({"items": items, "eval_tokens": eval_tokens, "seq_len": seq_len}, EVALUATE)
    where: dict[str, Any] = {"dtype": dtype, "device": device, "input": input}
    settings = Settings(model, unseen=tuple(sources), eval_tokens=eval_tokens, seq_len=seq_len, **where)
    loaded = loaded_from(settings, progress, code)
    tests = sources_of(settings, loaded).evaluation
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
    for file in choices:
        if loaded.tokenizer is None:
            raise ValueError(f"--choices {file} needs a tokenizer, and {model} has none; leave it out")
        found = evaluation.choices(
            loaded.model, loaded.tokenizer, evaluation.items_in(file, items), task=file.name.split(".")[0]
        )
        result["choices"].append(found.record())
    for task in harness:
        tasks = evaluation.harness(loaded.model, loaded.tokenizer, task, items=items, progress=progress)
        result["harness"] += [one.record() for one in tasks]
    if speed:
        batch = tests[0].batches[0] if tests else Batch(loaded.example.args, loaded.example.kwargs)
        result["speed"] = evaluation.speed({"model": loaded.model}, batch, progress=progress)["model"].record()
    return result


def loaded_from(settings: Settings, progress: Progress = silent, code: str = "") -> Loaded:
    """The model of a run folder, or a model by name.

    Args:
        settings: ``model``, ``dtype``, ``device``, ``input`` and ``unseen`` count.
        progress: Called as work goes on.
        code: The function ``pkg.mod:fn`` that builds the network of the folder, where the user's own code does: a
            recorded name is never imported.

    Raises:
        ValueError: If it cannot be loaded, or ``code`` is missing or not needed.
    """
    folder = Path(settings.model)
    if not (folder / store.SHAPES).is_file():
        check_code(settings.model, False, code)
        return load_model(settings, progress)
    settings.check()
    check_files(folder)
    recorded = store.read_shapes(folder).origin
    try:
        check_code(recorded.reference, recorded.kind == "callable", code)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    builder = imported(code) if code else None
    own, example = called(builder, code) if builder else (None, None)
    net = store.load(folder, model=own, device=settings.device, dtype=DTYPES.get(settings.dtype))
    tokenizer: Any = getattr(net, "tokenizer", None)
    origin = replace(recorded, name=folder.name, builder=builder)
    if settings.input:
        example = shaped_example(net, read_shape(settings.input))
    if example is None:
        run = read_run(folder) if (folder / RUN).is_file() else {}
        example = input_of(net, origin, run, settings.unseen, tokenizer)
    return Loaded(net, tokenizer, _on(example, settings.device), origin)


def _on(example: Example, device: str) -> Example:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return Example(tuple(map(moved, example.args)), {key: moved(value) for key, value in example.kwargs.items()})
