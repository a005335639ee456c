"""Read users' data as batches: tensors, loaders, data sets, rows with columns, folders and text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from regrow.core.sources import LABEL_KEYS, Batch, Source
from regrow.data.batch_forms import DEFAULTS, ReadOptions, from_array, is_example_list
from regrow.data.batch_streams import BatchStream, read_stream
from regrow.data.halves import Half, SourceError
from regrow.data.text import Text, chat_text, load_files, text, windows
from regrow.data.vision import ImageRows, images

# The keys by which a dict of tensors is recognised as a batch, and not as named sources.
INPUT_KEYS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")
EXPECTED = (
    "a tensor, a pair (inputs, labels), a DataLoader, a data set, an iterable of batches, strings, or a path to a "
    "folder of class folders or a .jsonl file"
)


def to_sources(data: Any, reading: ReadOptions = DEFAULTS) -> list[Source]:
    """Return users' data as named sources: one per entry of a dict, none of ``None``, else one named ``data``.

    Sources in a sequence are returned as they are. SourceError if data cannot be read.

    >>> [source.name for source in to_sources({"a": torch.ones(2, 3), "b": torch.ones(2, 3)})]
    ['a', 'b']
    """
    if data is None:
        return []
    if isinstance(data, Mapping) and not _is_batch(data):
        return [to_source(part, str(name), reading) for name, part in data.items()]
    if isinstance(data, Sequence) and data and all(isinstance(part, Source) for part in data):
        return list(data)
    if isinstance(data, list) and any(isinstance(part, DataLoader) for part in data):
        raise SourceError("several sets of data need names; give a dict, for example {'first': loader}")
    return [to_source(data, "data", reading)]


def to_source(data: Any, name: str = "data", reading: ReadOptions = DEFAULTS) -> Source:
    """Return users' data, of any of the forms in ``EXPECTED``, as a source of batches; SourceError for other data.

    >>> source = to_source((torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 0])), reading=ReadOptions(batch_size=2))
    >>> len(source), source.batches[2].labels
    (3, tensor([0]))
    """
    match data:
        case Source():
            return _read_source(data, reading)
        case Batch():
            return _check_in_memory(name, [data], reading)
        case str() | Path():
            return _read_path(data, name, reading)
        case Tensor():
            (batches,) = _split_rows([data], name, reading.batch_size)
            return _check_in_memory(name, batches, reading)
        case tuple() if data and all(isinstance(part, Tensor | np.ndarray) for part in data):
            return _check_in_memory(name, [*zip(*_split_rows(data, name, reading.batch_size), strict=True)], reading)
        case list() if len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            if data[0].dim() != data[1].dim() or data[0].dtype != data[1].dtype:
                raise SourceError(f"source {name!r}: inputs and labels come as a tuple (inputs, labels), got a list")
    if isinstance(data, Mapping) and _is_batch(data):
        return _check_in_memory(name, [data], reading)
    if isinstance(data, Mapping):
        raise SourceError(f"source {name!r} is a dict of {len(data)} sets of data; give one set of data")
    if hasattr(data, "column_names"):
        return _read_columns(data, name, reading)
    if isinstance(data, Sequence) and data and all(isinstance(part, str) for part in data):
        return _tokenize(Text(name, tuple(data), "strings"), reading)
    indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Sequence)
    if indexed or is_example_list(data):
        data = DataLoader(data, batch_size=reading.batch_size)
    if not isinstance(data, Iterable):
        raise SourceError(f"source {name!r}: cannot read a {type(data).__name__}; give {EXPECTED}")
    stream = read_stream(data, name, reading)
    if not len(stream):
        raise SourceError(f"source {name!r} is empty: it yields no batch; give one with data")
    return Source(name, stream)


def _read_source(source: Source, reading: ReadOptions) -> Source:
    """Return a user's source with its batches checked; one that regrow reads itself is left as it is."""
    if isinstance(source.batches, list | tuple):
        return replace(source, batches=_check_in_memory(source.name, source.batches, reading).batches)
    if type(source.batches).__module__.startswith("regrow."):
        return source
    return replace(source, batches=to_source(source.batches, source.name, reading).batches)


def _check_in_memory(name: str, batches: Sequence[Any], reading: ReadOptions) -> Source:
    """Return batches in memory as a source, after checking them."""
    return Source(name, list(BatchStream(batches, name, reading)))


