"""Images: folders with one sub-folder per class, rows of data sets, digits; and augmentation."""

import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.core.errors import InputError, install_command
from regrow.core.limits import MAX_PIXELS, check_regular, expanded, reason
from regrow.core.sources import Batch, Source
from regrow.data.batch_streams import LazyBatches
from regrow.data.halves import Half, SourceError

SAMPLED_FILES = 32  # images of a folder that are read to learn their size, spread over all
MAX_SHIFT = 4  # pixels, the largest shift in both directions
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # per colour, as torchvision's pretrained networks expect

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class ImageFileSet:
    """Image files as a data set of pairs (image ``[3, H, W]``, class), read when they are asked for.

    To a square size, images are scaled and cropped as by :func:`image_tensor`; to any other, they are scaled.
    """

    files: tuple[tuple[Path, int], ...]  # each with its class
    size: tuple[int, int]  # height, width
    normalised: bool  # as torchvision's pretrained networks expect; else 0 to 1

    def __len__(self) -> int:
        return len(self.files)

    @property
    def targets(self) -> list[int]:
        """The class of each image."""
        return [label for _, label in self.files]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its class."""
        (file, label), (height, width) = self.files[index], self.size
        image = open_image(file)
        if height == width:
            return image_tensor(image, height, str(file), normalised=self.normalised), label
        if image.size != (width, height):
            image = image.resize((width, height))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return normalise_(pixels) if self.normalised else pixels, label


@dataclass(frozen=True)
class ImageFileBatches(LazyBatches):
    """Batches of image files, read lazily: the same each time, and never all in memory."""

    dataset: ImageFileSet
    batch_size: int
    channels: int = 3  # or 1: the mean of the colours

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.read(range(len(self)))

    def read(self, positions: range) -> Iterator[Batch]:
        """Yield the batches at ``positions``, indices from 0."""
        for i in positions:
            indices = range(len(self.dataset))[i * self.batch_size : (i + 1) * self.batch_size]
            rows = [self.dataset[index] for index in indices]
            inputs = torch.stack([image for image, _ in rows])
            inputs = inputs if self.channels == 3 else inputs.mean(1, keepdim=True)
            yield Batch((inputs,), labels=torch.tensor([label for _, label in rows]))


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
        normalised: As torchvision's pretrained networks expect; otherwise values are 0 to 1.

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
    if {"train", "test"} == {folder.name for folder in classes}:
        raise SourceError(f"source {name!r}: {path} has train and test, which are no classes; give {path}/test")
    files = [(file, label) for label, folder in enumerate(classes) for file in _select_half(image_files(folder), half)]
    if not files:
        raise SourceError(f"source {name!r}: no {half} images in sub-folders of {path}; give path/CLASS/image.jpg")
    chosen = random.Random(seed).sample(files, min(len(files), n or len(files)))
    for file, _ in chosen:  # a damaged one is found before the work begins
        open_image(file)
    origin = f"{path.name}/, {len(classes)} classes; {half.phrase}; {len(chosen)} images of {size} pixels, seed {seed}"
    batches = ImageFileBatches(ImageFileSet(tuple(chosen), (size, size), normalised), batch_size, channels)
    return Source(name, batches, origin)


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
    indices = [i for label in range(10) for i in _select_half((labels == label).nonzero()[:, 0].tolist(), half)]
    chosen = random.Random(seed).sample(indices, min(len(indices), n or len(indices)))
    inputs = pixels[chosen]
    if size != 8:
        inputs = F.interpolate(inputs, size=(size, size), mode="bilinear", align_corners=False)
    inputs = inputs.expand(-1, channels, -1, -1).contiguous()
    parts = zip(inputs.split(batch_size), labels[chosen].split(batch_size), strict=True)
    batches = [Batch((rows,), labels=classes) for rows, classes in parts]
    origin = f"scikit-learn digits; {half.phrase}; {len(chosen)} images of {size} pixels, seed {seed}"
    return Source("digits", batches, origin)


def read_digits() -> tuple[Tensor, Tensor]:
    """Return the images of scikit-learn's digits, ``[1797, 1, 8, 8]`` from 0 to 1, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SourceError(f"source 'digits' needs scikit-learn: {install_command('digits')}") from None
    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()


@dataclass(frozen=True)
class ImageRows:
    """Rows of a data set with columns as pairs (image ``[C, size, size]``, class), read when they are asked for."""

    data: Sequence[Any]  # its rows are mappings
    image_column: str
    label_column: str
    size: int  # height and width, as by :func:`image_tensor`
    channels: int  # 3, or 1: the mean of the colours
    normalised: bool  # as torchvision's pretrained networks expect; else 0 to 1

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        """Return one image and its label."""
        row = self.data[index]
        image = image_tensor(row[self.image_column], self.size, "an image", normalised=self.normalised)
        image = image if self.channels == 3 else image.mean(0, keepdim=True)
        label = row[self.label_column]
        return image, label if isinstance(label, float) else int(label)


