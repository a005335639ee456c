"""Images: folders with one sub-folder per class, tables of paths, rows of data sets, and scikit-learn's digits."""

import csv
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from regrow.core.errors import InputError
from regrow.core.limits import MAX_PIXELS, check_memory, check_regular, expanded, reason
from regrow.core.sources import Batch, Source
from regrow.data.batch_streams import LazyBatches
from regrow.data.halves import Half, SourceError

SAMPLED = 32
"""How many images of a folder are looked at to learn their size, spread over all."""
PATHS = ("path", "file", "filename", "image", "image_path", "img")
CLASSES = ("label", "class", "target", "y", "category")
"""The names that the columns of paths and of classes may have in a table."""
# Mean and standard deviation per colour that torchvision's pretrained networks expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

T = TypeVar("T")
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class PictureFiles:
    """Image files as a data set of pairs (image ``[3, H, W]``, class), read when they are asked for.

    To a square size, images are scaled and cropped as by :func:`image_tensor`; to any other, they are scaled.
    """

    files: tuple[tuple[Path, int], ...]
    size: tuple[int, int]
    normalised: bool

    def __len__(self) -> int:
        return len(self.files)

    @property
    def targets(self) -> list[int]:
        """The class of each image."""
        return [label for _, label in self.files]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its class."""
        (file, label), (height, width) = self.files[index], self.size
        if height == width:
            return image_tensor(file, height, normalised=self.normalised), label
        picture = open_image(file)
        if picture.size != (width, height):
            picture = picture.resize((width, height))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return normalise_(pixels) if self.normalised else pixels, label


@dataclass(frozen=True)
class ImageFiles(LazyBatches):
    """Batches of image files, read lazily: the same each time, and never all in memory."""

    files: tuple[tuple[Path, int], ...]
    size: int
    batch_size: int
    channels: int = 3
    normalised: bool = True

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.read(range(len(self)))

    def read(self, positions: range) -> Iterator[Batch]:
        """Return some batches."""
        for i in positions:
            rows = self.files[i * self.batch_size : (i + 1) * self.batch_size]
            pictures = torch.stack([image_tensor(file, self.size, normalised=self.normalised) for file, _ in rows])
            pictures = pictures if self.channels == 3 else pictures.mean(1, keepdim=True)
            yield Batch((pictures,), labels=torch.tensor([label for _, label in rows]))


def images(
    name: str,
    path: Path,
    *,
    n: int | None = None,
    size: int = 224,
    channels: int = 3,
    batch_size: int = 32,
    seed: int = 0,
    half: Half = Half.CALIBRATION,
    normalised: bool = True,
) -> Source:
    """Return a source of images from a folder in ``ImageFolder`` layout: ``path/CLASS/image.jpg``.

    Classes are numbered in the order of their names; within each class, images alternate between the two halves.

    Args:
        name: The name of the source in results.
        path: The folder.
        n: The number of images, chosen at random; all of the half if ``None`` or if it holds no more.
        size: Height and width in pixels: the shorter side is scaled to 8/7 of it, and the centre cropped; images that
            are of this size already are taken as they are.
        channels: 3, or 1 for the mean of the colours.
        batch_size: Images per batch.
        seed: The random seed of the choice and order of images.
        half: The calibration half, the evaluation half, or both.
        normalised: As for :func:`image_tensor`.

    Raises:
        SourceError: If there is no such folder, or it holds no class with images in it.
    """
    _check_amounts(name, n, batch_size)
    try:
        path = expanded(path)
    except InputError as error:
        raise SourceError(f"source {name!r}: {error}") from error
    if not path.is_dir():
        raise SourceError(f"source {name!r}: {path} is not a folder; give one with a sub-folder of images per class")
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    files = [(file, label) for label, folder in enumerate(classes) for file in _part(image_files(folder), half)]
    if not files:
        raise SourceError(f"source {name!r}: no {half} images in sub-folders of {path}; give path/CLASS/image.jpg")
    chosen = random.Random(seed).sample(files, min(len(files), n or len(files)))
    for file, _ in chosen:  # a damaged one is found before the work begins
        open_image(file)
    origin = f"{path.name}/, {len(classes)} classes; {half.words}; {len(chosen)} images of {size} pixels, seed {seed}"
    return Source(name, ImageFiles(tuple(chosen), size, batch_size, channels, normalised), origin)


def digits(
    *,
    n: int | None = None,
    size: int = 8,
    channels: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    half: Half = Half.CALIBRATION,
) -> Source:
    """Return a source of the 1,797 handwritten digits of scikit-learn (UCI): ten classes, values 0 to 1.

    Args:
        n: The number of images, chosen at random; ``None``: the whole half.
        size: Height and width; the 8 × 8 originals are enlarged bilinearly.
        channels: How many times the grey channel is repeated.
        batch_size: Images per batch.
        seed: The random seed of the choice and order of images.
        half: The calibration half, the evaluation half, or both; images of each class alternate between the halves.

    Raises:
        SourceError: If scikit-learn is not installed.
    """
    _check_amounts("digits", n, batch_size)
    pixels, labels = read_digits()
    indices = [i for label in range(10) for i in _part((labels == label).nonzero()[:, 0].tolist(), half)]
    chosen = random.Random(seed).sample(indices, min(len(indices), n or len(indices)))
    picked = pixels[chosen]
    if size != 8:
        picked = torch.nn.functional.interpolate(picked, size=(size, size), mode="bilinear", align_corners=False)
    picked = picked.expand(-1, channels, -1, -1).contiguous()
    batches = [
        Batch((rows,), labels=classes)
        for rows, classes in zip(picked.split(batch_size), labels[chosen].split(batch_size), strict=True)
    ]
    origin = f"scikit-learn digits; {half.words}; {len(chosen)} images of {size} pixels, seed {seed}"
    return Source("digits", batches, origin)


def read_digits() -> tuple[Tensor, Tensor]:
    """Return the images of scikit-learn's digits, ``[1797, 1, 8, 8]`` from 0 to 1, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SourceError("source 'digits' needs scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()


