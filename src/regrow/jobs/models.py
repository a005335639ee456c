"""Load the models that commands work on, by name or from a run folder, and choose the input to trace them with."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from regrow import nets, store
from regrow.core.axes import AxisGraph, Example
from regrow.core.limits import expanded
from regrow.core.progress import Progress, silent
from regrow.core.sources import move_inputs
from regrow.data.vision import find_common_side
from regrow.nets import Loaded, ModelError, Origin
from regrow.nets.devices import choose_device
from regrow.nets.files import check_regular_files
from regrow.nets.load import call_builder, check_code, import_builder
from regrow.nets.loaded import (
    WeightFile,
    format_shape,
    guess_example,
    image_example,
    log_guess,
    read_shape,
    shaped_example,
    text_example,
)
from regrow.nets.packaged import PACKAGED
from regrow.store import models, probe
from regrow.store.run_record import RUN, read_run
from regrow.streaming.opening import open_network
from regrow.tracing import trace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class ModelSpec:
    """Which model is loaded, in which precision, and on which device."""

    name: str  # a folder, or what `regrow.nets.load` takes
    dtype: str = ""  # one of `DTYPES`; empty: the stored precision
    device: str = "cpu"
    input: str = ""  # the shape of its input, like `1x3x32x32`; empty: from the run, the model or the sources
    sources: tuple[str, ...] = ()  # the run's sources, as `--source` takes them; image sources give the input size


def load_model(spec: ModelSpec, progress: Progress = silent, code: str = "") -> Loaded:
    """Load the model of a run folder, or a model by name, in eval mode on its device.

    ``code``: the user's function that builds it, as ``MODULE:FUNCTION``; empty: none. Raises ModelError if the model is
    unknown, or a folder needs ``code`` that is not given.
    """
    progress(0, 1, f"loading {spec.name}")
    device, dtype, folder = choose_device(spec.device), DTYPES.get(spec.dtype), Path(spec.name)
    if not (folder / store.SHAPES).is_file():
        check_code(spec.name, False, code)
        shape = read_shape(spec.input) if spec.input else None
        pixels = 0 if spec.input or folder.exists() else find_image_side(spec.sources)
        return nets.load(spec.name, dtype=dtype, device=device, example=shape, pixels=pixels, progress=progress)
    check_regular_files(folder)
    shapes = store.read_shapes(folder)
    try:
        check_code(shapes.origin.reference, shapes.origin.kind == "callable", code)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    builder = import_builder(code) if code else None
    built, own_example = call_builder(builder, code) if builder else (None, None)
    paths = (folder / name for name in shapes.files)
    files = tuple(WeightFile(path, held=True) for path in paths if path.is_file())
    model = store.load(folder, model=built, device=device, dtype=dtype)
    origin = replace(shapes.origin, name=folder.name, builder=builder)
    if spec.input:
        own_example = shaped_example(model, read_shape(spec.input))
    has_probe = bool(shapes.probe.header)
    example = own_example or _find_example(model, origin, folder, spec.sources, has_probe=has_probe)
    example = Example(move_inputs(example.args, device), move_inputs(dict(example.kwargs), device))
    return Loaded(model, getattr(model, "tokenizer", None), example, origin, files=files)


def attach_origin(loaded: Loaded) -> torch.nn.Module:
    """Set ``origin`` and ``tokenizer`` as attributes of a network that lacks them, as regrow.load does; return it."""
    models.attach_origin(loaded.model, loaded.origin, loaded.tokenizer)
    return loaded.model


def trace_model(spec: ModelSpec, progress: Progress = silent, code: str = "") -> tuple[Loaded, AxisGraph]:
    """Return a model and its axes, where possible without reading weights: parameters are then fake tensors.

    That holds for folders of transformers, saved transformers models and packaged models, unless ``code`` or an input
    shape is given. Other models are loaded; arguments and errors are those of :func:`load_model`.
    """
    progress(0, 1, "tracing")
    if not code and not spec.input and (spec.name in PACKAGED or Path(spec.name).is_dir()):
        with suppress(ValueError):  # what cannot be opened so is loaded, or refused with the reason
            opened = open_network(spec.name, DTYPES.get(spec.dtype))
            return opened.loaded, opened.axes
    loaded = load_model(spec, progress, code)
    progress(0, 1, "tracing")
    return loaded, trace_loaded(loaded)


def find_input_shape(loaded: Loaded) -> torch.Size:
    """Return the shape, batch included, of the first positional tensor of a network's example; empty without one."""
    return next((arg.shape for arg in loaded.example.args if isinstance(arg, torch.Tensor)), torch.Size())


def trace_loaded(loaded: Loaded) -> AxisGraph:
    """Return the axes of a network, traced with its own example."""
    return trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)


def find_image_side(sources: Sequence[str]) -> int:
    """Return the side in pixels of the images of the first source with square images of one size; 0 if none has.

    ``sources``: as ``--source`` takes them; those that are not ``digits`` or ``NAME=FOLDER`` have none.

    >>> find_image_side(["digits"]), find_image_side(["news"])
    (8, 0)
    """
    for spec in sources:
        _, _, path = spec.partition("=")
        if spec == "digits":
            return 8
        if path and (side := find_common_side(expanded(Path(path)))):
            return side
    return 0


def describe_input(loaded: Loaded) -> dict[str, str]:
    """Return, say, ``{"input": "1x3x8x8"}`` for ``run.json``; ``{}`` for text, and if no single shape describes it."""
    shape = format_shape(loaded.example)
    return {"input": shape} if loaded.tokenizer is None and shape and "," not in shape else {}


def _find_example(model: nn.Module, origin: Origin, folder: Path, sources: Sequence[str], has_probe: bool) -> Example:
    """Return an example input for the network of a run folder, guessed and logged if need be, or raise ModelError.

    ``sources``: as ``--source`` takes them, for the size of images; ``has_probe``: whether the folder has the input
    with which the network was saved.
    """
    run = read_run(folder) if (folder / RUN).is_file() else {}
    if (tokenizer := getattr(model, "tokenizer", None)) is not None:
        return text_example(model, len(tokenizer))
    if isinstance(recorded := run.get("input"), str):
        return shaped_example(model, read_shape(recorded))
    if origin.input_shape:
        return image_example(model, *origin.input_shape)
    pixels = find_image_side(sources)
    if has_probe and not pixels:
        return probe.read_example(folder / probe.FILE, model)
    if (guess := guess_example(model, pixels)) is None:
        raise ModelError(f"{origin.name}: the model does not say what input it takes; give --input 1x3x32x32")
    if not pixels:
        log_guess(guess)
    return guess
