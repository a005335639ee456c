"""Run folders of calls from Python, ``out=``: what a run records, and how the same call resumes it."""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import CodeType, FunctionType

from torch import Generator, Tensor

from regrow.api.inputs import Inputs
from regrow.core.axes import Example
from regrow.core.errors import InputError
from regrow.core.sources import Source, generators_of, preserve_random_state, seed_generators
from regrow.data.batches import INPUTS
from regrow.jobs.recording import FolderRecorder, Recorder, Unrecorded
from regrow.jobs.trackers import check_tracker
from regrow.nets import Loaded
from regrow.reports import ReportError, write_page
from regrow.store.building import describe_origin
from regrow.store.errors import StoreError
from regrow.store.statistics import fingerprint

PAGE = "report.html"


@dataclass(frozen=True)
class Destination:
    """Where a call of the Python interface writes its run.

    Args:
        out: The run folder: new, empty, or of this very call, which then resumes; ``None``: nothing is written.
        track: The name of a tracker that gets every measurement, too; empty: none.
        checkpoint: A file to resume from, which is for calls without a folder.
        generators: The random generators of the loaders that are given.
    """

    out: str | Path | None = None
    track: str = ""
    checkpoint: str | Path | None = None
    generators: tuple[Generator, ...] = ()

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
        generators: list[Generator] = []
        for name, value in data.items():
            if once := next((one for one in _parts(value) if isinstance(one, Iterator)), None):
                raise InputError(
                    f"out= resumes an interrupted call, and a {type(once).__name__} in {name} can be read only once; "
                    "give a list, a data set or a DataLoader"
                )
            generators += (found for one in _parts(value) for found in generators_of(one))
        return replace(self, generators=tuple(generators))

    def recorder(self, verb: str, model: object) -> Recorder:
        """Return where the run of a call is recorded.

        Args:
            verb: The name of the function, which is also that of the command.
            model: The network as it was given: a module, or the name of a model.
        """
        if self.out is None:
            return Unrecorded()
        name = str(model) if isinstance(model, str | Path) else f"{type(model).__name__}()"
        command = f"regrow.{verb}(…, out={str(self.out)!r}) in Python"
        return FolderRecorder(self.out, name, command, self.track, write_page=_write_page)

    def record(
        self, sources: Iterable[Source], loss: object, weights: Callable[[], Sequence[float]], **arguments: object
    ) -> dict[str, object] | None:
        """Return what the result of a call depends on besides settings, as JSON data; ``None`` without a folder.

        Of each source that is a digest of its first batch, which tells most data apart without reading all. The state
        of every random generator is afterwards what it was before: a folder changes no result.

        Args:
            sources: The sources, which may be read while they are iterated.
            loss: The loss, as it was given.
            weights: Returns a sum of each parameter.
            **arguments: Other arguments of the call, as JSON data.
        """
        if self.out is None:
            return None
        with preserve_random_state(*self.generators):
            seed_generators()
            data = {source.name: fingerprint(Source(source.name, list(islice(source, 1)))) for source in sources}
        return {"data": data, "loss": name_of(loss), **arguments, "weights": digest(weights())}


def record_call(
    destination: Destination, inputs: Inputs, loss: object, weights: Callable[[], Sequence[float]]
) -> dict[str, object] | None:
    """Return what the result of a call depends on besides settings, as :meth:`Destination.record` does of its data."""
    tests = () if inputs.tests is inputs.sources else inputs.tests
    validation = (replace(test, name=f"validation {test.name}") for test in tests)
    return destination.record((*inputs.sources, *validation), loss, weights)


def loaded_of(inputs: Inputs) -> Loaded:
    """Return a network that was given, with what is needed to trace and save it.

    The example is saved with the network, and cut to two examples where its first dimension is that of the batch: that
    of a single tensor, and of inputs by the names that transformers uses.

    Args:
        inputs: The network, and what was read with it.
    """
    example, origin = _two_examples(inputs.example), describe_origin(inputs.model)
    return Loaded(inputs.model, inputs.tokenizer, example, origin, files=inputs.files)


def _two_examples(example: Example) -> Example:
    parts = [*example.args, *example.kwargs.values()]
    known = not example.args and any(name in INPUTS for name in example.kwargs)
    batched = all(isinstance(part, Tensor) and part.dim() > 1 for part in parts) and len({*map(len, parts)}) == 1
    if not batched or not (known or (len(example.args) == 1 and not example.kwargs)):
        return example
    return Example(tuple(part[:2] for part in example.args), {name: x[:2] for name, x in example.kwargs.items()})


def digest(value: object) -> str:
    """Return a short digest of JSON data."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def name_of(value: object) -> str:
    """Return what a run records of an argument that may be code.

    Of a function it is the name, of a ``functools.partial`` the arguments as well, of a lambda a digest of its code.

    >>> name_of(None), name_of("regression"), name_of(len), name_of(partial(round, ndigits=2))
    ('', 'regression', 'len', 'round(ndigits=2)')
    >>> name_of(lambda x: x + 1) == name_of(lambda x: x + 1), name_of(lambda x: x + 1) == name_of(lambda x: x + 2)
    (True, False)
    """
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else str(value)
    if isinstance(value, partial):
        words = [*map(_argument, value.args), *(f"{name}={_argument(one)}" for name, one in value.keywords.items())]
        return f"{name_of(value.func)}({', '.join(words)})"
    name = str(getattr(value, "__qualname__", type(value).__name__))
    if isinstance(value, FunctionType) and value.__name__ == "<lambda>":
        return f"{name} {digest((_instructions(value.__code__), _argument(value.__defaults__)))}"
    return name


def _argument(value: object) -> str:
    """Return the text of an argument: of plain data their ``repr``, which has no address, else its name."""
    plain = all(part is None or isinstance(part, str | int | float | list | tuple | Mapping) for part in _parts(value))
    return repr(value) if plain else name_of(value)


def _instructions(code: CodeType) -> tuple[object, ...]:
    """Return what a function computes, without the file and the line where it is written."""
    constants = []
    for value in code.co_consts:
        if isinstance(value, CodeType):
            constants.append(str(_instructions(value)))
        else:  # the order of a set differs from process to process
            constants.append(str(sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)))
    return code.co_code.hex(), code.co_names, *constants


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
