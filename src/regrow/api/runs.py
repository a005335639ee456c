"""Run folders of calls from Python, ``out=``: what a run records, and how the same call resumes it."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regrow import store
from regrow.api.inputs import Inputs
from regrow.axes import AxisGraph, Example
from regrow.axes.inventory import inventory
from regrow.commands.calibration import parameter_sums
from regrow.commands.example_inputs import record_input
from regrow.commands.measuring import measure
from regrow.commands.parents import describe_stage, start_from
from regrow.commands.trackers import check_tracker, tracking
from regrow.errors import InputError
from regrow.nets import Loaded
from regrow.reports import ReportError, write_page
from regrow.run_folder import RunFolder
from regrow.settings.declaration import record_settings
from regrow.sources import Source
from regrow.store.errors import StoreError
from regrow.store.origins import describe_origin
from regrow.store.statistics import fingerprint

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PAGE = "report.html"


@dataclass(frozen=True)
class Destination:
    """Where a call of the Python interface writes its run.

    Args:
        out: The run folder: new, empty, or of this very call, which then resumes; ``None``: nothing is written.
        track: The name of a tracker that gets every measurement, too; empty: none.
        checkpoint: A file to resume from, which is for calls without a folder.
    """

    out: str | Path | None = None
    track: str = ""
    checkpoint: str | Path | None = None

    def checked(self, **data: object) -> "Destination":
        """Return this destination; raise an error, before anything is loaded, unless a call can be written and resumed.

        Args:
            **data: The data that it is given, by the name of the argument.

        Raises:
            InputError: If ``track`` is given without ``out`` or ``checkpoint`` with it, or data can be read only once.
            StoreError: If the folder holds something else.
        """
        if self.out is None:
            if self.track:
                raise InputError(f"track={self.track!r} follows a run in a folder; give out=, for example out='runs/a'")
            return self
        if self.checkpoint is not None:
            raise InputError(f"{self.out} has a checkpoint of its own; leave out checkpoint={str(self.checkpoint)!r}")
        check_tracker(self.track, self.out)
        for name, value in data.items():
            if once := next((one for one in _parts(value) if isinstance(one, Iterator)), None):
                raise InputError(
                    f"out= resumes an interrupted call, and a {type(once).__name__} in {name} can be read only once; "
                    "give a list, a data set or a DataLoader"
                )
        return self

    def begun(self) -> Path | None:
        """Return the folder with the files of the interrupted run, if there is one."""
        folder = RunFolder.open_unfinished(self.out) if self.out is not None else None
        return folder.path if folder else None


@contextmanager
def run_of(
    destination: Destination,
    verb: str,
    settings: "DataclassInstance",
    model: object,
    loaded: Loaded,
    **inputs: object,
) -> Iterator[RunFolder]:
    """Begin or resume the run of a call, inside the ``with`` block; finish it with :func:`finish`.

    Args:
        destination: Where it is written.
        verb: The name of the function, which is also that of the command.
        settings: The settings of the command, as far as they say what the call does.
        model: The network as it was given: a module, or the name of a model.
        loaded: The network before the run.
        **inputs: Everything else that the result depends on, as JSON data; the weights are added.

    Raises:
        StoreError: If the folder holds something else, this run finished, or a run with other inputs or weights.
    """
    out = destination.out
    assert out is not None
    given = {**inputs, "weights": digest(parameter_sums(loaded.model))}
    command = f"regrow.{verb}(…, out={str(out)!r}) in Python"
    begun = RunFolder.create(out, verb=verb, settings=record_settings(settings), command=command)
    with tracking(begun, destination.track) as folder:
        recorded = folder.run().get("python")
        if recorded is None:
            folder.update(python=given)
        elif other := [name for name in {**given, **recorded} if given.get(name) != recorded.get(name)]:
            raise StoreError(
                f"{out} holds another run ({other[0]} differ; is a seed missing?); choose another folder, or delete it"
            )
        name = str(model) if isinstance(model, str | Path) else f"{type(model).__name__}()"
        start_from(folder, name, loaded)
        folder.update(notes=list(loaded.notes) or None, **record_input(loaded))
        yield folder


def finish(folder: RunFolder, loaded: Loaded, **seconds: float) -> RunFolder:
    """Save the network of a run, write its page, and complete it.

    Args:
        folder: The run.
        loaded: The network after the run.
        **seconds: Name of a stage → how long it took.

    Raises:
        StoreError: If the disk is full; the run can be resumed.
    """
    store.write_model(loaded, folder.path)
    return folder.finish(_write_page, seconds=seconds, stage=describe_stage(folder))


def loaded_of(inputs: Inputs) -> Loaded:
    """Return a network that was given, with what is needed to trace and save it.

    A single input is cut to two examples, since it is saved with the network.

    Args:
        inputs: The network, and what was read with it.
    """
    example = inputs.example
    if len(example.args) == 1 and not example.kwargs and isinstance(one := example.args[0], Tensor) and one.dim() > 1:
        example = Example((one[:2],))
    return Loaded(inputs.model, inputs.tokenizer, example, describe_origin(inputs.model))


def describe_data(sources: Sequence[Source]) -> dict[str, str]:
    """Return name of a source → a digest of its first batch, which tells most data apart without reading all.

    Args:
        sources: The sources.
    """
    return {source.name: fingerprint(Source(source.name, list(source.batches[:1]))) for source in sources}


def log_size(folder: RunFolder, loaded: Loaded, axes: AxisGraph, name: str) -> list[dict[str, Any]]:
    """Log the size of a network, and return the rows about its axes.

    Args:
        folder: The run.
        loaded: The network.
        axes: Its axes.
        name: What the rows call it: ``"dense"``, ``"pruned"``.
    """
    measure(folder, loaded, axes, (), frozenset(), name)
    return [row.record() for row in inventory(axes)]


def digest(value: object) -> str:
    """Return a short digest of JSON data.

    Args:
        value: The data.
    """
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def name_of(value: object) -> str:
    """Return what a run records of an argument that may be code: its text or number, or the name of a function.

    >>> name_of(None), name_of("regression"), name_of(len)
    ('', 'regression', 'len')

    Args:
        value: The argument.
    """
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else str(value)
    return str(getattr(value, "__qualname__", type(value).__name__))


def _parts(value: object) -> Iterator[object]:
    """Yield a value and, of lists, tuples and mappings, what is in them."""
    yield value
    if isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _parts(part)


def _write_page(folder: Path) -> None:
    """Write the report page; a run is complete without it if a package is missing."""
    try:
        write_page([folder], folder / PAGE)
    except StoreError:
        raise
    except ReportError as error:
        warnings.warn(f"no page was written: {error}", stacklevel=2)
