"""Export a network, whether named on the command line or given in Python, to a format of other tools.

Functions import packages that take long to import: the command line checks its words with this module.
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

# Bytes that the interpreter and the writer need besides one tensor: parts of it that are compared.
SPARE_BYTES = 2**27
# How many float32 copies of the largest tensor are in memory at a time: its numbers, and what they become.
FLOAT32_COPIES = 2.5


@dataclass(frozen=True)
class ExportInputs:
    """What is exported."""

    model: "nn.Module"
    example: "Example | None" = None  # an input for the comparison; `None`: a guess
    # Name → parameter, where the network has none of their numbers; `None`: they are in the network
    weights: "Mapping[str, Tensor] | None" = None
    memory: "MemoryPlan | None" = None  # what the export needs of a limit of memory; `None`: there is none


def check_out(settings: Settings, out: Path) -> None:
    """Raise InputError if ``out`` is the model, or a folder for a format of one file; loads nothing.

    For such a format, raise StoreError if ``out`` has no folder, or exists with another suffix or in a model.
    """
    suffix = FORMATS[settings.to].suffix
    if suffix and out.is_dir():
        raise InputError(f"{out} is a folder; name a file, for example {out / f'model{suffix}'}")
    if settings.model and out.exists() and out.resolve() == Path(settings.model).resolve():
        raise InputError(f"{out} is the model itself; name another place")
    if suffix:
        check_output(out, (suffix,), [settings.model] if settings.model else [])


def export_network(
    settings: Settings, open_inputs: Callable[[], ExportInputs], out: Path, *, progress: Progress = silent
) -> "ExportResult":
    """Write a network to ``out``, read it back and compare; return what was written.

    ``open_inputs``: called once, after settings and ``out`` are checked. Raises ExportError if the format cannot hold
    the network, or if what was read back differs.
    """
    from regrow.reports.card import write_card
    from regrow.store.building import describe_origin

    check_settings(settings)
    check_out(settings, out)
    opened = open_inputs()
    write = importlib.import_module(f"regrow.exporters.{settings.to}").write
    card = partial(write_card, source=settings.model, name=describe_origin(opened.model).name)
    values = {"dtype": settings.dtype, "example": opened.example, "weights": opened.weights, "card": card}
    arguments = FORMATS[settings.to].arguments
    written: ExportResult = write(opened.model, out, progress=progress, **{name: values[name] for name in arguments})
    if opened.memory is None:
        return written
    return replace(written, memory=opened.memory.record())


def open_named(settings: Settings, invocation: "Invocation") -> ExportInputs:
    """Load the network that settings name; with ``--memory`` without numbers, which ``weights`` reads one by one."""
    from regrow.jobs.models import ModelSpec, attach_origin, load_model

    if invocation.memory:
        return _open_by_tensor(settings, invocation)
    loaded = load_model(ModelSpec(settings.model, input=settings.input), invocation.progress, invocation.code)
    return ExportInputs(attach_origin(loaded), loaded.example)


def _open_by_tensor(settings: Settings, invocation: "Invocation") -> ExportInputs:
    """Open a model without numbers, whose tensors are read one by one, and announce the memory that takes.

    Raises InputError if the format needs all at once, and ResourceError if ``--memory`` is too low.
    """
    from regrow.jobs.models import attach_origin
    from regrow.streaming.opening import open_network
    from regrow.streaming.requirements import MemoryPlan

    if "weights" not in FORMATS[settings.to].arguments:
        able = ", ".join(name for name, form in FORMATS.items() if "weights" in form.arguments)
        raise InputError(f"{settings.to} needs the whole network in memory; leave out --memory, or export to {able}")
    reset_peak()
    opened = open_network(settings.model)
    network, model = opened.network(), attach_origin(opened.loaded)
    largest = int(4 * FLOAT32_COPIES * max(parameter.numel() for parameter in model.parameters()))
    sizes = {key: network.weights.bytes_of(key) for key in network.weights.stored}
    block = max(sum(sizes[key] for key in block.names) for block in network.blocks)
    check = sum(sizes[key] for key in network.outer) + block if opened.probe else 0  # of `check_output`
    needed = read_resident() + SPARE_BYTES + max(largest, check)
    plan = MemoryPlan(f"exporting {settings.model}", parse_bytes(invocation.memory), needed, needed)
    plan.check()
    opened.check_output()
    invocation.announce(f"memory: about {format_bytes(needed)} of {format_bytes(plan.limit)}, one tensor at a time")
    return ExportInputs(model, weights=opened.weights.parameters(), memory=plan)


def export_named(settings: Settings, invocation: "Invocation") -> "ExportResult":
    """Export the model that settings name, as ``regrow export`` does, and return what was written."""
    open_inputs = partial(open_named, settings, invocation)
    return export_network(settings, open_inputs, Path(invocation.out), progress=invocation.progress)
