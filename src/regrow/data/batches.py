"""Read users' data as batches: tensors, loaders, data sets, data frames' rows, folders, tables and text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from regrow.data import tables
from regrow.data.errors import SourceError
from regrow.data.halves import Half
from regrow.data.text import Text, chat_text, read, text
from regrow.data.vision import images
from regrow.data.windows import windows
from regrow.sources import Batch, Source

LABELS = ("labels", "label", "target", "targets", "y")
"""The keys under which a batch or a row may hold its labels."""
INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")
"""The keys by which a dict of tensors is recognised as a batch, and not as named sources."""
EXPECTED = (
    "a tensor, a pair (inputs, labels), a DataLoader, a data set, an iterable of batches, strings, or a path to a "
    "folder of class folders, a .csv or a .jsonl file"
)


@dataclass(frozen=True)
class ReadOptions:
    """How data are read.

    Args:
        batch_size: Examples per batch, where the data do not come in batches.
        tokenizer: The tokenizer of a language model, for text; ``None``: text is refused.
        seq_len: Tokens per window of text.
        size: Height and width of images that are read from files.
        shift: Whether labels in the shape of ``input_ids`` are those of the tokens themselves, as transformers takes
            them, so that the labels of a batch are these, shifted by one; and made of ``input_ids`` if missing.
        normalised: Normalise images that are read from files as torchvision's pretrained networks expect; otherwise
            their values are 0 to 1.
    """

    batch_size: int = 32
    tokenizer: Any = None
    seq_len: int = 512
    size: int = 224
    shift: bool = False
    normalised: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SourceError(f"batch_size must be at least 1, got {self.batch_size}")


def to_sources(data: Any, reading: ReadOptions = ReadOptions()) -> list[Source]:
    """Return users' data as named sources.

    Args:
        data: One set of data, as :func:`to_source` takes it; a mapping from names to such; or several
            :class:`regrow.Source`. ``None``: none.
        reading: How they are read.

    Raises:
        SourceError: If the data are of no kind that can be read.

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


def to_source(data: Any, name: str = "data", reading: ReadOptions = ReadOptions()) -> Source:
    """Return users' data as a source of batches.

    Args:
        data: A tensor of inputs; a tuple of tensors, the last of which holds labels; a ``DataLoader`` or another
            iterable of batches (tensors, (inputs, labels), dicts, :class:`regrow.Batch`), which is read anew each
            time; a data set with ``len`` and indices (torch, torchvision, Hugging Face); strings, for a tokenizer; a
            path to a folder of class folders with images, a ``.csv`` of image paths and labels, a ``.jsonl`` of
            texts or chats, or a text file; a named text domain.
        name: The name in results.
        reading: How they are read.

    Raises:
        SourceError: If the data are of no kind that can be read, or empty.

    >>> source = to_source((torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 0])), reading=ReadOptions(batch_size=2))
    >>> len(source), source.batches[2].labels
    (3, tensor([0]))
    """
    match data:
        case Source():
            return data
        case Batch():
            return Source(name, [data])
        case str() | Path():
            return _read_path(data, name, reading)
        case Tensor():
            return Source(name, [Batch((part,)) for part in data.split(reading.batch_size)])
        case tuple() if data and all(isinstance(part, Tensor | np.ndarray) for part in data):
            return Source(name, _split([torch.as_tensor(part) for part in data], name, reading.batch_size))
        case (Tensor() | np.ndarray(), [int() | float() | np.generic(), *_]):
            return to_source((data[0], torch.tensor(data[1])), name, reading)
        case list() if len(data) == 2 and all(isinstance(part, Tensor) for part in data):
            if data[0].dim() != data[1].dim() or data[0].dtype != data[1].dtype:
                raise SourceError(f"source {name!r}: inputs and labels come as a tuple (inputs, labels), got a list")
    if isinstance(data, Mapping) and _is_batch(data):
        return Source(name, [to_batch(data, name, reading.shift)])
    if hasattr(data, "column_names"):
        return _read_columns(data, name, reading)
    if isinstance(data, Sequence) and data and all(isinstance(part, str) for part in data):
        return _tokenize(Text(name, tuple(data), "strings"), reading)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Sequence):
        data = DataLoader(data, batch_size=reading.batch_size)
    if is_entries(data):
        data = DataLoader(data, batch_size=reading.batch_size)
    if not isinstance(data, Iterable):
        raise SourceError(f"source {name!r}: cannot read a {type(data).__name__}; give {EXPECTED}")
    if isinstance(data, Iterator):
        data = list(data)
    stream = BatchStream(data, name, reading.shift)
    if next(iter(stream), None) is None:
        raise SourceError(f"source {name!r} is empty: it yields no batch; give one with data")
    return Source(name, stream)


