"""Load the models that commands work on, by name or from a run folder."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regrow import nets, store
from regrow.core.axes import AxisGraph, Example
from regrow.core.progress import Progress, silent
from regrow.jobs.example_inputs import find_input, input_arguments
from regrow.nets import Loaded, ModelError
from regrow.nets.devices import choose_device
from regrow.nets.examples import read_shape, shaped_example
from regrow.nets.files import check_files
from regrow.nets.load import call_builder, check_code, import_builder
from regrow.nets.loaded import WeightFile
from regrow.nets.packaged import PACKAGED
from regrow.store import probe
from regrow.store.run_record import RUN, read_run
from regrow.streaming.opening import open_network
from regrow.tracing import trace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelSpec:
    """Which model is loaded, in which precision, and on which device.

    Args:
        name: A name that :func:`regrow.nets.load` takes, or a run folder.
        dtype: One of ``DTYPES``; empty: the stored precision.
        device: The device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        input: The shape of its input, like ``1x3x32x32``; empty: from the run, the model or the sources.
        sources: The run's sources, as ``--source`` takes them; image sources give the input size.
    """

    name: str
    dtype: str = ""
    device: str = "cpu"
    input: str = ""
    sources: tuple[str, ...] = ()


def load_model(spec: ModelSpec, progress: Progress = silent, code: str = "") -> Loaded:
    """Load the model of a run folder, or a model by name.

    Args:
        spec: Which model, and how.
        progress: Called with (steps done, steps in all, what is being done).
        code: The function ``pkg.mod:fn`` that builds the network of the folder, if that is the user's own code: a
            recorded name is never imported.

    Raises:
        ValueError: If it cannot be loaded, or ``code`` is missing or not needed.
    """
    device = choose_device(spec.device)
    folder = Path(spec.name)
    if not (folder / store.SHAPES).is_file():
        check_code(spec.name, False, code)
        given = input_arguments(spec.name, spec.input, spec.sources)
        return nets.load(spec.name, dtype=DTYPES.get(spec.dtype), device=device, **given, progress=progress)
    check_files(folder)
    shapes = store.read_shapes(folder)
    recorded = shapes.origin
    try:
        check_code(recorded.reference, recorded.kind == "callable", code)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    builder = import_builder(code) if code else None
    own, example = call_builder(builder, code) if builder else (None, None)
    stored = {folder / name: one.sha256 for name, one in shapes.files.items()}
    files = tuple(WeightFile(path, digest, held=True) for path, digest in stored.items() if path.is_file())
    net = store.load(folder, model=own, device=device, dtype=DTYPES.get(spec.dtype))
    tokenizer: Any = getattr(net, "tokenizer", None)
    origin = replace(recorded, name=folder.name, builder=builder)
    if spec.input:
        example = shaped_example(net, read_shape(spec.input))
    if example is None:
        run = read_run(folder) if (folder / RUN).is_file() else {}
        probed = partial(probe.read_example, folder / probe.FILE, net) if shapes.probe.file is not None else None
        example = find_input(net, origin, run, spec.sources, tokenizer, probed)
    return Loaded(net, tokenizer, _move_example(example, device), origin, files=files)


def with_origin(loaded: Loaded) -> torch.nn.Module:
    """Return the network of a loaded model with its ``origin`` and ``tokenizer``, as :func:`regrow.load` sets them."""
    for name, value in (("origin", loaded.origin), ("tokenizer", loaded.tokenizer)):
        if value is not None and not hasattr(loaded.model, name):
            setattr(loaded.model, name, value)
    return loaded.model


def trace_model(spec: ModelSpec, progress: Progress = silent, code: str = "") -> tuple[Loaded, AxisGraph]:
    """Return a model and its axes, without reading its weights where the folder says all shapes.

    The weights of transformers folders, of saved transformers models and of packaged models are not read: parameters
    are fake tensors. Other models are loaded.

    Args:
        spec: Which model, and how.
        progress: Called with (steps done, steps in all, what is being done).
        code: As for :func:`load_model`.

    Raises:
        ValueError: As :func:`load_model`.
    """
    if not code and not spec.input and (spec.name in PACKAGED or Path(spec.name).is_dir()):
        with suppress(ValueError):  # what cannot be opened so is loaded, or refused with the reason
            opened = open_network(spec.name, DTYPES.get(spec.dtype))
            return opened.loaded, opened.axes
    loaded = load_model(spec, progress, code)
    progress(0, 1, "tracing")
    return loaded, trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)


def _move_example(example: Example, device: torch.device) -> Example:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    return Example(tuple(map(moved, example.args)), {key: moved(value) for key, value in example.kwargs.items()})
