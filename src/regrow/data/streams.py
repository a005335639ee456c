"""Task sequences for continual learning: one image data set, transformed or split by classes."""

import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.core.errors import InputError
from regrow.core.limits import check_memory, expanded, read_content
from regrow.core.names import find_data_problem
from regrow.core.tasks import ChangedExamples, Examples, ExampleSet, Task, input_shape
from regrow.data.datasets import StreamedExamples
from regrow.data.errors import MissingError, SourceError
from regrow.data.picture_files import PictureFiles, image_size
from regrow.data.vision import image_files, normalise_, read_images

_MOST = 2**28
"""The largest file that is read, in bytes."""
_IN_MEMORY = 2**30
"""The most bytes of images that are read into memory."""


def permuted_tasks(base: Task, n: int, seed: int = 0) -> list[Task]:
    """Return tasks of the same images with the pixels in a different fixed order in each; the first unchanged.

    Args:
        base: The data set; inputs ``[N, C, H, W]``. All channels of a pixel move together.
        n: The number of tasks.
        seed: The random seed of the orders.
    """
    generator, pixels = torch.Generator().manual_seed(seed), prod(input_shape(base.train)[1:])
    orders = [torch.arange(pixels), *(torch.randperm(pixels, generator=generator) for _ in range(n - 1))]

    def change(order: Tensor) -> Any:
        return lambda x: x.flatten(2)[:, :, order].view_as(x)

    return [_changed(base, f"permuted-{i + 1}", change(order)) for i, order in enumerate(orders)]


def rotated_tasks(base: Task, n: int, degrees: float = 180.0) -> list[Task]:
    """Return tasks of the same images, rotated further in each task, from 0 up to ``degrees`` (exclusive).

    Rotation is bilinear; pixels from outside the image are 0.

    Args:
        base: The data set; inputs ``[N, C, H, W]``.
        n: The number of tasks.
        degrees: The angle that a further task would have.
    """

    def change(angle: float) -> Any:
        turn = torch.deg2rad(torch.tensor(angle))
        matrix = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
        matrix = torch.cat([matrix, torch.zeros(2, 1)], 1)

        def turned(x: Tensor) -> Tensor:
            grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
            return F.grid_sample(x, grid, align_corners=False)

        return turned

    angles = [degrees * i / n for i in range(n)]
    return [_changed(base, f"rotated-{angle:g}", change(angle)) for angle in angles]


def split(base: Task, n: int, *, relabel: bool = False) -> list[Task]:
    """Split a data set by classes into ``n`` tasks with equally many classes each, in their order.

    Args:
        base: The data set.
        n: The number of tasks.
        relabel: Whether each task numbers its classes from 0 (domain-incremental).

    Raises:
        SourceError: If the number of classes is not a multiple of ``n``.
    """
    if len(base.classes) % n:
        raise SourceError(f"{len(base.classes)} classes do not divide into {n} equal tasks; take a divisor")
    size = len(base.classes) // n
    groups = [base.classes[i : i + size] for i in range(0, len(base.classes), size)]
    return [
        Task(
            f"classes {group[0]}-{group[-1]}",
            _of(base.train, group, relabel),
            _of(base.test, group, relabel),
            tuple(range(size)) if relabel else group,
        )
        for group in groups
    ]


def alike(tasks: Sequence[Task], shape: Sequence[int] = ()) -> list[Task]:
    """Return the tasks with all images converted to one size and number of channels.

    Images are resized bilinearly, with antialiasing; grey becomes three equal channels, colours become their mean.

    Args:
        tasks: Tasks of images ``[N, C, H, W]``.
        shape: ``[C, H, W]``; empty: that of the first task's images.

    Raises:
        SourceError: If there are no tasks.

    >>> small, large = (Examples(torch.ones(2, c, n, n), torch.zeros(2).long()) for c, n in ((1, 8), (3, 32)))
    >>> [one.train.inputs.shape[1:] for one in alike([Task("a", small, small, (0,)), Task("b", large, large, (0,))])]
    [torch.Size([1, 8, 8]), torch.Size([1, 8, 8])]
    """
    if not tasks:
        raise SourceError("there is no task to learn; name one, like permuted:digits:5")
    channels, *size = shape or input_shape(tasks[0].train)
    parts = [part for task in tasks for part in (task.train, task.test)]
    examples = sum(len(part) for part in parts if not isinstance(part, StreamedExamples))
    needed = 4 * examples * channels * prod(size)
    check_memory(needed, f"{examples} images of {size[0]} × {size[-1]} pixels", "take fewer with --train and --test")

    def change(x: Tensor) -> Tensor:
        if [*x.shape[2:]] != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        return x if x.shape[1] == channels else x.mean(1, keepdim=True).expand(-1, channels, -1, -1)

    return [_changed(task, task.name, change) for task in tasks]