def to_batch(item: Any, name: str = "data", shift: bool = False) -> Batch:
    """Return one batch of a user's loader as inputs and labels.

    Args:
        item: A :class:`regrow.Batch`; a tensor of inputs; (inputs, labels), where inputs may be a tensor, several, or
            a dict; a dict with inputs by name, and ``labels``; or, for detection, (list of images, list of targets).
        name: The name of the source, for the message.
        shift: As :attr:`ReadOptions.shift`.

    Raises:
        SourceError: If it is none of these.

    >>> to_batch({"input_ids": torch.tensor([[5, 6, 7]])}, shift=True).labels
    tensor([[   6,    7, -100]])
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch((item,))
    if isinstance(item, Mapping):
        return _mapping_batch({str(key): value for key, value in item.items()}, shift)
    if isinstance(item, tuple | list) and item:
        if len(item) == 1:
            return to_batch(item[0], name, shift)
        *inputs, labels = item
        if isinstance(labels, Tensor):
            given = inputs[0] if len(inputs) == 1 else tuple(inputs)
            if isinstance(given, Mapping):
                return Batch((), {str(key): value for key, value in given.items()}, labels)
            return Batch(tuple(given) if isinstance(given, tuple | list) else (given,), {}, labels)
        if isinstance(labels, Sequence) and labels and isinstance(labels[0], Mapping):
            return Batch((*inputs, labels))  # detection: the network takes its targets as an input
    raise SourceError(
        f"source {name!r}: a batch must be a tensor, (inputs, labels), or a dict of tensors, got "
        f"{_describe(item)}; give a collate_fn that returns one of these"
    )


@dataclass(frozen=True)
class BatchStream(Sequence[Batch]):
    """The batches of a user's loader, read anew each time and never all in memory.

    Args:
        loader: The iterable of batches, which starts again each time it is read.
        name: The name of the source.
        shift: As :attr:`ReadOptions.shift`.
    """

    loader: Iterable[Any]
    name: str
    shift: bool = False

    def __iter__(self) -> Iterator[Batch]:
        return (to_batch(item, self.name, self.shift) for item in self.loader)

    def __len__(self) -> int:
        """Return the number of batches; a loader that does not say is counted by reading it."""
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError:
            return sum(1 for _ in self.loader)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        """Read up to one batch, or a list of batches for a slice."""
        if isinstance(index, slice):
            return list(islice(self, *index.indices(len(self))))
        place = range(len(self))[index] if index < 0 else index
        batch = next(islice(iter(self), place, None), None)
        if batch is None:
            raise IndexError(f"source {self.name!r} has no batch {index}")
        return batch


def _mapping_batch(item: dict[str, Any], shift: bool) -> Batch:
    key = next((key for key in LABELS if key in item), None)
    labels = item.pop(key) if key else None
    ids = item.get("input_ids")
    if not shift or not isinstance(ids, Tensor):
        return Batch((), item, labels)
    if labels is None:
        mask = item.get("attention_mask")
        labels = ids if not isinstance(mask, Tensor) or mask.dim() != 2 else ids.masked_fill(mask == 0, -100)
    if labels.shape == ids.shape:
        labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], dim=1)
    return Batch((), item, labels)


def is_entries(data: Any) -> bool:
    """Whether data are a list of entries (input, label).

    Args:
        data: Any data.
    """
    if not isinstance(data, list) or not data or not isinstance(data[0], tuple | list) or len(data[0]) < 2:
        return False
    label = data[0][1]
    return isinstance(label, int | np.generic) or (isinstance(label, Tensor) and label.dim() == 0)


def _is_batch(data: Mapping[Any, Any]) -> bool:
    """Whether a mapping is a batch: of inputs that are known by name, or tensors with labels; else it names sources."""
    tensors = all(isinstance(part, Tensor) for part in data.values())
    if tensors and len(data) > 1 and any(key in data for key in LABELS):
        return True
    return any(key in data for key in INPUTS) and all(not isinstance(part, str | Path) for part in data.values())


def _split(parts: Sequence[Tensor], name: str, size: int) -> list[Batch]:
    if len({len(part) for part in parts}) > 1:
        counts = ", ".join(str(len(part)) for part in parts)
        raise SourceError(
            f"source {name!r}: inputs and labels must have the same length, got {counts}; give one label per input"
        )
    rows = zip(*(part.split(size) for part in parts), strict=True)
    return [to_batch(row, name) for row in rows]


def _read_path(data: str | Path, name: str, reading: ReadOptions) -> Source:
    """Read a file, a folder, or a named text domain."""
    path = Path(data).expanduser()
    form: Any = {"size": reading.size, "batch_size": reading.batch_size, "normalised": reading.normalised}
    if path.suffix == ".csv" and path.is_file():
        return tables.image_table(path, name, **form)
    if reading.tokenizer is None:
        if path.is_dir():
            return images(name, path, half=Half.WHOLE, **form)
        if not path.exists():
            raise SourceError(
                f"source {name!r}: there is no file or folder {str(data)!r}; give the path of class folders or of a "
                ".csv; for the name of a text domain, the model needs a tokenizer (tokenizer=, or model.tokenizer)"
            )
        raise SourceError(
            f"source {name!r}: {str(data)!r} is no folder of class folders and no .csv file; if it is text, the model "
            "needs a tokenizer (tokenizer=, or model.tokenizer)"
        )
    if path.exists():
        return _tokenize(read(name, path), reading)
    return _tokenize(text(str(data)), reading)


def _tokenize(text: Text, reading: ReadOptions) -> Source:
    if reading.tokenizer is None:
        raise SourceError(f"source {text.name!r} is text, and the model has no tokenizer; give tokenizer=")
    return windows(
        text,
        reading.tokenizer,
        n=None,
        seq_len=reading.seq_len,
        half=Half.WHOLE,
        batch_size=max(1, min(reading.batch_size, 4)),
    )


def _read_columns(data: Any, name: str, reading: ReadOptions) -> Source:
    """Read a Hugging Face data set by its columns: text, ``input_ids``, or inputs and a label."""
    names = list(data.column_names)
    for column in ("text", "messages"):
        if column in names and reading.tokenizer is not None and not set(names) & set(INPUTS):
            documents = tuple(chat_text(row, reading.tokenizer) for row in data[:][column])
            return _tokenize(Text(name, documents, f"column {column}"), reading)
    label = next((key for key in LABELS if key in names), None)
    image = next((key for key in ("image", "img", "picture") if key in names), None)
    if image and label:
        return to_source(tables.ImageRows(data, image, label, reading.size, reading.normalised), name, reading)
    if set(names) & set(INPUTS) or label:
        first = data[:1]
        numeric = tuple(key for key in names if key == label or _is_numeric(first[key][0]))
        return Source(name, BatchStream(_ColumnBatches(data, numeric, reading.batch_size), name, reading.shift))
    raise SourceError(
        f"source {name!r}: columns {', '.join(map(repr, names))} hold no inputs that are known; name them "
        f"{', '.join(INPUTS[:2])}, 'text', or 'image' with 'label', or give an iterable of batches"
    )


def _is_numeric(value: object) -> bool:
    """Whether a cell is a number, an array, or nested lists of numbers."""
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int | float | Tensor) or hasattr(value, "__array__")


@dataclass(frozen=True)
class _ColumnBatches:
    """Batches of rows of a columned data set, as dicts of tensors."""

    data: Any
    columns: tuple[str, ...]
    size: int

    def __len__(self) -> int:
        return -(-len(self.data) // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.data), self.size):
            rows = self.data[start : start + self.size]
            yield {name: torch.as_tensor(rows[name]) for name in self.columns}


def _describe(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of {', '.join(type(part).__name__ for part in item[:3]) or 'nothing'}"
    return f"a {type(item).__name__}"
