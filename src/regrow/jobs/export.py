"""Export a network, whether named on the command line or given in Python, to a format of other tools.

Packages that take long to import are imported by the functions that need them: the command line checks its words with
this module.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.core.amounts import format_bytes, parse_bytes
from regrow.core.errors import InputError
from regrow.core.process_memory import read_resident, reset_peak
from regrow.core.progress import Progress, silent
from regrow.settings.declaration import check_settings
from regrow.settings.export import FORMATS, Settings
from regrow.store.atomic import check_output

if TYPE_CHECKING:
    from torch import Tensor, nn

    from regrow.core.axes import Example
    from regrow.exporters import ExportResult
    from regrow.jobs.recording import Invocation
    from regrow.streaming.requirements import MemoryPlan

SPARE = 2**27
"""Bytes that the interpreter and the writer need besides one tensor: parts of it that are compared."""
COPIES = 2.5
"""The float32 copies of the largest tensor that there are at a time: its numbers, and what they become."""


@dataclass(frozen=True)
class ExportInputs:
    """What is exported."""

    model: "nn.Module"
    example: "Example | None" = None  # an input for the comparison; `None`: a guess
    # Name → parameter, where the network has none of their numbers; `None`: they are in the network
    weights: "Mapping[str, Tensor] | None" = None
    memory: "MemoryPlan | None" = None  # what the export needs of a limit of memory; `None`: there is none


def check_out(settings: Settings, out: Path) -> None:
    """Raise an error unless the file or folder may be written; loads nothing."""
    suffix = FORMATS[settings.to].suffix
    if suffix and out.is_dir():
        raise InputError(f"{out} is a folder; name a file, for example {out / f'model{suffix}'}")
    if settings.model and out.exists() and out.resolve() == Path(settings.model).resolve():
        raise InputError(f"{out} is the model itself; name another place")
    if suffix:
        check_output(out, (suffix,), [settings.model] if settings.model else [])


def carry_out(
    settings: Settings, inputs: Callable[[], ExportInputs], out: Path, *, progress: Progress = silent
) -> "ExportResult":
    """Write a network in a format of other tools, read it back, and compare it with the network."""
    check_settings(settings)
    check_out(settings, out)
    opened = inputs()
    write = importlib.import_module(f"regrow.exporters.{settings.to}").write
    values = {"dtype": settings.dtype, "example": opened.example, "weights": opened.weights}
    taken = FORMATS[settings.to].takes
    written: ExportResult = write(opened.model, out, progress=progress, **{name: values[name] for name in taken})
    if opened.memory is None:
        return written
    return replace(written, memory=opened.memory.record())


def open_named(settings: Settings, invocation: "Invocation") -> ExportInputs:
    """Open the network that settings name."""
    from regrow.jobs.models import ModelSpec, load_model, with_origin

    if invocation.memory:
        return _open_by_tensor(settings, invocation)
    invocation.progress(0, 1, "loading the model")
    loaded = load_model(ModelSpec(settings.model, input=settings.input), invocation.progress, invocation.code)
    return ExportInputs(with_origin(loaded), loaded.example)


def _open_by_tensor(settings: Settings, invocation: "Invocation") -> ExportInputs:
    """Open a model whose tensors are read one by one, and check that the memory is enough for that."""
    from regrow.jobs.models import with_origin
    from regrow.streaming.opening import open_network
    from regrow.streaming.requirements import MemoryPlan

    if "weights" not in FORMATS[settings.to].takes:
        able = ", ".join(name for name, form in FORMATS.items() if "weights" in form.takes)
        raise InputError(f"{settings.to} needs the whole network in memory; leave out --memory, or export to {able}")
    reset_peak()
    opened = open_network(settings.model)
    network, model = opened.network(), with_origin(opened.loaded)
    largest = int(4 * COPIES * max(parameter.numel() for parameter in model.parameters()))
    size = {key: network.weights.bytes_of(key) for key in network.weights.stored}
    block = max(sum(size[key] for key in block.names) for block in network.blocks)
    checked = sum(size[key] for key in network.outer) + block if opened.probe else 0
    needed = read_resident() + SPARE + max(largest, checked)
    plan = MemoryPlan(f"exporting {settings.model}", parse_bytes(invocation.memory), needed, needed)
    plan.check()
    opened.check_output()
    invocation.announce(f"memory: about {format_bytes(needed)} of {format_bytes(plan.limit)}, one tensor at a time")
    return ExportInputs(model, weights=opened.weights.parameters(), memory=plan)


def run(settings: Settings, invocation: "Invocation") -> "ExportResult":
    """Export the model that settings name, as ``regrow export`` does."""
    inputs = partial(open_named, settings, invocation)
    return carry_out(settings, inputs, Path(invocation.out), progress=invocation.progress)
