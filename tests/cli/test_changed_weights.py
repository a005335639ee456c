"""Weights that change while a run reads them: the run is refused, and no result is left."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.conftest import Run
from regrow import nets
from regrow.core.errors import InputError
from regrow.jobs import memory_needs, run_networks
from regrow.nets.loaded import WeightFile, check_unchanged
from regrow.streaming import checkpoint, requirements

SOURCE = ("--keep", "0.7", "--source", "news", "--tokens", "64", "--eval-tokens", "64", "--seq-len", "32")
STREAMED = ("--memory", "64GiB")
NAME = "model.safetensors"
pytestmark = pytest.mark.usefixtures("no_figures")


def changed(path: Path) -> bytes:
    """The file with other numbers, of the same length."""
    tensors = {name: one + 1 if one.is_floating_point() else one for name, one in load_file(path).items()}
    save_file(tensors, path.with_name("new"), {"format": "pt"})
    data = path.with_name("new").read_bytes()
    path.with_name("new").unlink()
    return data


def replaced(path: Path) -> None:
    """Put another file in its place, as downloads and this library do."""
    data = changed(path)
    path.with_name("new").write_bytes(data)
    path.with_name("new").replace(path)


def rewritten(path: Path) -> None:
    """Write other numbers into the file."""
    with path.open("r+b") as file:
        file.write(changed(path))


def disguised(path: Path) -> None:
    """Write other numbers into the file, and set its time back."""
    before = path.stat()
    rewritten(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchanged(path: Path) -> None:
    """Put another file of the same size and time in its place."""
    before, data = path.stat(), changed(path)
    path.with_name("new").write_bytes(data)
    os.utime(path.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("new").replace(path)


def truncated(path: Path) -> None:
    """Cut the last numbers off."""
    os.truncate(path, path.stat().st_size - 64)


def removed(path: Path) -> None:
    """Delete the file."""
    path.unlink()


@pytest.fixture
def model(tiny_language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of its own, too large for memory as a whole."""
    monkeypatch.setattr(requirements, "WHOLE_COPIES", 1e9)
    shutil.copytree(tiny_language_model, tmp_path / "model")
    return tmp_path / "model"


def read_then(
    number: int, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch, folder: str = "model"
) -> list[int]:
    """Act before a tensor of the model is read; gives how many were read."""
    true, count = checkpoint.read_tensor, [0]

    def read(place: checkpoint.TensorPlace, *more: object, **words: object) -> torch.Tensor:
        if place.file.parent.name == folder:
            count[0] += 1
            if count[0] == number:
                act()
        return true(place, *more, **words)

    monkeypatch.setattr(checkpoint, "read_tensor", read)
    return count


