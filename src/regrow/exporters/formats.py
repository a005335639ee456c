"""The export formats by name, and the functions that export a model to one of them."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.core.amounts import parse_bytes
from regrow.core.progress import Progress, silent
from regrow.exporters.written import ExportError, Written
from regrow.store.atomic import check_output

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regrow.core.axes import Example
    from regrow.nets import Loaded


SPARE = 2**27
"""Bytes that the interpreter and the writer need besides one tensor: parts of it that are compared."""
COPIES = 2.5
"""The float32 copies of the largest tensor that there are at a time: its numbers, and what they become."""


@dataclass(frozen=True)
class Format:
    """The properties of an export format.

    Args:
        dtypes: The dtypes in which weights can be stored; the first is the default.
        suffix: The suffix of its files; empty if it is a folder.
        takes: Further keyword arguments of its writer: ``example`` (an input), ``cache`` (whether the graph has a
            key-value cache), ``weights`` (parameters by name, read one by one).
    """

    dtypes: tuple[str, ...]
    suffix: str = ""
    takes: tuple[str, ...] = ()


FORMATS: Mapping[str, Format] = {
    "transformers": Format(("", "float32", "bfloat16", "float16"), takes=("example",)),
    "gguf": Format(("f16", "f32", "bf16", "q8_0", "q6_k"), ".gguf", ("weights",)),
    "onnx": Format(("float32", "int8"), ".onnx", ("example", "cache")),
    "torchvision": Format(("",)),
}
"""Format name → its properties; each is written by the module of its name."""


def check_export(model: str | Path | None, to: str, out: Path, *, dtype: str = "", cache: bool = False) -> str:
    """Raise an error unless there is such a format and its file may be written; loads nothing.

    Args:
        model: The name of the model, as :func:`export_model` takes it; ``None``: a network without one.
        to: The format.
        out: The file or folder to write.
        dtype: The dtype in which weights are stored; empty: the format's first.
        cache: Whether a key-value cache is wanted.

    Returns:
        The dtype.

    Raises:
        ExportError: If there is no such format or dtype, or ``out`` is the model or a folder instead of a file.
        StoreError: If the file may not be replaced.
    """
    if to not in FORMATS:
        raise ExportError(f"there is no format {to!r}; known: {', '.join(FORMATS)}")
    form = FORMATS[to]
    dtype = dtype or form.dtypes[0]
    if dtype not in form.dtypes:
        raise ExportError(f"{to} does not store {dtype!r}; it stores {', '.join(filter(None, form.dtypes))}")
    if cache and "cache" not in form.takes:
        raise ExportError(f"{to} has no graph with a cache to choose; cache is for onnx")
    if form.suffix and out.is_dir():
        raise ExportError(f"{out} is a folder; name a file, for example {out / f'model{form.suffix}'}")
    if model is not None and out.exists() and out.resolve() == Path(model).resolve():
        raise ExportError(f"{out} is the model itself; name another place")
    if form.suffix:
        check_output(out, (form.suffix,), [] if model is None else [model])
    return dtype


def write_export(
    net: "nn.Module",
    to: str,
    out: str | Path,
    *,
    dtype: str = "",
    cache: bool = False,
    example: "Example | None" = None,
    weights: "Mapping[str, Tensor] | None" = None,
    progress: Progress = silent,
) -> Written:
    """Export a network to a format of other tools, read it back, and compare it with the network.

    Args:
        net: The network, with its ``tokenizer`` and ``origin`` as :func:`regrow.load` sets them, where it has such.
        to: The format.
        out: The file or folder to write.
        dtype: The dtype in which weights are stored: one of ``FORMATS[to].dtypes``; the first if empty.
        cache: For ``"onnx"``: whether the graph takes and returns a key-value cache, for generating text.
        example: An input for the comparison; ``None``: a guess.
        weights: Name → parameter, where the network has none of their numbers; ``None``: they are in the network.
        progress: Called with (steps done, steps in all, description).

    Raises:
        ExportError: If there is no such format or dtype, the format cannot hold the network, or what is read back
            differs from the network.
    """
    out = Path(out)
    dtype = check_export(None, to, out, dtype=dtype, cache=cache)
    form = FORMATS[to]
    writer = importlib.import_module(f"regrow.exporters.{to}")
    more = {"example": example, "cache": cache, "weights": weights}
    taken = {name: value for name, value in more.items() if name in form.takes}
    written: Written = writer.write(net, out, dtype=dtype, progress=progress, **taken)
    return written


def export_model(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    dtype: str = "",
    cache: bool = False,
    example: "Example | None" = None,
    code: str = "",
    input: str = "",
    memory: str = "",
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> Written:
    """Export a model by name, as :func:`write_export` does a network; a bad format or file is refused before it loads.

    Args:
        model: A run folder, or any model name that ``regrow prune`` accepts.
        to: The format.
        out: The file or folder to write.
        dtype: The dtype in which weights are stored.
        cache: For ``"onnx"``: whether the graph takes and returns a key-value cache.
        example: An input for the comparison; ``None``: that of the model.
        code: The function ``pkg.mod:fn`` that builds the network of the folder, if that is the user's own code.
        input: The shape of the input for the comparison, like ``1x3x32x32``.
        memory: How much memory the export may use, such as ``4GiB``: tensors are then read one by one, for formats that
            are written so, with the same bytes. Empty: the model is loaded whole.
        announce: Called with one line that says what the export needs of that memory.
        progress: Called with (steps done, steps in all, description).

    Raises:
        ExportError: As :func:`write_export`.
        ValueError: If the model cannot be loaded or the disk is full.
    """
    from regrow.jobs.models import ModelSpec, load_model

    check_export(model, to, Path(out), dtype=dtype, cache=cache)
    if memory:
        return _export_each(model, to, out, dtype=dtype, memory=memory, announce=announce, progress=progress)
    progress(0, 1, "loading the model")
    loaded = load_model(ModelSpec(str(model), input=input), progress, code)
    _name_origin(loaded)
    given = loaded.example if example is None else example
    return write_export(loaded.model, to, out, dtype=dtype, cache=cache, example=given, progress=progress)


def _export_each(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    dtype: str,
    memory: str,
    announce: Callable[[str], None],
    progress: Progress,
) -> Written:
    """Export a model whose tensors are read one by one, and record the peak of memory beside the prediction."""
    from regrow.core.process_memory import read_resident, reset_peak
    from regrow.streaming.opening import open_network
    from regrow.streaming.requirements import MemoryTerms, record_peak

    if "weights" not in FORMATS[to].takes:
        able = ", ".join(name for name, form in FORMATS.items() if "weights" in form.takes)
        raise ExportError(f"{to} needs the whole network in memory; leave out --memory, or export to {able}")
    reset_peak()
    opened = open_network(str(model))
    network, loaded = opened.network(), opened.loaded
    _name_origin(loaded)
    largest = int(4 * COPIES * max(parameter.numel() for parameter in loaded.model.parameters()))
    size = {key: network.weights.bytes_of(key) for key in network.weights.stored}
    block = max(sum(size[key] for key in block.names) for block in network.blocks)
    checked = sum(size[key] for key in network.outer) + block if opened.probe else 0
    terms = {"the interpreter": read_resident() + SPARE, "one tensor at a time": max(largest, checked)}
    needs = MemoryTerms(parse_bytes(memory), terms)
    needs.check(f"exporting {model}")
    opened.check_output()
    announce(str(needs))
    weights = opened.weights.parameters()
    written = write_export(loaded.model, to, out, dtype=dtype, weights=weights, progress=progress)
    return replace(written, memory=record_peak(needs))


def _name_origin(loaded: "Loaded") -> None:
    """Hand the origin and the tokenizer of a model on to its network, where exporters find them."""
    for name, value in (("origin", loaded.origin), ("tokenizer", loaded.tokenizer)):
        if value is not None and not hasattr(loaded.model, name):
            setattr(loaded.model, name, value)
