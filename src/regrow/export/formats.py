"""The formats by name."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.commands.models import ModelSpec, load_model_or_run
from regrow.export.written import ExportError, Written
from regrow.progress import Progress, silent
from regrow.store.outputs import check_output


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        dtypes: What weights can be stored in; the first unless told.
        suffix: How its files end; empty where it is a folder.
        takes: What its writer takes beside that: an ``example`` input, whether with a ``cache`` of keys and values.
    """

    dtypes: tuple[str, ...]
    suffix: str = ""
    takes: tuple[str, ...] = ()


FORMATS: Mapping[str, Format] = {
    "transformers": Format(("", "float32", "bfloat16", "float16")),
    "gguf": Format(("f16", "f32", "bf16", "q8_0", "q6_k"), ".gguf"),
    "onnx": Format(("float32", "int8"), ".onnx", ("example", "cache")),
    "torchvision": Format(("",)),
}
"""What :func:`export_model` writes; each in the module of its name."""


def export_model(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    dtype: str = "",
    cache: bool = False,
    code: str = "",
    input: str = "",
    progress: Progress = silent,
) -> Written:
    """Hand a network to other tools, and check that they read what it says.

    Args:
        model: A run folder, or anything that ``regrow prune`` takes.
        to: ``"transformers"``, ``"gguf"``, ``"onnx"`` or ``"torchvision"``.
        out: The file or folder to write.
        dtype: What weights are stored in: one of ``FORMATS[to].dtypes``; the first, unless given.
        cache: For ``"onnx"``: a graph that takes and gives keys and values, for generating text.
        code: The function ``pkg.mod:fn`` that builds the network of the folder, where the user's own code does.
        input: The shape of the input that the result is checked with, like ``1x3x32x32``.
        progress: Called as work goes on.

    Returns:
        What was written and how it was checked.

    Raises:
        ExportError: If there is no such format or dtype, the format cannot hold the network, or what is read back
            says something else.
        ValueError: If the model cannot be loaded or the disk is full.
    """
    if to not in FORMATS:
        raise ExportError(f"there is no format {to!r}; known: {', '.join(FORMATS)}")
    form, out = FORMATS[to], Path(out)
    dtype = dtype or form.dtypes[0]
    if dtype not in form.dtypes:
        raise ExportError(f"{to} does not store {dtype!r}; it stores {', '.join(filter(None, form.dtypes))}")
    if cache and "cache" not in form.takes:
        raise ExportError(f"{to} has no graph with a cache to choose; cache is for onnx")
    if form.suffix and out.is_dir():
        raise ExportError(f"{out} is a folder; name a file, for example {out / f'model{form.suffix}'}")
    if out.exists() and out.resolve() == Path(model).resolve():
        raise ExportError(f"{out} is the model itself; name another place")
    if form.suffix:
        check_output(out, (form.suffix,), [model])
    progress(0, 1, "loading the model")
    loaded = load_model_or_run(ModelSpec(str(model), input=input), progress, code)
    net: Any = loaded.model
    for name, value in (("origin", loaded.origin), ("tokenizer", loaded.tokenizer)):
        if value is not None and not hasattr(net, name):
            setattr(net, name, value)
    writer = importlib.import_module(f"regrow.export.{to}")
    more = {"example": loaded.example, "cache": cache}
    taken = {name: value for name, value in more.items() if name in form.takes}
    written: Written = writer.write(net, out, dtype=dtype, progress=progress, **taken)
    return written