def test_untouched_weights_are_read_many_times(regrow: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = read_then(0, lambda: None, monkeypatch)
    code, _, err = regrow("prune", "model", *SOURCE, *STREAMED, "--out", "out")
    assert code == 0 and Path("out/run.json").is_file(), err
    assert READS < count[0] < READS + 40


READS = 150
"""About how many tensors a run reads."""
WAYS = (replaced, rewritten, disguised, exchanged, truncated, removed)
MOMENTS = (2, *range(10, READS, 12))


@pytest.mark.parametrize(("number", "change"), [(one, WAYS[i % len(WAYS)]) for i, one in enumerate(MOMENTS)])
def test_weights_that_change_between_two_reads_are_refused(
    regrow: Run, model: Path, monkeypatch: pytest.MonkeyPatch, number: int, change: Callable[[Path], None]
) -> None:
    count = read_then(number, lambda: change(model / NAME), monkeypatch)
    code, _, err = regrow("prune", "model", *SOURCE, *STREAMED, "--out", "out")
    assert count[0] >= number and code == 2, err
    assert err.count("regrow: ") == 1 and f"model/{NAME}" in err.splitlines()[-1], err
    assert not Path("out/run.json").exists() and not list(Path("out").glob("*.safetensors"))


def at_page(act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Act when the page is written, after which the result is saved."""
    monkeypatch.setattr("regrow.reports.write_run_page", lambda folder: act())


@pytest.mark.parametrize("change", [replaced, disguised])
def test_weights_that_change_after_the_last_read_are_refused(
    regrow: Run, model: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    with monkeypatch.context() as patch:
        at_page(lambda: change(model / NAME), patch)
        code, _, err = regrow("prune", "model", *SOURCE, *STREAMED, "--out", "out")
    assert code == 2 and f"model/{NAME} was " in err and not Path("out/run.json").exists(), err
    code, _, err = regrow("prune", "model", *SOURCE, *STREAMED, "--out", "out")
    assert code == 2 and "model was changed since this run was started" in err


def test_weights_that_change_while_a_run_is_interrupted_are_refused(
    regrow: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        read_then(60, lambda: (_ for _ in ()).throw(KeyboardInterrupt), patch)
        assert regrow("prune", "model", *SOURCE, *STREAMED, "--out", "out")[0] not in (0, 2)
    disguised(model / NAME)
    code, _, err = regrow("prune", "model", *SOURCE, *STREAMED, "--out", "out")
    assert code == 2 and "model was changed since this run was started" in err


def test_weights_that_get_a_hard_link_are_the_same(regrow: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        read_then(90, lambda: os.link(model / NAME, "second"), patch)
        code, _, err = regrow("prune", "model", *SOURCE, *STREAMED, "--out", "out")
    assert code == 0 and Path("second").exists(), err


def test_an_evaluation_of_weights_that_change_is_refused(
    regrow: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("evaluate", "model", "--source", "news", "--eval-tokens", "64", "--seq-len", "32", "--json", "rows.json")
    read_then(15, lambda: replaced(model / NAME), monkeypatch)
    code, _, err = regrow(*words, *STREAMED)
    assert code == 2 and "was replaced or written to" in err and not Path("rows.json").exists(), err


@pytest.mark.parametrize("folder", ["run", "run/before"])
def test_a_recovery_of_weights_that_change_is_refused(
    regrow: Run, model: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    assert regrow("prune", "model", *SOURCE, *STREAMED, "--out", "run")[0] == 0
    monkeypatch.setattr(memory_needs, "SPARE_BYTES", 2**40)
    count = read_then(60, lambda: rewritten(Path(folder, NAME)), monkeypatch, Path(folder).name)
    code, _, err = regrow("recover", "run", "--by", "refit", "--tokens", "64", *STREAMED, "--out", "out")
    assert count[0] >= 60 and code == 2 and f"{folder}/{NAME} was replaced or written to" in err, err
    assert not Path("out/run.json").exists()


@pytest.mark.parametrize("change", [rewritten, disguised])
def test_mapped_weights_that_are_written_to_are_refused(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    shutil.copytree(tiny_language_model, "model")
    at_page(lambda: change(Path("model", NAME)), monkeypatch)
    code, _, err = regrow("prune", "model", *SOURCE, "--out", "out")
    assert code == 2 and f"model/{NAME} was replaced or written to" in err and not Path("out/run.json").exists(), err


def test_weights_that_a_recovery_would_read_again_are_compared(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_language_model, "model")
    assert regrow("prune", "model", *SOURCE, "--out", "untouched")[0] == 0
    true = run_networks.apply

    def late(*given: object) -> object:
        replaced(Path("model", NAME))
        return true(*given)

    monkeypatch.setattr(run_networks, "apply", late)
    code, _, err = regrow("prune", "model", *SOURCE, "--out", "out")  # what is in memory is that of one version
    assert code == 0 and Path("out", NAME).read_bytes() == Path("untouched", NAME).read_bytes(), err


def test_a_file_that_changes_while_a_model_is_loaded_is_refused(
    tiny_language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_language_model, folder)
    assert [one.path for one in nets.load(str(folder)).files] == [folder / NAME]
    true = nets.load.__globals__["load_folder"]
    late = lambda *given, **more: (replaced(folder / NAME), true(*given, **more))[1]  # noqa: E731
    monkeypatch.setitem(nets.load.__globals__, "load_folder", late)
    with pytest.raises(InputError, match="was replaced or written to"):
        nets.load(str(folder))


def test_a_file_is_known_by_its_size_times_and_inode(tmp_path: Path) -> None:
    path = tmp_path / NAME
    save_file({"a": torch.ones(8)}, path)
    kept, read = WeightFile(path, held=True), WeightFile(path)
    check_unchanged([kept, read])
    os.utime(path)
    for one in (kept, read):
        with pytest.raises(InputError, match=r"model\.safetensors was replaced or written to while it was in use"):
            one.check()
    path.rename(tmp_path / "away")
    check_unchanged([kept])  # its content stays mapped
    with pytest.raises(InputError, match="cannot be read any more"):
        check_unchanged([read])
