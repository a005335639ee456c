"""Calls from Python: what they are given, and their run folders, ``out=``: what is recorded, and how they resume."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Generator, nn

from regrow.api.inputs import (
    DeviceLike,
    Inputs,
    LossLike,
    ModelLike,
    Precision,
    choose_reading,
    explain_no_network,
    require_weights,
)
from regrow.core.axes import AxisGraph, Example
from regrow.core.axes.axis import to_example
from regrow.core.errors import InputError
from regrow.core.objectives import Objective, choose_objective
from regrow.core.progress import Progress, silent
from regrow.core.sources import (
    Source,
    device_of,
    generators_of,
    move_inputs,
    preserve_random_state,
    seed_generators,
)
from regrow.data.batch_forms import ReadOptions, are_targets
from regrow.data.batches import to_sources
from regrow.jobs.models import ModelSpec, attach_origin, load_model
from regrow.jobs.recording import UNRECORDED, ActiveRun, FolderRecorder
from regrow.nets import Loaded
from regrow.nets.devices import check_precision, choose_device
from regrow.nets.loaded import WeightFile
from regrow.reports import write_run_page
from regrow.store.building import describe_origin
from regrow.store.statistics import fingerprint
from regrow.streaming.opening import OpenedNetwork, open_network


@dataclass(frozen=True)
class Call:
    """The arguments that calls such as :func:`regrow.prune` share, with the meanings that they have there."""

    model: ModelLike
    data: object = None
    validation: object = None  # data on which quality is measured
    example: object = None  # the input with which the network is traced
    loss: LossLike = None
    tokenizer: Any = None
    batch_size: int = 32
    device: DeviceLike = None
    precision: Precision = "float32"
    axes: AxisGraph | None = None  # the network's, if known; their example then replaces ``example``
    out: str | Path | None = None  # the run folder to write; None: nothing is written
    generators: tuple[Generator, ...] = ()  # the random generators of the loaders in the data (``with_generators``)

    @property
    def name(self) -> str:
        """The network's name in the settings of a run: as given, or of a module that of its recorded build or class."""
        return describe_origin(self.model).name if isinstance(self.model, nn.Module) else str(self.model)

    def read(self, progress: Progress = silent) -> Inputs:
        """Load the network if it is named, move it to the device, read the data, and choose example and objective.

        The example is that of ``axes``, else the one given, that of the loaded network, or the first batch. A network
        that was given is itself moved. Raises InputError for what is no network, for data with a network without
        weights, for a precision that does not fit it, or without any input to run it with.
        """
        device = None if self.device is None else choose_device(self.device)
        model, tokenizer = self.model, self.tokenizer
        known_example: Example | None = None
        files: tuple[WeightFile, ...] = ()
        if isinstance(model, str | Path):
            loaded = load_model(ModelSpec(str(model), device=str(device or "cpu")), progress)
            model, files = attach_origin(loaded), loaded.files
            known_example = None if loaded.guessed else loaded.example
            tokenizer = tokenizer or loaded.tokenizer
        if not isinstance(model, nn.Module):
            raise InputError(explain_no_network(model, self.data))
        if self.data is not None:
            require_weights(model)
        check_precision(model, self.precision)
        model = model if device is None else model.to(device)
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        example = self.example if self.axes is None else self.axes.example
        known_example = known_example if example is None else to_example(example, model)
        reading = choose_reading(model, tokenizer, self.batch_size, known_example)
        sources, tests, objective = self._read_data(reading)
        where = ""
        if known_example is None:
            if not sources:
                raise InputError(
                    "there is no input to run the network with; give example=, for example "
                    "example=torch.ones(1, 3, 224, 224), or data"
                )
            first = sources[0].batches[0]
            named = {name: value for name, value in first.kwargs.items() if not are_targets(value)}
            known_example, where = Example(first.args, named), first.where
        if (device := device_of(model)).type != "meta":
            known_example = Example(
                move_inputs(known_example.args, device), move_inputs(dict(known_example.kwargs), device)
            )
        network = Loaded(model, tokenizer, known_example, describe_origin(model), files=files)
        return Inputs(network, sources, objective, tests, where)

    def open_files(self, memory: str) -> tuple[OpenedNetwork, Inputs]:
        """Open a network given by its name or path, without its weights, and read the data; InputError for a module.

        ``memory``: the user's limit such as ``"4GiB"``, used in the error text alone.
        """
        if not isinstance(self.model, str | Path):
            raise InputError(
                f"memory={memory!r} reads a network from its files, got a {type(self.model).__name__}; give the name "
                "of a model or a folder, or leave memory out"
            )
        opened = open_network(str(self.model))
        model, tokenizer = attach_origin(opened.loaded), self.tokenizer or opened.loaded.tokenizer
        sources, tests, objective = self._read_data(choose_reading(model, tokenizer, self.batch_size))
        network = Loaded(model, tokenizer, opened.loaded.example, describe_origin(model), files=opened.loaded.files)
        return opened, Inputs(network, sources, objective, tests)

    def describe_inputs(self, inputs: Inputs, weights: Callable[[], Sequence[float]]) -> dict[str, object] | None:
        """Return digests of data and weights for ``run.json``, as :meth:`describe_data`; ``None`` without a folder.

        ``inputs``: from :meth:`read`; ``weights`` returns a sum of each parameter, and is called only with a folder.
        """
        tests = () if inputs.evaluates_on_calibration else inputs.tests
        validation = (replace(test, name=f"validation {test.name}") for test in tests)
        return self.describe_data((*inputs.sources, *validation), weights, {})

    def _read_data(self, reading: ReadOptions) -> tuple[tuple[Source, ...], tuple[Source, ...], Objective | None]:
        """Return (sources, sources for validation, objective), read as ``reading`` says.

        Without validation data, the second is the same tuple as the first. The objective is ``None`` without data.
        """
        sources = tuple(to_sources(self.data, reading))
        tests = sources if self.validation is None else tuple(to_sources(self.validation, reading))
        labelled = next((source.batches[0] for source in (*sources[:1], *tests[:1])), None)
        return sources, tests, choose_objective(self.loss, labelled) if labelled is not None else None

    def with_generators(self, **data: object) -> "Call":
        """Return this call with the random generators of loaders in ``data`` (argument → value); without out, itself.

        Raise InputError, with ``out``, for an iterator in the data, which a resumed run could not read again.
        """
        if self.out is None:
            return self
        generators: list[Generator] = []
        for name, value in data.items():
            for part in _walk(value):
                if isinstance(part, Iterator):
                    raise InputError(
                        f"out= resumes an interrupted call, and a {type(part).__name__} in {name} can be read only "
                        "once; give a list, a data set or a DataLoader"
                    )
                generators += generators_of(part)
        return replace(self, generators=tuple(generators))

    def start_run(self, verb: str, progress: Progress, changed: nn.Module | None = None) -> ActiveRun:
        """Return the run to carry out, recorded in ``out`` if that is given; nothing is written yet.

        ``verb``: the name of the function, such as ``"prune"``; ``changed``: the network whose class names the run,
        instead of ``model``.
        """
        if self.out is None:
            return ActiveRun(UNRECORDED, progress=progress)
        model = self.model if changed is None else changed
        name = str(model) if isinstance(model, str | Path) else f"{type(model).__name__}()"
        command = f"regrow.{verb}(…, out={str(self.out)!r}) in Python"
        return ActiveRun(FolderRecorder(self.out, name, command, write_page=write_run_page), progress=progress)

    def describe_data(
        self, sources: Iterable[Source], weights: Callable[[], Sequence[float]], arguments: Mapping[str, object]
    ) -> dict[str, object] | None:
        """Return what a result depends on besides settings, as JSON data for ``run.json``; ``None`` without a folder.

        Of each source that is a digest of its first batch, which tells most data apart without reading all;
        ``weights`` returns a sum of each parameter; ``arguments``: further entries, added as they are. The state of
        every random generator is afterwards what it was before: a folder changes no result.
        """
        if self.out is None:
            return None
        with preserve_random_state(self.generators):
            seed_generators()
            data = {source.name: fingerprint(Source(source.name, list(islice(source, 1)))) for source in sources}
        return {"data": data, "loss": describe_argument(self.loss), **arguments, "weights": digest_repr(weights())}


def digest_repr(value: object) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a value's ``repr``, such as of numbers or JSON text."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def describe_argument(value: object) -> str:
    """Return what a run records of an argument that may be a function: its text without address; ``None``: empty.

    >>> from functools import partial
    >>> describe_argument(None), describe_argument("regression"), describe_argument(partial(round, ndigits=2))
    ('', 'regression', 'functools.partial(<built-in function round>, ndigits=2)')
    """
    return "" if value is None else re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _walk(value: object) -> Iterator[object]:
    """Yield a value itself, then, of lists, tuples and mappings, the values in them, at any depth; not the keys."""
    yield value
    if isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _walk(part)
