"""Sequences of tasks: the same images changed, split, read from files, or taken from any data sets."""

import gzip
from pathlib import Path

import pytest
import torch

from regrow.core.errors import InputError
from regrow.core.tasks import Examples, Task
from regrow.data import SourceError, streams
from regrow.data.datasets import StreamedExamples
from regrow.data.streams import (
    load_digits,
    load_idx,
    load_image_folder,
    permuted_tasks,
    resize_tasks,
    rotated_tasks,
    sample_task,
    split_by_classes,
)


def test_permuted_tasks_hold_the_same_pixels_in_one_order_per_task() -> None:
    base = load_digits()
    first, second, third = permuted_tasks(base, 3, seed=1)
    assert torch.equal(first.train.inputs, base.train.inputs)
    order = second.train.inputs.flatten(1), third.train.inputs.flatten(1)
    for rows in order:
        assert not torch.equal(rows, base.train.inputs.flatten(1))
        assert torch.equal(rows.sort(1)[0], base.train.inputs.flatten(1).sort(1)[0])
    assert torch.equal(permuted_tasks(base, 3, seed=1)[2].test.inputs, third.test.inputs)
    assert not torch.equal(permuted_tasks(base, 3, seed=2)[2].test.inputs, third.test.inputs)


def test_rotated_tasks_turn_further_and_further() -> None:
    base = load_digits()
    tasks = rotated_tasks(base, 2)
    assert torch.allclose(tasks[0].train.inputs, base.train.inputs, atol=1e-6)
    quarter = base.test.inputs.rot90(1, (2, 3)), base.test.inputs.rot90(-1, (2, 3))
    assert any(torch.allclose(tasks[1].test.inputs, one, atol=1e-4) for one in quarter)


@pytest.mark.parametrize("relabel", [False, True])
def test_split_tasks_share_no_image_and_lose_none(relabel: bool) -> None:
    base = load_digits()
    tasks = split_by_classes(base, 5, relabel=relabel)
    assert sum(len(task.train) for task in tasks) == len(base.train)
    for i, task in enumerate(tasks):
        assert set(task.train.labels.tolist()) == ({0, 1} if relabel else {2 * i, 2 * i + 1}) == set(task.classes)
    with pytest.raises(SourceError, match="10 classes do not divide into 3"):
        split_by_classes(base, 3)


def test_pictures_of_several_sets_take_the_form_of_the_first() -> None:
    small, plain = load_digits(), torch.rand(4, 3, 16, 16)
    large = Task("large", Examples(plain, torch.arange(4)), Examples(plain, torch.arange(4)), (0, 1, 2, 3))
    first, second = resize_tasks([small, large])
    assert torch.equal(first.train.inputs, small.train.inputs) and second.name == "large"
    means = plain.mean(1, keepdim=True).unflatten(2, (8, 2)).unflatten(4, (8, 2)).mean((3, 5))
    assert second.test.inputs.shape == (4, 1, 8, 8) and float((second.test.inputs - means).abs().max()) < 0.35
    assert torch.allclose(second.test.inputs.mean(), plain.mean(), atol=0.02)
    coloured = resize_tasks([large, small])[1].train.inputs
    assert coloured.shape[1:] == (3, 16, 16) and torch.equal(coloured[:, 0], coloured[:, 2])


def test_training_and_test_images_are_apart() -> None:
    base = load_digits()
    train = {row.numpy().tobytes() for row in base.train.inputs}
    assert len(base.train) + len(base.test) == 1797
    assert sum(row.numpy().tobytes() in train for row in base.test.inputs) == 0
    assert len(sample_task(base, 100, 50).train) == 100 and len(sample_task(base, 9999, 50).train) == len(base.train)