def _is_batch(data: Mapping[Any, Any]) -> bool:
    """Whether a mapping is a batch, by its keys (input and label names) and values; else it names sources."""
    all_tensors = all(isinstance(part, Tensor) for part in data.values())
    if all_tensors and len(data) > 1 and any(key in data for key in LABEL_KEYS):
        return True
    return any(key in data for key in INPUT_KEYS) and all(not isinstance(part, str | Path) for part in data.values())


def _split_rows(parts: Sequence[Any], name: str, size: int) -> list[tuple[Tensor, ...]]:
    """Return, of each tensor or array, its batches of ``size`` rows; SourceError unless all have equally many rows."""
    tensors = [part if isinstance(part, Tensor) else from_array(part, f"source {name!r}") for part in parts]
    if not all(part.dim() for part in tensors):
        raise SourceError(f"source {name!r}: a tensor is a single number; give tensors with an example per row")
    if len({len(part) for part in tensors}) > 1:
        problem = f"inputs and labels must have the same length, got {', '.join(str(len(part)) for part in tensors)}"
        raise SourceError(f"source {name!r}: {problem}; give one label per input")
    return [part.split(size) for part in tensors]


def _read_path(data: str | Path, name: str, reading: ReadOptions) -> Source:
    """Read a text file or folder or a named text domain if there is a tokenizer, else a folder of class folders."""
    path = Path(data).expanduser()
    if "\n" in str(data) or any(len(part) > 255 for part in path.parts):
        problem = f"a string names a file or a text domain, and this one has {len(str(data)):,} characters"
        raise SourceError(f"source {name!r}: {problem}; give texts in a list, [text]")
    if reading.tokenizer is not None:
        return _tokenize(load_files(name, path) if path.exists() else text(str(data)), reading)
    if path.is_dir():
        taken = {"size": reading.size, "channels": reading.channels, "batch_size": reading.batch_size}
        return images(name, path, half=Half.WHOLE, normalised=reading.normalised, **taken)
    problem = f"{str(data)!r} is no folder of class folders"
    raise SourceError(f"source {name!r}: {problem}; for text, give tokenizer=, or set model.tokenizer")


def _tokenize(text: Text, reading: ReadOptions) -> Source:
    """Return all windows of tokens of a text, four per batch at most; SourceError without a tokenizer."""
    if reading.tokenizer is None:
        raise SourceError(f"source {text.name!r} is text, and the model has no tokenizer; give tokenizer=")
    size = min(reading.batch_size, 4)
    source = windows(text, reading.tokenizer, n=None, seq_len=reading.seq_len, half=Half.WHOLE, batch_size=size)
    return source if reading.caches else replace(source, batches=[replace(one, kwargs={}) for one in source])


def _read_columns(data: Any, name: str, reading: ReadOptions) -> Source:
    """Read a Hugging Face data set by its columns: text, ``input_ids``, or inputs and a label."""
    names = list(data.column_names)
    for column in ("text", "messages"):
        if column in names and reading.tokenizer is not None and not set(names) & set(INPUT_KEYS):
            documents = tuple(chat_text(row, reading.tokenizer) for row in data[:][column])
            return _tokenize(Text(name, documents, f"column {column}"), reading)
    label = next((key for key in LABEL_KEYS if key in names), None)
    image = next((key for key in ("image", "img", "picture") if key in names), None)
    if image and label:
        return to_source(
            ImageRows(data, image, label, reading.size, reading.channels, reading.normalised), name, reading
        )
    if set(names) & set(INPUT_KEYS) or label:
        first = data[:1]
        columns = tuple(key for key in names if key == label or _is_numeric(first[key][0]))
        batches = _ColumnBatches(data, columns, reading.batch_size)
        return Source(name, BatchStream(batches, name, reading, len(batches)))
    problem = f"columns {', '.join(map(repr, names))} hold no inputs that are known"
    remedy = f"name them {', '.join(INPUT_KEYS[:2])}, 'text', or 'image' with 'label', or give an iterable of batches"
    raise SourceError(f"source {name!r}: {problem}; {remedy}")


def _is_numeric(value: object) -> bool:
    """Whether a cell is a number, an array, or nested lists of numbers."""
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int | float | Tensor) or hasattr(value, "__array__")


@dataclass(frozen=True)
class _ColumnBatches:
    """Batches of rows of a columned data set, as dicts of tensors."""

    data: Sequence[Any]  # which gives columns for a slice
    columns: tuple[str, ...]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.data), self.batch_size):
            rows = cast(Mapping[str, Any], self.data[start : start + self.batch_size])
            yield {name: torch.as_tensor(rows[name]) for name in self.columns}