def idx(folder: str | Path, name: str = "images") -> Task:
    """Read a data set in the four files of MNIST (``train-images-idx3-ubyte`` etc., or ``.gz``); values 0 to 1.

    Args:
        folder: The folder of the files.
        name: The name of the data set in results.

    Raises:
        SourceError: If a file is missing or is not what its header says.
    """
    train, test = (_idx_half(Path(folder), half) for half in ("train", "t10k"))
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        sizes = (" × ".join(map(str, part.inputs.shape[2:])) for part in (train, test))
        raise SourceError(
            f"{folder}: training images have {' pixels, test images '.join(sizes)}; fetch the files again"
        )
    known = train.labels.unique()
    if strange := sorted(set(test.labels.tolist()) - set(known.tolist())):
        raise SourceError(f"{folder}: test images have class {strange[0]}, of which there is no training image")
    return Task(name, train, test, tuple(sorted(map(int, known))))


def _idx_half(folder: Path, half: str) -> Examples:
    pixels = _idx(folder, f"{half}-images-idx3-ubyte", 3)
    labels = _idx(folder, f"{half}-labels-idx1-ubyte", 1)
    if len(pixels) != len(labels):
        raise SourceError(f"{folder}: {len(pixels)} {half} images have {len(labels)} labels; fetch the files again")
    check_memory(8 * pixels.numel(), f"the {half} set of {folder}", "take a smaller data set")
    return Examples(pixels.float().unsqueeze(1) / 255, labels.long())


def pictures(
    folder: str | Path,
    name: str = "pictures",
    train: int = 0,
    test: int = 0,
    seed: int = 0,
    *,
    size: Sequence[int] = (),
    normalised: bool = False,
) -> Task:
    """Read an image data set from ``train/CLASS/…`` and ``test/CLASS/…``.

    Classes are numbered in the order of their names; a folder without images has a number, and is no class of the
    task. All images get one size. To a square one, others are scaled and cropped as ``regrow evaluate`` does it; to any
    other, they are scaled, which changes their aspect ratio. The images of a half are read while they are used if any
    has another size, or all need more than 1 GiB.

    Args:
        folder: The folder that contains ``train`` and ``test``.
        name: The name of the data set in results.
        train: The most training images, chosen at random before any is read; 0: all.
        test: The most test images; 0: all.
        seed: The random seed of the choice.
        size: Height and width in pixels that a network takes, ``[H, W]``; empty: those of the first training image, in
            the order of classes and file names, for both halves and whatever is chosen.
        normalised: Normalise images as torchvision's pretrained networks expect; otherwise values are 0 to 1.

    Raises:
        SourceError: If there are no images, or a chosen one is damaged.
    """
    halves = [Path(folder) / half for half in ("train", "test")]
    classes = sorted({one.name for half in halves if half.is_dir() for one in half.iterdir() if one.is_dir()})
    result, present = [], set[int]()
    for half, n in zip(halves, (train, test), strict=True):
        files = [(file, i) for i, one in enumerate(classes) for file in image_files(half / one)]
        if not files:
            raise SourceError(f"{half} has no pictures; give a folder with train/CLASS/… and test/CLASS/…")
        present |= {i for _, i in files}
        size = size or image_size(files[0][0])[::-1]
        chosen = random.Random(seed).sample(files, min(n or len(files), len(files)))
        result.append(_read_pictures(tuple(chosen), size, normalised))
    return Task(name, result[0], result[1], tuple(sorted(present)))


