"""``regrow.search``: search the widths and candidate operations of a network for one of a given size."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regrow.api.call import Call, describe_argument
from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, Precision, choose_reading
from regrow.api.learn import OptimizerLike, find_objective, first_batch, with_optimizer
from regrow.core.amounts import Target, parse_share
from regrow.core.axes import AxisGraph, Example
from regrow.core.errors import InputError
from regrow.core.progress import Progress, silent
from regrow.core.sources import Source, preserve_random_state
from regrow.core.tasks import ExampleSet, ExamplesView, Task
from regrow.data.datasets import fix_order, to_examples
from regrow.jobs.progress_bar import ensure_progress
from regrow.jobs.recording import ActiveRun
from regrow.jobs.search import SearchResult, search_network
from regrow.jobs.search_inputs import HELD_OUT, SearchData, SearchInputs, check_epochs, make_schedule
from regrow.settings.search import Settings
from regrow.store.statistics import parameter_sums


def search(
    model: ModelLike,
    data: Any,
    *,
    target: str | Target = "",
    smaller: str | float | None = None,
    validation: Any = None,
    test: Any = None,
    method: str = "mgas",
    settings: Mapping[str, Any] | None = None,
    round_to: int = 1,
    loss: LossLike = None,
    epochs: int = 10,
    batch_size: int = 64,
    optimizer: OptimizerLike = "sgd",
    lr: float = 0.01,
    weight_decay: float = 0.0,
    device: DeviceLike = None,
    precision: Precision = "float32",
    seed: int = 0,
    example: Any = None,
    axes: AxisGraph | None = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> SearchResult:
    """Search a network for the widths and operations that serve its loss best within a target size.

    It is trained from the weights that it has, while what matters least is removed: units of free axes, operations of
    :class:`regrow.Candidates` or else residual blocks, single weights (``nonzero``). At last BatchNorms are measured.

    Args:
        model: The network, changed in place; or a model's name or a run folder.
        data: The training data with labels, as for :func:`regrow.prune`.
        target: The largest allowed size: ``"params=1M"``, ``"macs=2G"`` (of one example), ``"bytes=200M"``,
            ``"nonzero=50k"``, ``"ms=12"`` (a batch on this device); or a share of what it has, ``"macs=50%"``.
        smaller: The share of all parameters that is removed: ``"30%"`` or 0.3 is the target ``"params=70%"``.
        validation: Data for scores and decisions of ``trials``; ``None``: a fifth of ``data`` (read in unless indexed).
        test: With ``out``: data on which the found network is tested once; recorded if the score is between 0 and 1.
        method: One of ``regrow.methods.SEARCHERS``.
        settings: Settings that differ from the method's defaults; images are shifted and mirrored by ``augment=True``.
        round_to: Widths that change are multiples of this number where an axis has that many units.
        loss: The loss, as for :func:`regrow.prune`.
        epochs: Passes over the data; 0 for methods that do not train.
        batch_size: Examples per step.
        optimizer: As for :func:`regrow.learn`.
        lr: Learning rate of the network's parameters.
        weight_decay: Weight decay.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"``: forward passes compute in it, as for :func:`regrow.prune`.
        seed: Seed of the order of examples and of everything random.
        example: The input with which the network is traced; ``None``: two examples of the data.
        axes: The network's axes, if they are known; it is then not traced.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        progress: Called with (steps done, steps in all, what is being done).

    Returns:
        The result: its ``model`` (the network itself, or the one that was loaded), ``axes``, ``plans``, ``size`` and
        ``target`` in units of ``measure``, and ``score`` on the validation data, higher is better.

    Raises:
        ValueError: If the method or a setting is unknown, the target cannot be met, or the data have no labels.

    >>> from torch import nn
    >>> inputs, net = torch.randn(80, 6), nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> result = search(net, (inputs, (inputs[:, 0] > 0).long()), smaller="50%", epochs=8)
    >>> result.size <= result.target, result.model[0].out_features < 32
    (True, True)
    """
    call = Call(model, data, validation, example, loss, tokenizer, batch_size, device, axes=axes, out=out)
    call = call.with_generators(data=data, validation=validation, test=test)
    config = Settings(
        call.name, "data", _format_target(target, smaller), method=method, method_settings=dict(settings or {})
    )
    config = replace(config, epochs=epochs, retrain=0, round_to=round_to, batch_size=batch_size, lr=lr, seed=seed)
    config = replace(config, weight_decay=weight_decay, precision=precision)
    with preserve_random_state(), ensure_progress(progress) as bar:
        open_inputs = partial(_open_inputs, call, test, config, optimizer)
        return search_network(config, open_inputs, call.start_run("search", bar))


def _open_inputs(call: Call, test: object, config: Settings, optimizer: OptimizerLike, run: ActiveRun) -> SearchInputs:
    """Load the network if it is named, trace it, and split the data into those to train, to validate and to test on.

    ``test``: the data to test on, or ``None``; ``call`` has the others.
    """
    example = Example() if call.example is None else call.example  # empty: the data are read below
    net = replace(call, data=None, validation=None, example=example, axes=None).read(run.progress)
    if note := check_epochs(config, net.model):
        warnings.warn(note, stacklevel=4)
    task, test_examples = _read_task(net, (call.data, call.validation, test), config.batch_size, config.seed)
    first = first_batch(task)
    objective = find_objective(net.model, call.loss, first)
    schedule = with_optimizer(make_schedule(config, objective, config.epochs), optimizer)
    inputs = net.with_example(first) if call.example is None else net
    loaded = inputs.for_saving()
    both = {"data": task, "validation": replace(task, train=task.test)}
    recorded = call.describe_data(
        (Source(name, [first_batch(part)]) for name, part in both.items()),
        partial(parameter_sums, net.model),
        {"optimizer": describe_argument(optimizer)},
    )
    return SearchInputs(
        net.model,
        loaded.origin,
        inputs.trace() if call.axes is None else call.axes,
        SearchData(task, task, test_examples, objective=objective),
        schedule,
        loaded,
        in_place=True,
        python_call=recorded,
    )


def _format_target(target: str | Target, smaller: str | float | None) -> str:
    """Return ``target`` as text, or ``"params=70%"`` for ``smaller="30%"``; InputError unless exactly one is given."""
    if bool(target) == (smaller is not None):
        got = f"target={target!s} and smaller={smaller}" if target else "neither"
        raise InputError(f'give one of target= and smaller=, got {got}; for example smaller="30%"')
    return str(target) if smaller is None else str(Target.smaller(parse_share(str(smaller))))


def _read_task(net: Inputs, data: tuple[Any, Any, Any], batch_size: int, seed: int) -> tuple[Task, ExampleSet | None]:
    """Return the task to train on, whose test examples are for validation, and the examples to test on, if any.

    ``data``: (training, validation, test), the last two may be ``None``; without data for validation, a fifth of the
    training data, chosen by ``seed``, is held out.
    """
    reading = choose_reading(net.model, net.loaded.tokenizer, batch_size, net.loaded.example)
    train_data, validation_data, test_data = data
    train = to_examples(train_data, reading)
    validation = None if validation_data is None else to_examples(validation_data, reading)
    if validation is None:
        train = fix_order(train)
        n, held_out = len(train), max(1, round(HELD_OUT * len(train)))
        if n - held_out < 2:
            raise InputError(f"{n} examples leave {n - held_out} to learn from; give more data, or validation=")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        validation, train = (train.subset(part.sort()[0]) for part in order.split([held_out, n - held_out]))
    task = Task("search", ExamplesView(train, most=batch_size), ExamplesView(validation, most=batch_size), ())
    return task, None if test_data is None else ExamplesView(to_examples(test_data, reading), most=batch_size)
