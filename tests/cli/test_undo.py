"""``regrow undo`` looks at every file of ``before/`` first; what runs keep there shares no file with other runs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.conftest import Run, RunOnce
from regrow.jobs import parents
from regrow.jobs.parents import undo_run
from regrow.store import load, replacing
from regrow.store.errors import StoreError

CODE = ("--code", "toys:classifier")
PRUNE = ("--method", "magnitude", "--source", "digits", "--eval-tokens", "64")
BEFORE = Path("two/before")
WEIGHTS = BEFORE / "model.safetensors"
pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def chain(regrow: Run, run_once: RunOnce) -> Run:
    """The command line, after a prune and a growth of one network."""
    run_once("prune", "toys:classifier", "--keep", "0.7", *PRUNE, out="one")
    run_once("grow", "one", "--channels", "+25%", *CODE, out="two")
    return regrow


def content(folder: Path) -> dict[str, object]:
    """Path → the bytes of a file, the target of a link, or the kind of anything else."""
    return {
        str(path.relative_to(folder)): path.readlink()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else path.stat().st_mode
        for path in folder.rglob("*")
    }


def flip(name: str, at: int) -> Callable[[], None]:
    """Flip a bit of a file."""

    def damage() -> None:
        data = bytearray((BEFORE / name).read_bytes())
        data[at] ^= 0x40
        (BEFORE / name).write_bytes(data)

    return damage


def text(name: str, old: str, new: str) -> Callable[[], None]:
    """Change the text of a file."""

    def damage() -> None:
        before = (BEFORE / name).read_text()
        assert old in before
        (BEFORE / name).write_text(before.replace(old, new, 1))

    return damage


def cut(name: str, size: int) -> Callable[[], None]:
    """Truncate a file."""
    return lambda: os.truncate(BEFORE / name, size)


def gone(name: str) -> Callable[[], None]:
    """Delete a file."""
    return lambda: (BEFORE / name).unlink()


def other(name: str, make: Callable[[Path], object]) -> Callable[[], None]:
    """Put something else in the place of a file."""

    def damage() -> None:
        (BEFORE / name).rename("away")
        make(BEFORE / name)

    return damage


def no_folder(make: Callable[[], object]) -> Callable[[], None]:
    """Put something else in the place of the folder."""

    def damage() -> None:
        BEFORE.rename("away")
        make()

    return damage


DAMAGE: dict[str, Callable[[], object]] = {
    "a bit of the weights": flip("model.safetensors", -100),
    "a bit of the header": flip("model.safetensors", 12),
    "truncated weights": cut("model.safetensors", 2000),
    "empty weights": cut("model.safetensors", 0),
    "longer weights": lambda: WEIGHTS.write_bytes(WEIGHTS.read_bytes() + b"\0"),
    "no weights": gone("model.safetensors"),
    "a link to the weights": other("model.safetensors", lambda path: path.symlink_to(Path("away").resolve())),
    "a link to nothing": other("model.safetensors", lambda path: path.symlink_to("nowhere")),
    "a folder for the weights": other("model.safetensors", Path.mkdir),
    "a pipe for the weights": other("model.safetensors", os.mkfifo),
    "weights of another run": lambda: shutil.copy("two/model.safetensors", WEIGHTS),
    "a second name, changed through it": lambda: [os.link(WEIGHTS, "twin"), os.truncate("twin", 3000)],
    "no shapes": gone("shapes.json"),
    "empty shapes": cut("shapes.json", 0),
    "shapes of another run": lambda: shutil.copy("two/shapes.json", BEFORE / "shapes.json"),
    "a bit of the shapes": flip("shapes.json", 40),
    "a bit of the recorded output": flip("probe.st", -20),
    "no recorded output": gone("probe.st"),
    "another setting": text("run.json", '"keep": 0.7', '"keep": 0.6'),
    "no run.json": gone("run.json"),
    "no ledger": gone("ledger.json"),
    "a measurement": text("metrics.jsonl", ": 6", ": 7"),
    "a file too many": lambda: (BEFORE / "model.safetensors.index.json").write_text("{}"),
    "a bit of the one before": flip("before/model.safetensors", -100),
    "none before it": lambda: shutil.rmtree(BEFORE / "before"),
    "an empty folder": no_folder(BEFORE.mkdir),
    "a link to the folder": no_folder(lambda: BEFORE.symlink_to(Path("away").resolve())),
    "a file for the folder": no_folder(BEFORE.touch),
    "no folder": no_folder(lambda: None),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_copy_is_refused_and_the_run_stays(chain: Run, what: str) -> None:
    DAMAGE[what]()
    there = content(Path("two"))
    for out in (None, Path("new")):
        with pytest.raises(StoreError) as refused:
            undo_run(Path("two"), out)
        assert "two/before" in str(refused.value) and "\n" not in str(refused.value)
    assert content(Path("two")) == there and not Path("new").exists()
    assert {path.name for path in Path().iterdir()} <= {"one", "two", "away", "twin"}


def test_the_command_says_in_a_line_what_is_damaged(chain: Run) -> None:
    DAMAGE["a bit of the weights"]()
    code, _, err = chain("undo", "two")
    assert code == 2 and err.count("regrow: ") == 1 and "two/before/model.safetensors does not have" in err
    assert "kept" not in err and load("two", model=_classifier()).training is False


def _classifier() -> Callable[[], object]:
    import toys

    return toys.classifier


def test_a_copy_shares_no_file_with_a_run(chain: Run) -> None:
    def files() -> list[tuple[int, int]]:
        return [(path.stat().st_ino, path.stat().st_nlink) for path in Path().rglob("*") if path.is_file()]

    assert {links for _, links in files()} == {1}
    undo_run(Path("two"), Path("new"))
    assert {links for _, links in files()} == {1}
    undo_run(Path("two"))
    assert {links for _, links in files()} == {1}
    with Path("one/model.safetensors").open("r+b") as file:  # as a program that writes in place
        file.write(b"\0" * 100)
    assert load("two", model=_classifier()) and load("new", model=_classifier())


def test_a_link_beside_its_file_becomes_a_file(chain: Run) -> None:
    Path("one/model.safetensors").rename("one/weights.safetensors")
    Path("one/model.safetensors").symlink_to("weights.safetensors")
    assert chain("grow", "one", "--channels", "+1", *CODE, "--out", "three")[0] == 0
    assert not Path("three/before/model.safetensors").is_symlink()
    undo_run(Path("three"))
    assert load("three", model=_classifier())


def test_a_new_page_of_the_copy_is_no_damage(chain: Run) -> None:
    (BEFORE / "report.html").write_text("of another version")
    undo_run(Path("two"), Path("new"))
    (BEFORE / "report.html").unlink()
    undo_run(Path("two"))
    assert load("two", model=_classifier()) and load("new", model=_classifier())


def test_a_second_name_from_elsewhere_is_not_kept(chain: Run) -> None:
    os.link(WEIGHTS, "twin")
    undo_run(Path("two"))
    os.truncate("twin", 0)
    assert load("two", model=_classifier())


def test_what_a_run_starts_from_may_not_change_while_it_is_copied(chain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(source: Path, target: Path) -> None:
        replacing.copy_folder(source, target)
        os.truncate(target / "model.safetensors", 1000)

    monkeypatch.setattr(parents, "copy_folder", late)
    code, _, err = chain("grow", "two", "--channels", "+1", *CODE, "--out", "three")
    assert code == 2 and "model.safetensors has 1000 bytes, not the recorded" in err
    assert not Path("three/run.json").exists()
