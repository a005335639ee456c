"""Image sources: a folder with one sub-folder per class, and the small digits of scikit-learn."""

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from regrow.core.errors import InputError
from regrow.core.limits import MAX_PIXELS, check_memory, check_regular, expanded, reason
from regrow.core.sources import Batch, Source
from regrow.data.errors import SourceError
from regrow.data.halves import Half

SAMPLED = 32
"""How many images of a folder are looked at to learn their size, spread over all."""

T = TypeVar("T")

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"})

# Mean and standard deviation per colour that torchvision's pretrained networks expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageFiles(Sequence[Batch]):
    """Batches of image files, read lazily: the same each time, and never all in memory.

    Args:
        files: The images and their classes, in order.
        size: Height and width in pixels.
        batch_size: Images per batch.
        channels: 3, or 1 for the mean of the colours.
        normalised: As for :func:`image_tensor`.
    """

    files: tuple[tuple[Path, int], ...]
    size: int
    batch_size: int
    channels: int = 3
    normalised: bool = True

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        """Read one batch, or a list of batches for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self.batch_size
        rows = self.files[start : start + self.batch_size]
        pictures = torch.stack([image_tensor(file, self.size, normalised=self.normalised) for file, _ in rows])
        return Batch(
            (pictures if self.channels == 3 else pictures.mean(1, keepdim=True),),
            labels=torch.tensor([label for _, label in rows]),
        )


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
    _check(name, n, batch_size)
    try:
        path = expanded(path)
    except InputError as error:
        raise SourceError(f"source {name!r}: {error}") from error
    if not path.is_dir():
        raise SourceError(f"source {name!r}: {path} is not a folder; give one with a sub-folder of images per class")
    classes = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    found: list[tuple[Path, int]] = []
    for label, folder in enumerate(classes):
        found += [(file, label) for file in _part(image_files(folder), half)]
    if not found:
        raise SourceError(f"source {name!r}: no {half} images in sub-folders of {path}; give path/CLASS/image.jpg")
    chosen = random.Random(seed).sample(found, min(len(found), n or len(found)))
    for file, _ in chosen:  # a damaged one is found before the work begins
        open_image(file)
    origin = f"{path.name}/, {len(classes)} classes; {_words(half)}; {len(chosen)} images of {size} pixels, seed {seed}"
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
    _check("digits", n, batch_size)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SourceError("source 'digits' needs scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    pixels = torch.from_numpy(data.images).float()[:, None] / 16
    labels = torch.from_numpy(data.target).long()
    found = [i for label in range(10) for i in _part((labels == label).nonzero()[:, 0].tolist(), half)]
    chosen = random.Random(seed).sample(found, min(len(found), n or len(found)))
    picked = pixels[chosen]
    if size != 8:
        picked = torch.nn.functional.interpolate(picked, size=(size, size), mode="bilinear", align_corners=False)
    picked = picked.expand(-1, channels, -1, -1).contiguous()
    batches = [
        Batch((rows,), labels=classes)
        for rows, classes in zip(picked.split(batch_size), labels[chosen].split(batch_size), strict=True)
    ]
    origin = f"scikit-learn digits; {_words(half)}; {len(chosen)} images of {size} pixels, seed {seed}"
    return Source("digits", batches, origin)


def image_tensor(file: Path, size: int, *, normalised: bool = True) -> Tensor:
    """Read an image as ``[3, size, size]`` float32.

    Args:
        file: The image file.
        size: Height and width in pixels.
        normalised: Normalise it as torchvision's pretrained networks expect; otherwise its values are 0 to 1.

    Raises:
        SourceError: If the file is not an image.
    """
    return picture_tensor(open_image(file), size, str(file), normalised=normalised)


def picture_tensor(picture: Any, size: int, name: str = "an image", *, normalised: bool = True) -> Tensor:
    """Return a PIL image as ``[3, size, size]`` float32.

    Args:
        picture: The image.
        size: Height and width in pixels: the shorter side is scaled to 8/7 of it, and the centre cropped; an image
            that is of this size already is taken as it is.
        name: The name of the image in messages.
        normalised: As for :func:`image_tensor`.
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
    colours = torch.from_numpy(cut / np.float32(255))
    colours = colours.permute(2, 0, 1).contiguous()
    return normalise_(colours) if normalised else colours


def normalise_(images: Tensor) -> Tensor:
    """Normalise images of values 0 to 1 in place, as torchvision's pretrained networks expect; return them.

    Args:
        images: ``[…, 3, H, W]``.
    """
    return images.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def image_files(folder: Path) -> list[Path]:
    """Return the image files below a folder, sorted by path.

    Args:
        folder: The folder.
    """
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)


def side_of(folder: Path) -> int:
    """Return the side in pixels of the images below a folder, if a sample of them is square and of one size.

    Args:
        folder: A folder in any layout.

    Returns:
        The side; 0 if they differ, are not square, cannot be read, or there are none.
    """
    files = image_files(folder)
    sizes = set()
    for file in files[:: max(1, len(files) // SAMPLED)]:
        try:
            sizes.add(open_image(file).size)
        except SourceError:  # reading the source says what is wrong with it
            return 0
    (width, height) = next(iter(sizes), (0, 0))
    return width if len(sizes) == 1 and width == height else 0


def read_images(files: Sequence[Path]) -> Tensor:
    """Read images at their own size, ``[N, 3, H, W]`` float32, values 0 to 1.

    Args:
        files: The image files.

    Raises:
        SourceError: If a file is not an image, or they are not all of one size.
    """
    first = np.asarray(open_image(files[0]))
    side = f"{first.shape[1]} × {first.shape[0]}"
    check_memory(9 * len(files) * first.size, f"{len(files)} images of {side} pixels", "take fewer, or scale them down")
    found = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(files):
        pixels = np.asarray(open_image(file))
        if pixels.shape != first.shape:
            raise SourceError(
                f"{file} has {pixels.shape[1]} × {pixels.shape[0]} pixels, {files[0]} has {first.shape[1]} × "
                f"{first.shape[0]}; bring all to one size"
            )
        found[i] = pixels
    return torch.from_numpy(found).permute(0, 3, 1, 2).float() / 255


def open_image(file: Path) -> Any:
    """Open an image file with pillow, converted to RGB.

    Args:
        file: The image file.

    Raises:
        SourceError: If pillow is not installed, or the file is not an image.
    """
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
    except SourceError:
        raise
    except InputError as error:
        raise SourceError(str(error)) from error
    except Image.DecompressionBombError:
        raise SourceError(f"{file} has more than the {MAX_PIXELS:,} pixels that are read; scale it down") from None
    except Exception as error:  # decoders of damaged files raise anything
        raise SourceError(f"{file} is not a readable image ({reason(error)}); replace or remove it") from error


def _check_pixels(file: Path | str, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise SourceError(f"{file} is {width:,} × {height:,} pixels, at most {MAX_PIXELS:,} are read; scale it down")


def _part(values: list[T], half: Half) -> list[T]:
    match half:
        case Half.CALIBRATION:
            return values[0::2]
        case Half.EVALUATION:
            return values[1::2]
    return values


def _words(half: Half) -> str:
    return "the whole" if half is Half.WHOLE else f"its {half} half"


def _check(name: str, n: int | None, batch_size: int) -> None:
    if (n is not None and n < 1) or batch_size < 1:
        raise SourceError(f"source {name!r}: at least 1 image, and 1 per batch; got {n} and {batch_size}")
