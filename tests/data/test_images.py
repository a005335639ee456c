"""Images as sources."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from regrow.data import Half, SourceError, digits, images, streams, vision
from regrow.data.vision import MEAN, STD

Image = pytest.importorskip("PIL.Image", reason="needs pillow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, five and four images of one colour each, of odd sizes."""
    for label, (name, count) in enumerate({"apple": 5, "pear": 4}.items()):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20 + i, 30), (40 * i, 100 * label, 7)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "readme.txt").write_text("not a class")
    return tmp_path


def test_a_folder_of_classes_in_two_halves(folder: Path) -> None:
    """Every image is in exactly one half, with its class, cut to size and normalised."""
    parts = [images("fruit", folder, size=8, batch_size=2, half=h) for h in (Half.CALIBRATION, Half.EVALUATION)]
    files = [{file for file, _ in part.batches.dataset.files} for part in parts]
    assert [len(f) for f in files] == [5, 4]
    assert not files[0] & files[1]
    assert [len(part) for part in parts] == [3, 2]
    for part in parts:
        for number, batch in enumerate(part):
            pixels = batch.args[0] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
            assert batch.args[0].shape[1:] == (3, 8, 8)
            for row, (file, label) in zip(pixels, part.batches.dataset.files[number * 2 :], strict=False):
                assert file.parent.name == ("apple", "pear")[label]
                expected = torch.tensor([40 * int(file.stem), 100 * label, 7]) / 255
                assert torch.allclose(row.amax((1, 2)), expected, atol=1e-5)
                assert torch.allclose(row.amin((1, 2)), expected, atol=1e-5)
            assert batch.labels.tolist() == [
                label for _, label in part.batches.dataset.files[number * 2 : number * 2 + 2]
            ]
    assert parts[0].tokens == 5
    assert len(images("fruit", folder, n=2, half=Half.WHOLE).batches.dataset.files) == 2
    assert parts[0].batches[-1].labels.tolist() == parts[0].batches[2].labels.tolist()
    with pytest.raises(IndexError):
        parts[0].batches[3]


@pytest.mark.parametrize("normalised", [True, False])
def test_learning_sees_the_images_that_pruning_and_evaluation_see(normalised: bool, tmp_path: Path) -> None:
    """Images of the network's own size are taken as they are, normalised or not in both."""
    for half in ("train", "test"):
        (tmp_path / half / "apple").mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / half / "apple" / "0.png")
    learned = streams.load_task(str(tmp_path), normalised=normalised).test.inputs
    (batch,) = images("fruit", tmp_path / "test", size=8, half=Half.WHOLE, normalised=normalised)
    assert torch.equal(learned, batch.args[0])
    raw = torch.from_numpy(pixels).movedim(-1, 0).float() / 255
    assert torch.equal(learned[0], raw) is not normalised


def test_an_image_that_is_too_large_is_found_before_images_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "MAX_PIXELS", 100)
    for half, side in (("train", 10), ("test", 11)):
        (tmp_path / half / "apple").mkdir(parents=True)
        Image.new("RGB", (side, side)).save(tmp_path / half / "apple" / "0.png")
    with pytest.raises(SourceError, match=r"0\.png is 11 × 11 pixels, at most 100 are read"):
        streams.load_task(str(tmp_path))


def test_bad_folders_are_errors(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Missing, without classes, or with a file that is no image."""
    with pytest.raises(SourceError, match="not a folder"):
        images("fruit", folder / "gone")
    with pytest.raises(SourceError, match="CLASS"):
        images("fruit", tmp_path_factory.mktemp("none"))
    with pytest.raises(SourceError, match="at least 1; got n="):
        images("fruit", folder, n=0)
    (folder / "apple" / "0.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match="not a readable image"):
        list(images("fruit", folder, size=8))


def test_digits() -> None:
    """All ten classes in both halves, nothing in both, the same each time."""
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    parts = [digits(half=h, batch_size=2000) for h in (Half.CALIBRATION, Half.EVALUATION)]
    assert sum(part.tokens for part in parts) == 1797
    counts = [part.batches[0].labels.bincount() for part in parts]
    assert all((c >= 85).all() and len(c) == 10 for c in counts)
    whole = {tuple(row.flatten().tolist()) for row in digits(half=Half.WHOLE, batch_size=2000).batches[0].args[0]}
    rows = [{tuple(row.flatten().tolist()) for row in part.batches[0].args[0]} for part in parts]
    assert rows[0] | rows[1] == whole
    assert not rows[0] & rows[1]
    big = digits(n=5, size=28, channels=3, seed=1)
    assert big.batches[0].args[0].shape == (5, 3, 28, 28)
    assert torch.equal(big.batches[0].args[0], digits(n=5, size=28, channels=3, seed=1).batches[0].args[0])
    assert not torch.equal(big.batches[0].args[0], digits(n=5, size=28, channels=3, seed=2).batches[0].args[0])


def test_hidden_folders_and_the_halves_of_a_task_are_no_classes(folder: Path) -> None:
    root = folder.with_name(f"{folder.name}-task")
    for half in ("train", "test"):
        shutil.copytree(folder, root / half)
        (root / half / ".ipynb_checkpoints").mkdir()
    with pytest.raises(SourceError, match=r"train and test, which are no classes; give .*/test"):
        images("fruit", root)
    task = streams.load_image_folder(root)
    assert task.classes == (0, 1) and set(task.train.labels_of().tolist()) == {0, 1}
