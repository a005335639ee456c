"""Task sequences for continual learning: one image data set, transformed or split by classes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.core.limits import check_memory, check_regular, expanded, read_head
from regrow.core.names import DIGITS, find_data_problem
from regrow.core.tasks import Examples, ExampleSet, ExamplesView, Task, input_shape
from regrow.data.datasets import StreamedExamples
from regrow.data.halves import MissingError, SourceError
from regrow.data.vision import PictureFiles, check_pixels, image_files, normalise_, open_image, read_digits

_MAX_BYTES = 2**28  # of a file that is read
_IN_MEMORY = 2**30  # bytes of images that are read into memory


def permuted_tasks(base: Task, n: int, seed: int = 0) -> list[Task]:
    """Return tasks of the same images with the pixels in a different fixed order in each; the first unchanged.

    All channels of a pixel move together.
    """
    generator, pixels = torch.Generator().manual_seed(seed), prod(input_shape(base.train)[1:])
    orders = [torch.arange(pixels), *(torch.randperm(pixels, generator=generator) for _ in range(n - 1))]

    def permute(order: Tensor, x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, order].view_as(x)

    return [_changed(base, f"permuted-{i + 1}", partial(permute, order)) for i, order in enumerate(orders)]


def rotated_tasks(base: Task, n: int) -> list[Task]:
    """Return tasks of the same images, rotated further in each task, from 0 up to 180 degrees (exclusive).

    Rotation is bilinear; pixels from outside the image are 0.
    """

    def rotate(angle: float, x: Tensor) -> Tensor:
        turn = torch.deg2rad(torch.tensor(angle))
        matrix = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
        matrix = torch.cat([matrix, torch.zeros(2, 1)], 1)
        grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    angles = [180.0 * i / n for i in range(n)]
    return [_changed(base, f"rotated-{angle:g}", partial(rotate, angle)) for angle in angles]


def split(base: Task, n: int, *, relabel: bool = False) -> list[Task]:
    """Split a data set by classes into ``n`` tasks with equally many classes each, in their order.

    With ``relabel``, each task numbers its classes from 0 (domain-incremental).
    """
    size, rest = divmod(len(base.classes), n)
    if rest:
        raise SourceError(f"{len(base.classes)} classes do not divide into {n} equal tasks; take a divisor")

    def choose(part: ExampleSet, group: tuple[int, ...]) -> Examples:
        known = part.labels_of()
        labels = part.take(torch.arange(len(part))).labels if known is None else known
        mine = part.take(torch.isin(labels, torch.tensor(group)).nonzero()[:, 0])
        return Examples(mine.inputs, torch.searchsorted(torch.tensor(group), mine.labels)) if relabel else mine

    tasks = []
    for i in range(0, len(base.classes), size):
        group = base.classes[i : i + size]
        name, classes = f"classes {group[0]}-{group[-1]}", tuple(range(size)) if relabel else group
        tasks.append(Task(name, choose(base.train, group), choose(base.test, group), classes))
    return tasks


def alike(tasks: Sequence[Task], shape: Sequence[int] = ()) -> list[Task]:
    """Return the tasks with all images converted to one size and number of channels.

    Images are resized bilinearly, with antialiasing; grey becomes three equal channels, colours become their mean.

    >>> small, large = (Examples(torch.ones(2, c, n, n), torch.zeros(2).long()) for c, n in ((1, 8), (3, 32)))
    >>> [task.train.inputs.shape[1:] for task in alike([Task("a", small, small, (0,)), Task("b", large, large, (0,))])]
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
    """Read a data set in the four files of MNIST (``train-images-idx3-ubyte`` etc., or ``.gz``); values 0 to 1."""
    halves = []
    for half in ("train", "t10k"):
        pixels = _idx(Path(folder), f"{half}-images-idx3-ubyte", 3)
        labels = _idx(Path(folder), f"{half}-labels-idx1-ubyte", 1)
        if len(pixels) != len(labels):
            raise SourceError(f"{folder}: {len(pixels)} {half} images have {len(labels)} labels; fetch the files again")
        check_memory(8 * pixels.numel(), f"the {half} set of {folder}", "take a smaller data set")
        halves.append(Examples(pixels.float().unsqueeze(1) / 255, labels.long()))
    train, test = halves
    known, tested = (set(half.labels.tolist()) for half in halves)
    if train.inputs.shape[1:] != test.inputs.shape[1:] or not tested <= known:
        raise SourceError(f"{folder}: training and test images are not of one size and classes; fetch them again")
    return Task(name, train, test, tuple(sorted(known)))


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
    has another size, or all need more than 1 GiB. ``size`` is ``[H, W]``; empty: that of the first training image, in
    the order of classes and file names. ``train`` and ``test`` are the most images of each, chosen at random; 0: all.
    """
    halves = [Path(folder) / half for half in ("train", "test")]
    classes = sorted({path.name for half in halves if half.is_dir() for path in half.iterdir() if path.is_dir()})
    result, present = list[ExampleSet](), set[int]()
    for half, n in zip(halves, (train, test), strict=True):
        files = [(file, i) for i, name in enumerate(classes) for file in image_files(half / name)]
        if not files:
            raise SourceError(f"{half} has no pictures; give a folder with train/CLASS/… and test/CLASS/…")
        present |= {i for _, i in files}
        size = size or image_size(files[0][0])[::-1]
        chosen = random.Random(seed).sample(files, min(n or len(files), len(files)))
        height, width = size
        small = 12 * len(chosen) * width * height <= _IN_MEMORY
        if {image_size(file) for file, _ in chosen} == {(width, height)} and small:
            inputs, labels = read_images([file for file, _ in chosen]), torch.tensor([label for _, label in chosen])
            result.append(Examples(normalise_(inputs) if normalised else inputs, labels))
        else:
            result.append(StreamedExamples(PictureFiles(tuple(chosen), (height, width), normalised)))
    return Task(name, result[0], result[1], tuple(sorted(present)))


def of(
    name: str, train: int = 0, test: int = 0, seed: int = 0, *, size: Sequence[int] = (), normalised: bool = False
) -> Task:
    """Load a data set by name: ``digits``, a folder of MNIST's four files, or of ``train/CLASS/…`` images.

    ``train`` and ``test`` are the most examples of each, chosen at random (0: all); ``size`` and ``normalised`` are as
    for :func:`pictures`. Digits and MNIST's files keep their size, and have values 0 to 1.
    """
    if min(train, test) < 0:
        raise SourceError(f"numbers of examples are 0, for all, or more; got train={train}, test={test}")
    if problem := find_data_problem(name):
        raise MissingError(problem)
    folder = expanded(Path(name))
    if (folder / "train").is_dir():
        return pictures(folder, folder.name, train, test, seed, size=size, normalised=normalised)
    base = digits_task() if name == DIGITS else idx(folder, folder.name)
    return fewer(base, train or len(base.train), test or len(base.test), seed)


def digits_task() -> Task:
    """Return the 1,797 digits of scikit-learn as a task; every fourth image of each class is for testing."""
    inputs, labels = read_digits()
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        held[(labels == label).nonzero()[::4, 0]] = True
    return Task("digits", Examples(inputs[~held], labels[~held]), Examples(inputs[held], labels[held]), (*range(10),))


def fewer(base: Task, train: int, test: int, seed: int = 0) -> Task:
    """Return a random subset of a task, with at most ``train`` training and ``test`` test examples."""

    def choose(part: ExampleSet, n: int) -> ExampleSet:
        return part.subset(torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:n])

    return Task(base.name, choose(base.train, train), choose(base.test, test), base.classes)


def _changed(base: Task, name: str, change: Callable[[Tensor], Tensor]) -> Task:
    return replace(base, name=name, train=ExamplesView(base.train, change), test=ExamplesView(base.test, change))


def _idx(folder: Path, name: str, dims: int) -> Tensor:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise SourceError(f"{folder} has no {name} (or {name}.gz); give the folder of the four files")
    raw = read_head(path, _MAX_BYTES)
    shape = tuple(int.from_bytes(raw[4 * i + 4 : 4 * i + 8], "big") for i in range(dims))
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != 4 + 4 * dims + prod(shape) or not all(shape):
        raise SourceError(f"{path} is not a whole file of bytes in the idx format; fetch it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


def read_images(files: Sequence[Path]) -> Tensor:
    """Read images at their own size, which must be the same for all, ``[N, 3, H, W]`` float32, values 0 to 1."""
    width, height = open_image(files[0]).size
    needed = 27 * len(files) * width * height
    check_memory(needed, f"{len(files)} images of {width} × {height} pixels", "take fewer, or scale them down")
    result = np.empty((len(files), height, width, 3), np.uint8)
    for i, file in enumerate(files):
        result[i] = np.asarray(open_image(file))
    return torch.from_numpy(result).permute(0, 3, 1, 2).float() / 255


def image_size(file: Path) -> tuple[int, int]:
    """Return the size (width, height) of an image, from its header."""
    try:
        from PIL import Image

        check_regular(file)
        with Image.open(file) as opened:
            check_pixels(file, *opened.size)
            return opened.size
    except Exception:  # reading the image says what is wrong with it
        return open_image(file).size