def test_pictures_in_folders_are_a_task(tmp_path: Path) -> None:
    """As many as are asked for, drawn by the seed, each with its class and its own pixels."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    for half, n in (("train", 6), ("test", 3)):
        for label, name in enumerate(("apple", "pear")):
            (tmp_path / half / name).mkdir(parents=True)
            for i in range(n):
                image.new("RGB", (5, 4), (40 * i, 100 * label, 7)).save(tmp_path / half / name / f"{i}.png")
    base = load_image_folder(tmp_path)
    assert (len(base.train), len(base.test), base.classes) == (12, 6, (0, 1))
    assert base.train.inputs.shape == (12, 3, 4, 5)
    assert torch.equal((base.train.inputs[:, 1, 0, 0] * 255).round(), 100.0 * base.train.labels)
    assert sorted((base.train.inputs[:, 0, 2, 3] * 255).round().tolist()) == sorted(2 * [40.0 * i for i in range(6)])
    drawn = [load_image_folder(tmp_path, train=5, test=2, seed=seed).train.inputs for seed in (1, 1, 2)]
    assert len(drawn[0]) == 5 and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    (tmp_path / "train" / "banana").mkdir()
    base = load_image_folder(tmp_path)
    assert base.classes == (0, 2) and set(base.train.labels.tolist()) == {0, 2}
    with pytest.raises(SourceError, match="train has no pictures; give a folder with train/CLASS/… and test/CLASS/…"):
        load_image_folder(tmp_path / "train")


def test_pictures_that_differ_in_size_or_are_for_a_network_with_weights_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    for half in ("train", "test"):
        for label, name in enumerate(("apple", "pear")):
            (tmp_path / half / name).mkdir(parents=True)
            for i in range(2):
                image.new("RGB", (6, 4), (40 * i, 100 * label, 7)).save(tmp_path / half / name / f"{i}.png")
    whole = load_image_folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(streams, "_IN_MEMORY", 0)
        streamed = load_image_folder(tmp_path)
    assert isinstance(streamed.train, StreamedExamples)
    for seed in (None, 1):
        one, other = (next(part.train.batches(3, seed)) for part in (whole, streamed))
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.labels, other.labels)
    for name in ("train", "test"):
        image.new("RGB", (7, 9), (200, 200, 7)).save(tmp_path / name / "pear" / "x.png")
    batch = next(load_image_folder(tmp_path, seed=3).train.batches(5))
    assert batch.inputs.shape[0] == 5 and float(batch.inputs.max()) <= 1
    fitted = load_image_folder(tmp_path, size=(8, 8), normalised=True)
    batch, known = next(fitted.train.batches(5)), fitted.train.labels_of()
    assert batch.inputs.shape == (5, 3, 8, 8) and float(batch.inputs.min()) < -1 and torch.equal(batch.labels, known)


def test_all_pictures_get_the_size_of_the_first_training_picture(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    for half, sizes in (("train", [(6, 4), (5, 5), (7, 9)]), ("test", [(8, 8), (9, 3)])):
        (tmp_path / half / "apple").mkdir(parents=True)
        for i, size in enumerate(sizes):
            image.new("RGB", size, (40 * i, 0, 7)).save(tmp_path / half / "apple" / f"{i}.png")
    for seed in range(4):
        task = load_image_folder(tmp_path, train=1, test=1, seed=seed)
        assert [next(part.batches(1)).inputs.shape for part in (task.train, task.test)] == [(1, 3, 4, 6)] * 2
    (tmp_path / "train" / "apple" / "1.png").write_bytes(b"damaged")
    with pytest.raises(SourceError, match=r"1\.png is not a readable image"):
        load_image_folder(tmp_path)


def written(folder: Path, zipped: bool = False) -> None:
    for half, n in (("train", 4), ("t10k", 2)):
        images = bytes([0, 0, 8, 3]) + b"".join(k.to_bytes(4, "big") for k in (n, 2, 3)) + bytes(range(6)) * n
        labels = bytes([0, 0, 8, 1]) + n.to_bytes(4, "big") + bytes(i % 2 for i in range(n))
        for name, data in ((f"{half}-images-idx3-ubyte", images), (f"{half}-labels-idx1-ubyte", labels)):
            (folder / (f"{name}.gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("zipped", [False, True])
def test_the_four_files_of_mnist_are_read(tmp_path: Path, zipped: bool) -> None:
    written(tmp_path, zipped)
    task = load_idx(tmp_path, "tiny")
    assert task.train.inputs.shape == (4, 1, 2, 3) and task.classes == (0, 1)
    assert torch.allclose(task.test.inputs[1, 0, 1], torch.tensor([3.0, 4.0, 5.0]) / 255)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no train-images-idx3-ubyte"):
        load_idx(tmp_path)
    written(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    for data in (path.read_bytes()[:-1], path.read_bytes()[:3], b"\0\0\x08\x03" + b"\xff" * 12, b""):
        path.write_bytes(data)
        with pytest.raises(SourceError, match="not a whole file of bytes in the idx format"):
            load_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="not a whole gzip file"):
        load_idx(tmp_path)


def test_changed_examples_are_the_same_in_any_batch() -> None:
    """Inputs changed when they are read equal those changed all at once, bit for bit, in batches of any size."""
    base = load_digits()
    for tasks in (permuted_tasks(base, 2), rotated_tasks(base, 3)):
        change = tasks[-1].test.change
        whole = change(base.test.inputs)
        for size in (1, 7, 500):
            read = torch.cat([batch.inputs for batch in tasks[-1].test.batches(size)])
            assert torch.equal(read, whole), (tasks[-1].name, size)
        some = torch.tensor([5, 2, 9])
        assert torch.equal(tasks[-1].test.subset(some).take(torch.tensor([1])).inputs, whole[[2]])