def image_tensor(image: Any, size: int, name: str, *, normalised: bool) -> Tensor:
    """Return the centre of a PIL image as ``[3, size, size]`` float32, its shorter side scaled to 8/7 of the size.

    An image that is of this size already is taken as it is. ``name`` is its name in messages.
    """
    from PIL.Image import Resampling

    image = image.convert("RGB")
    if image.size != (size, size):
        scale = size * 8 / 7 / min(image.size)  # 256 pixels for a crop of 224, as torchvision has it
        width, height = (max(size, round(side * scale)) for side in image.size)
        check_pixels(name, width, height)  # one of 1 × 100,000 pixels would become 256 × 25,600,000
        image = image.resize((width, height), Resampling.BILINEAR)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    centre = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32)
    pixels = torch.from_numpy(centre / np.float32(255)).permute(2, 0, 1).contiguous()
    return normalise_(pixels) if normalised else pixels


def normalise_(images: Tensor) -> Tensor:
    """Normalise images ``[…, 3, H, W]`` of values 0 to 1 in place, as torchvision's networks expect; return them."""
    return images.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def image_files(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by path."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)


def find_common_side(folder: Path) -> int:
    """Return the side in pixels of the images below a folder; 0 unless those of a sample are square and of one size."""
    files = image_files(folder)
    try:
        sizes = {open_image(file).size for file in files[:: max(1, len(files) // SAMPLED_FILES)]}
    except InputError:  # reading the source says what is wrong with it
        return 0
    (width, height) = next(iter(sizes), (0, 0))
    return width if len(sizes) == 1 and width == height else 0


def open_image(file: Path) -> Any:
    """Return the image in a file as a PIL image in RGB, or raise SourceError if it is none, damaged or too large."""
    try:
        from PIL import Image
    except ImportError:
        raise SourceError(f"images need pillow: {install_command('vision')}") from None
    try:
        check_regular(file)
        with warnings.catch_warnings():  # what pillow finds large is below the limit here
            warnings.simplefilter("ignore")
            with Image.open(file) as opened:
                check_pixels(file, *opened.size)
                return opened.convert("RGB")
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise SourceError(f"{file} has more than the {MAX_PIXELS:,} pixels that are read; scale it down") from None
    except Exception as error:  # decoders of damaged files raise anything
        raise SourceError(f"{file} is not a readable image ({reason(error)}); replace or remove it") from error


def is_images(inputs: Any) -> bool:
    """Whether inputs have the form of images, ``[N, C, H, W]`` of floats."""
    return isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.is_floating_point()


def shift_and_flip(images: Tensor) -> Tensor:
    """Return images ``[N, C, H, W]`` randomly shifted by up to 4 pixels (zero-padded) and mirrored with probability ½.

    >>> int(shift_and_flip(torch.ones(2, 1, 8, 8)).sum()) in range(32, 129)
    True
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (MAX_SHIFT,) * 4)
    down, right = torch.randint(0, 2 * MAX_SHIFT + 1, (2, n)).unbind(0)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    columns = torch.where(torch.rand(n)[:, None, None, None] < 0.5, columns.flip(-1), columns)
    which, channels = torch.arange(n)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None]
    return padded[tuple(index.to(images.device) for index in (which, channels, rows, columns))]


def cut_out(images: Tensor, side: int) -> Tensor:
    """Return images ``[N, C, H, W]``, each with a random square, ``side`` pixels wide, set to 0 (cutout).

    Its centre lies in the image; ``side`` 0: none. Source: DeVries and Taylor (arXiv 1708.04552).

    >>> int((cut_out(torch.ones(1, 1, 8, 8), 4) == 0).sum()) in range(4, 17)
    True
    """
    if not side:
        return images
    n, _, height, width = images.shape
    inside = []
    for size in (height, width):
        first = torch.randint(size, (n, 1)) - side // 2
        inside.append((torch.arange(size) >= first) & (torch.arange(size) < first + side))
    blank = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return images.masked_fill(blank.to(images.device), 0.0)


def check_pixels(file: Path | str, width: int, height: int) -> None:
    """Raise SourceError, with ``file``, unless an image of this size has pixels, and at most ``MAX_PIXELS``."""
    if not 0 < width * height <= MAX_PIXELS:
        raise SourceError(f"{file} is {width:,} × {height:,} pixels, at most {MAX_PIXELS:,} are read; scale it down")


def _select_half(values: list[Any], half: Half) -> list[Any]:
    """Return every second value: from the first on (calibration), from the second on (evaluation), or all."""
    first, step = {Half.CALIBRATION: (0, 2), Half.EVALUATION: (1, 2), Half.WHOLE: (0, 1)}[half]
    return values[first::step]


def _check_amounts(name: str, n: int | None, batch_size: int) -> None:
    """Raise SourceError unless numbers of images (``None``: all) and of images per batch are positive."""
    if (n is not None and n < 1) or batch_size < 1:
        raise SourceError(f"source {name!r}: n and batch_size are at least 1; got n={n}, batch_size={batch_size}")
