"""Tables of examples: a CSV of image paths and labels, rows of images, and chats as text."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from regrow.core.sources import Source
from regrow.data.errors import SourceError
from regrow.data.vision import ImageFiles, image_tensor, picture_tensor

PATHS = ("path", "file", "filename", "image", "image_path", "img")
CLASSES = ("label", "class", "target", "y", "category")


def image_table(file: Path, name: str, *, size: int = 224, batch_size: int = 32, normalised: bool = True) -> Source:
    """Return a source of the images that a CSV file lists, with their class labels.

    The first row names the columns: one of ``path``, ``file``, ``filename``, ``image``, and one of ``label``,
    ``class``, ``target``; without such a row, the first column holds paths and the second labels. Paths are relative
    to the file's folder. Labels that are whole numbers stay; others are numbered in the order of their names.

    Args:
        file: The CSV file.
        name: The name of the source in results.
        size: Height and width in pixels.
        batch_size: Images per batch.
        normalised: As for :func:`regrow.data.vision.image_tensor`.

    Raises:
        SourceError: If the file lists no images, or names one that does not exist.
    """
    with file.open(newline="", encoding="utf-8-sig") as opened:
        rows = [row for row in csv.reader(opened) if row]
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    where = next((header.index(key) for key in PATHS if key in header), None)
    label = next((header.index(key) for key in CLASSES if key in header), None)
    if where is not None and label is not None:
        rows = rows[1:]
    else:
        where, label = 0, 1
    if not rows or any(len(row) <= max(where, label) for row in rows):
        raise SourceError(f"source {name!r}: {file} must have a column of image paths and one of labels: path,label")
    paths = [file.parent / row[where].strip() for row in rows]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise SourceError(f"source {name!r}: {file} lists {missing}, which does not exist; paths are relative to it")
    labels = number_labels([row[label].strip() for row in rows])
    files = tuple(zip(paths, labels, strict=True))
    images = ImageFiles(files, size, batch_size, normalised=normalised)
    return Source(name, images, f"{file.name}; {len(files)} images of {size} pixels")


def number_labels(labels: Sequence[str]) -> list[int]:
    """Return class numbers: whole numbers as they are, or the index of each name in alphabetical order.

    Args:
        labels: The labels as they were written.

    >>> number_labels(["cat", "ant", "cat"]), number_labels(["3", "0"])
    ([1, 0, 1], [3, 0])
    """
    if all(label.isdecimal() for label in labels):
        return [int(label) for label in labels]
    order = {label: i for i, label in enumerate(sorted(set(labels)))}
    return [order[label] for label in labels]


@dataclass(frozen=True)
class ImageRows:
    """Rows of a data set as pairs (image ``[3, size, size]``, class).

    Args:
        data: The data set, with ``len`` and rows by index.
        image: The column of the images (PIL images, or paths).
        label: The column of the classes.
        size: Height and width in pixels.
        normalised: As for :func:`regrow.data.vision.image_tensor`.
    """

    data: Any
    image: str
    label: str
    size: int
    normalised: bool = True

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its class."""
        row = self.data[index]
        image = row[self.image]
        if isinstance(image, str | Path):
            pixels = image_tensor(Path(image), self.size, normalised=self.normalised)
        else:
            pixels = picture_tensor(image, self.size, normalised=self.normalised)
        return pixels, int(row[self.label])