def image_table(file: Path, name: str, *, size: int = 224, batch_size: int = 32, normalised: bool = True) -> Source:
    """Return a source of the images that a CSV file lists, with their class labels.

    The first row names the columns (``PATHS`` and ``CLASSES``); without such a row, the first column holds paths and
    the second labels. Paths are relative to the file's folder. Labels that are whole numbers stay; others are numbered
    in the order of their names.
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
    labels = [row[label].strip() for row in rows]
    numbers = {name: i for i, name in enumerate(sorted(set(labels)))}
    if all(name.isdecimal() for name in labels):
        numbers = {name: int(name) for name in labels}
    files = tuple((path, numbers[label]) for path, label in zip(paths, labels, strict=True))
    pictures = ImageFiles(files, size, batch_size, normalised=normalised)
    return Source(name, pictures, f"{file.name}; {len(files)} images of {size} pixels")


@dataclass(frozen=True)
class ImageRows:
    """Rows of a data set as pairs (image ``[3, size, size]``, class)."""

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
        image, name = row[self.image], "an image"
        if isinstance(image, str | Path):
            image, name = open_image(Path(image)), str(image)
        return picture_tensor(image, self.size, name, normalised=self.normalised), int(row[self.label])


def image_tensor(file: Path, size: int, *, normalised: bool = True) -> Tensor:
    """Read an image as ``[3, size, size]``, normalised for torchvision's pretrained networks, or with values 0 to 1."""
    return picture_tensor(open_image(file), size, str(file), normalised=normalised)