def _read_pictures(files: tuple[tuple[Path, int], ...], size: Sequence[int], normalised: bool) -> ExampleSet:
    """Return images in memory if they are small and have the size already; otherwise they are read as they are used."""
    paths = [file for file, _ in files]
    height, width = size
    sizes = {image_size(file) for file in paths}
    if sizes == {(width, height)} and 12 * len(files) * width * height <= _IN_MEMORY:
        inputs = read_images(paths)
        return Examples(normalise_(inputs) if normalised else inputs, torch.tensor([label for _, label in files]))
    return StreamedExamples(PictureFiles(files, (height, width), normalised))


def of(
    name: str,
    train: int = 0,
    test: int = 0,
    seed: int = 0,
    *,
    size: Sequence[int] = (),
    normalised: bool = False,
) -> Task:
    """Load a data set by name: ``digits``, a folder of MNIST's four files, or of ``train/CLASS/…`` images.

    Args:
        name: ``digits`` or the path of a folder.
        train: The most training examples, chosen at random; 0: all.
        test: The most test examples; 0: all.
        seed: The random seed of the choice.
        size: As for :func:`pictures`; other data sets keep theirs.
        normalised: As for :func:`pictures`; digits and MNIST's files always have values 0 to 1.

    Raises:
        SourceError: If there is no such data set.
    """
    if min(train, test) < 0:
        raise SourceError(f"numbers of examples are 0, for all, or more; got train={train}, test={test}")
    if problem := find_data_problem(name):
        raise MissingError(problem)
    folder = expanded(Path(name))
    if (folder / "train").is_dir():
        return pictures(folder, folder.name, train, test, seed, size=size, normalised=normalised)
    base = digits_task() if name == "digits" else idx(folder, folder.name)
    return fewer(base, train or len(base.train), test or len(base.test), seed)


def digits_task(test: float = 0.25) -> Task:
    """Return the 1,797 digits of scikit-learn as a task; every fourth image of each class is for testing.

    Args:
        test: The fraction of the images of each class that is for testing, above 0 and below 1.

    Raises:
        SourceError: If scikit-learn is not installed.
        ValueError: If the fraction is out of range.
    """
    if not 0 < test < 1:
        raise ValueError(f"test must be above 0 and below 1, got {test:g}; for example test=0.25")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SourceError("digits need scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    inputs, labels = torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target).long()
    share, held = Fraction(test).limit_denominator(len(labels)), torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        own = (labels == label).nonzero()[:, 0]
        held[own] = torch.tensor([ceil((i + 1) * share) > ceil(i * share) for i in range(len(own))])
    return Task("digits", Examples(inputs[~held], labels[~held]), Examples(inputs[held], labels[held]), (*range(10),))


def fewer(base: Task, train: int, test: int, seed: int = 0) -> Task:
    """Return a random subset of a task, with at most ``train`` training and ``test`` test examples.

    Args:
        base: The task.
        train: The most training examples.
        test: The most test examples.
        seed: The random seed of the choice.
    """

    def choose(part: ExampleSet, n: int) -> ExampleSet:
        return part.subset(torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:n])

    return Task(base.name, choose(base.train, train), choose(base.test, test), base.classes)


def _changed(base: Task, name: str, change: Any) -> Task:
    return replace(base, name=name, train=ChangedExamples(base.train, change), test=ChangedExamples(base.test, change))


def _of(part: ExampleSet, group: Sequence[int], relabel: bool) -> Examples:
    known = part.labels_of()
    labels = part.take(torch.arange(len(part))).labels if known is None else known
    mine = part.take(torch.isin(labels, torch.tensor(group)).nonzero()[:, 0])
    return Examples(mine.inputs, torch.searchsorted(torch.tensor(group), mine.labels)) if relabel else mine


def _idx(folder: Path, name: str, dims: int) -> Tensor:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise SourceError(f"{folder} has no {name} (or {name}.gz); give the folder of the four files")
    try:
        raw = read_content(path, _MOST)
    except InputError as error:
        raise SourceError(str(error)) from error
    shape = tuple(int.from_bytes(raw[4 * i + 4 : 4 * i + 8], "big") for i in range(dims))
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != 4 + 4 * dims + prod(shape) or not all(shape):
        raise SourceError(f"{path} is not a whole file of bytes in the idx format; fetch it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())
