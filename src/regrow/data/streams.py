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
from regrow.data.vision import ImageFileSet, check_pixels, image_files, normalise_, open_image, read_digits

_MAX_BYTES = 2**28  # of a file that is read
_IN_MEMORY = 2**30  # bytes of images that are read into memory


def permuted_tasks(base: Task, n: int, seed: int = 0) -> list[Task]:
    """Return ``n`` tasks of the same images with the pixels in a different fixed order in each; the first unchanged.

    All channels of a pixel move together.
    """
    generator, pixels = torch.Generator().manual_seed(seed), prod(input_shape(base.train)[1:])
    orders = [torch.arange(pixels), *(torch.randperm(pixels, generator=generator) for _ in range(n - 1))]

    def permute(order: Tensor, x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, order].view_as(x)

    return [_change_images(base, f"permuted-{i + 1}", partial(permute, order)) for i, order in enumerate(orders)]


def rotated_tasks(base: Task, n: int) -> list[Task]:
    """Return ``n`` tasks of the same images, rotated further in each, by ``180 / n`` degrees, beginning with 0.

    Rotation is bilinear; pixels from outside the image are 0.
    """

    def rotate(angle: float, x: Tensor) -> Tensor:
        turn = torch.deg2rad(torch.tensor(angle))
        matrix = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])])
        matrix = torch.cat([matrix, torch.zeros(2, 1)], 1)
        grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    angles = [180.0 * i / n for i in range(n)]
    return [_change_images(base, f"rotated-{angle:g}", partial(rotate, angle)) for angle in angles]


def split_by_classes(base: Task, n: int, *, relabel: bool = False) -> list[Task]:
    """Return ``n`` tasks of a data set with equally many of its classes each, in their order; SourceError otherwise.

    With ``relabel``, each task numbers its classes from 0 (domain-incremental).
    """
    classes_per_task, rest = divmod(len(base.classes), n)
    if rest:
        raise SourceError(f"{len(base.classes)} classes do not divide into {n} equal tasks; take a divisor")

    def choose(part: ExampleSet, classes: Tensor) -> Examples:
        labels = part.labels_of()
        if labels is None:  # they stand in the examples alone: read all
            labels = part.take(torch.arange(len(part))).labels
        chosen = part.take(torch.isin(labels, classes).nonzero()[:, 0])
        # Classes of a task ascend, so that their positions are the new labels.
        return Examples(chosen.inputs, torch.searchsorted(classes, chosen.labels)) if relabel else chosen

    tasks = []
    for i in range(0, len(base.classes), classes_per_task):
        group = base.classes[i : i + classes_per_task]
        train, test = (choose(part, torch.tensor(group)) for part in (base.train, base.test))
        classes = tuple(range(classes_per_task)) if relabel else group
        tasks.append(Task(f"classes {group[0]}-{group[-1]}", train, test, classes))
    return tasks


def resize_tasks(tasks: Sequence[Task], shape: Sequence[int] = ()) -> list[Task]:
    """Return tasks whose images are converted to ``shape`` when they are read: ``[C, H, W]``; empty: of the first task.

    Images are resized bilinearly, with antialiasing; grey becomes three equal channels, colours become their mean.

    >>> small, large = (Examples(torch.ones(2, c, n, n), torch.zeros(2).long()) for c, n in ((1, 8), (3, 32)))
    >>> tasks = resize_tasks([Task("a", small, small, (0,)), Task("b", large, large, (0,))])
    >>> [task.train.inputs.shape[1:] for task in tasks]
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

    return [_change_images(task, task.name, change) for task in tasks]


def load_idx(folder: str | Path, name: str = "images") -> Task:
    """Load MNIST's four files (``train-images-idx3-ubyte`` etc., or ``.gz``), values 0 to 1, or raise SourceError."""
    halves = []
    for half in ("train", "t10k"):
        pixels = _read_idx(Path(folder), f"{half}-images-idx3-ubyte", 3)
        labels = _read_idx(Path(folder), f"{half}-labels-idx1-ubyte", 1)
        if len(pixels) != len(labels):
            raise SourceError(f"{folder}: {len(pixels)} {half} images have {len(labels)} labels; fetch the files again")
        check_memory(8 * pixels.numel(), f"the {half} set of {folder}", "take a smaller data set")
        halves.append(Examples(pixels.float().unsqueeze(1) / 255, labels.long()))
    train, test = halves
    classes, test_classes = (set(half.labels.tolist()) for half in halves)
    if train.inputs.shape[1:] != test.inputs.shape[1:] or not test_classes <= classes:
        raise SourceError(f"{folder}: training and test images are not of one size and classes; fetch them again")
    return Task(name, train, test, tuple(sorted(classes)))