def picture_tensor(picture: Any, size: int, name: str, *, normalised: bool) -> Tensor:
    """Return a PIL image as ``[3, size, size]`` float32.

    The shorter side is scaled to 8/7 of the size, and the centre cropped; an image that is of this size already is
    taken as it is.
    """
    from PIL.Image import Resampling

    picture = picture.convert("RGB")
    if picture.size != (size, size):
        scale = size * 8 / 7 / min(picture.size)
        width, height = (max(size, round(side * scale)) for side in picture.size)
        _check_pixels(name, width, height)  # one of 1 × 100,000 pixels would become 256 × 25,600,000
        picture = picture.resize((width, height), Resampling.BILINEAR)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    cut = np.asarray(picture.crop((left, top, left + size, top + size)), dtype=np.float32)
    pixels = torch.from_numpy(cut / np.float32(255)).permute(2, 0, 1).contiguous()
    return normalise_(pixels) if normalised else pixels


def normalise_(images: Tensor) -> Tensor:
    """Normalise images ``[…, 3, H, W]`` of values 0 to 1 in place, as torchvision's networks expect; return them."""
    return images.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def image_files(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by path."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)


def side_of(folder: Path) -> int:
    """Return the side in pixels of the images below a folder; 0 unless a sample of them is square and of one size."""
    files = image_files(folder)
    try:
        sizes = {open_image(file).size for file in files[:: max(1, len(files) // SAMPLED)]}
    except InputError:  # reading the source says what is wrong with it
        return 0
    (width, height) = next(iter(sizes), (0, 0))
    return width if len(sizes) == 1 and width == height else 0


def read_images(files: Sequence[Path]) -> Tensor:
    """Read images at their own size, which must be the same for all, ``[N, 3, H, W]`` float32, values 0 to 1."""
    first = np.asarray(open_image(files[0]))
    side = f"{first.shape[1]} × {first.shape[0]}"
    check_memory(9 * len(files) * first.size, f"{len(files)} images of {side} pixels", "take fewer, or scale them down")
    result = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(files):
        pixels = np.asarray(open_image(file))
        if pixels.shape != first.shape:
            raise SourceError(
                f"{file} has {pixels.shape[1]} × {pixels.shape[0]} pixels, {files[0]} has {side}; bring all to one size"
            )
        result[i] = pixels
    return torch.from_numpy(result).permute(0, 3, 1, 2).float() / 255


def image_size(file: Path) -> tuple[int, int]:
    """Return the size (width, height) of an image, from its header."""
    try:
        from PIL import Image

        check_regular(file)
        with Image.open(file) as opened:
            _check_pixels(file, *opened.size)
            return opened.size
    except Exception:  # reading the image says what is wrong with it
        width, height = open_image(file).size
        return width, height


def open_image(file: Path) -> Any:
    """Open an image file with pillow, converted to RGB."""
    try:
        from PIL import Image
    except ImportError:
        raise SourceError("images need pillow: pip install 'regrow[vision]'") from None
    try:
        check_regular(file)
        with warnings.catch_warnings():  # what pillow finds large is below the limit here
            warnings.simplefilter("ignore")
            with Image.open(file) as opened:
                _check_pixels(file, *opened.size)
                return opened.convert("RGB")
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise SourceError(f"{file} has more than the {MAX_PIXELS:,} pixels that are read; scale it down") from None
    except Exception as error:  # decoders of damaged files raise anything
        raise SourceError(f"{file} is not a readable image ({reason(error)}); replace or remove it") from error


def _check_pixels(file: Path | str, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise SourceError(f"{file} is {width:,} × {height:,} pixels, at most {MAX_PIXELS:,} are read; scale it down")


def _part(values: list[T], half: Half) -> list[T]:
    first, step = {Half.CALIBRATION: (0, 2), Half.EVALUATION: (1, 2), Half.WHOLE: (0, 1)}[half]
    return values[first::step]


def _check_amounts(name: str, n: int | None, batch_size: int) -> None:
    if (n is not None and n < 1) or batch_size < 1:
        raise SourceError(f"source {name!r}: at least 1 image, and 1 per batch; got {n} and {batch_size}")