def load_image_folder(
    folder: str | Path,
    name: str = "pictures",
    train: int = 0,
    test: int = 0,
    seed: int = 0,
    *,
    size: Sequence[int] = (),
    normalised: bool = False,
) -> Task:
    """Load an image data set from ``train/CLASS/…`` and ``test/CLASS/…``, or raise SourceError.

    Classes are numbered in the order of their names; a folder without images has a number, and is no class of the
    task. All images get one size. To a square one, others are scaled and cropped as ``regrow evaluate`` does it; to any
    other, they are scaled, which changes their aspect ratio. The images of a half are read while they are used if any
    has another size, or all need more than 1 GiB. ``size`` is ``[H, W]``; empty: that of the first training image, in
    the order of classes and file names. ``train`` and ``test`` are the most images of each, chosen at random; 0: all.
    ``normalised``: as torchvision's pretrained networks expect; else values are 0 to 1.
    """
    halves = [Path(folder) / half for half in ("train", "test")]
    folders = (path for half in halves if half.is_dir() for path in half.iterdir() if path.is_dir())
    classes = sorted({path.name for path in folders if not path.name.startswith(".")})
    result, present = list[ExampleSet](), set[int]()
    for half, n in zip(halves, (train, test), strict=True):
        files = [(file, i) for i, name in enumerate(classes) for file in image_files(half / name)]
        if not files:
            raise SourceError(f"{half} has no pictures; give a folder with train/CLASS/… and test/CLASS/…")
        present |= {i for _, i in files}
        size = size or image_size(files[0][0])[::-1]
        chosen = random.Random(seed).sample(files, min(n or len(files), len(files)))
        height, width = size
        small = 12 * len(chosen) * width * height <= _IN_MEMORY  # three channels of float32
        if {image_size(file) for file, _ in chosen} == {(width, height)} and small:
            inputs = read_images([file for file, _ in chosen])
            inputs = normalise_(inputs) if normalised else inputs
            result.append(Examples(inputs, torch.tensor([label for _, label in chosen])))
        else:
            result.append(StreamedExamples(ImageFileSet(tuple(chosen), (height, width), normalised)))
    return Task(name, result[0], result[1], tuple(sorted(present)))


def load_task(
    name: str, train: int = 0, test: int = 0, seed: int = 0, *, size: Sequence[int] = (), normalised: bool = False
) -> Task:
    """Load a data set by name: ``digits``, a folder of MNIST's four files, or of ``train/CLASS/…`` images.

    ``train`` and ``test`` are the most examples of each, chosen at random (0: all); ``size`` and ``normalised`` are as
    for :func:`load_image_folder`. Digits and MNIST's files keep their size, and have values 0 to 1. Raises
    SourceError; MissingError, a kind of it, if there is no such data set.
    """
    if min(train, test) < 0:
        raise SourceError(f"numbers of examples are 0, for all, or more; got train={train}, test={test}")
    if problem := find_data_problem(name):
        raise MissingError(problem)
    folder = expanded(Path(name))
    if (folder / "train").is_dir():
        return load_image_folder(folder, folder.name, train, test, seed, size=size, normalised=normalised)
    base = load_digits() if name == DIGITS else load_idx(folder, folder.name)
    return sample_task(base, train or len(base.train), test or len(base.test), seed)


def load_digits() -> Task:
    """Return the 1,797 digits of scikit-learn as a task; every fourth image of each class is for testing."""
    inputs, labels = read_digits()
    test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        test[(labels == label).nonzero()[::4, 0]] = True
    return Task("digits", Examples(inputs[~test], labels[~test]), Examples(inputs[test], labels[test]), (*range(10),))


def sample_task(base: Task, train: int, test: int, seed: int = 0) -> Task:
    """Return a task with a random subset of at most ``train`` training and ``test`` test examples of another one."""

    def choose(part: ExampleSet, n: int) -> ExampleSet:
        return part.subset(torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:n])

    return Task(base.name, choose(base.train, train), choose(base.test, test), base.classes)


def _change_images(base: Task, name: str, change: Callable[[Tensor], Tensor]) -> Task:
    """Return a task whose images ``[N, C, H, W]`` are changed by a function when they are read."""
    return replace(base, name=name, train=ExamplesView(base.train, change), test=ExamplesView(base.test, change))


def _read_idx(folder: Path, name: str, dims: int) -> Tensor:
    """Return an idx file of bytes, or its ``.gz``, as uint8 with ``dims`` dimensions; SourceError if it is not one."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise SourceError(f"{folder} has no {name} (or {name}.gz); give the folder of the four files")
    raw = read_head(path, _MAX_BYTES)
    shape = tuple(int.from_bytes(raw[4 * i : 4 * i + 4], "big") for i in range(1, dims + 1))
    begin = 4 + 4 * dims  # behind the type (8: bytes), the number of dimensions, and their sizes
    if raw[:4] != bytes([0, 0, 8, dims]) or len(raw) != begin + prod(shape) or not all(shape):
        raise SourceError(f"{path} is not a whole file of bytes in the idx format; fetch it again")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=begin).reshape(shape).copy())


def read_images(files: Sequence[Path]) -> Tensor:
    """Return images of files, all of one size, as ``[N, 3, H, W]`` float32, values 0 to 1."""
    width, height = open_image(files[0]).size
    needed = 27 * len(files) * width * height  # three channels: bytes, float32, and their quotient by 255
    check_memory(needed, f"{len(files)} images of {width} × {height} pixels", "take fewer, or scale them down")
    result = np.empty((len(files), height, width, 3), np.uint8)
    for i, file in enumerate(files):
        result[i] = np.asarray(open_image(file))
    return torch.from_numpy(result).permute(0, 3, 1, 2).float() / 255


def image_size(file: Path) -> tuple[int, int]:
    """Return the size (width, height) of an image, from its header; SourceError if it cannot be read."""
    try:
        from PIL import Image

        check_regular(file)
        with Image.open(file) as opened:
            check_pixels(file, *opened.size)
            return opened.size
    except Exception:  # reading the image says what is wrong with it
        return open_image(file).size
