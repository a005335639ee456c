"""Standard streams that are closed or break, and words, names and places that no command can use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import Run
from regrow.cli import _Output, boundary
from regrow.data import SourceError
from regrow.data.text import text
from regrow.nets import ModelError
from regrow.nets.packaged import cache_folder

SMALL = ("--method", "wanda_sp", "--keep", "0.7", "--source", "digits", "--tokens", "64", "--eval-tokens", "32")


@pytest.mark.parametrize("closed", [("stderr",), ("stdout",), ("stdin", "stdout", "stderr")])
def test_closed_streams_change_nothing(regrow: Run, monkeypatch: pytest.MonkeyPatch, closed: tuple[str, ...]) -> None:
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    code, _, err = regrow("show", "toys:classifier", "--json", "axes.json")
    assert code == 0 and "Traceback" not in err
    assert Path("axes.json").is_file()


@pytest.mark.slow
def test_a_process_goes_on_without_descriptors_and_without_a_reader(tmp_path: Path) -> None:
    paths = {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    for line, code in (
        ("--help | true", 0),
        ("show toys:classifier --json made.json 2>&1 | true", 0),
        ("nosuch >&- 2>&- <&-", 2),
    ):
        words = ["bash", "-c", f"{sys.executable} -m regrow {line}; exit ${{PIPESTATUS[0]}}"]
        assert subprocess.run(words, cwd=tmp_path, env=os.environ | paths).returncode == code, line
    assert (tmp_path / "made.json").is_file()


def test_output_without_a_reader_is_dropped_and_other_failures_are_told_once(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    pipe = _Output(writer, "standard output")
    assert pipe.write(b"one") == 3 and pipe.write(b"four") == 4
    os.close(writer)
    (tmp_path / "file").touch()
    handle = os.open(tmp_path / "file", os.O_RDONLY)  # which cannot be written, as a full disk cannot
    full = _Output(handle, "standard output")
    with pytest.raises(OSError, match="standard output") as caught:
        full.write(b"one")
    assert boundary.failure_of(caught.value).line.startswith("standard output: ")
    assert full.write(b"four") == 4
    os.close(handle)


@pytest.mark.parametrize(
    "words",
    [
        ("show", "toys:classifier", "--json"),
        ("evaluate", "toys:classifier", "--source", "digits", "--json"),
        ("prune", "toys:classifier", *SMALL, "--dry-run"),
        ("report", "run", "--out"),
        ("compare", "run", "other", "--out"),
        ("learn", "digits", "--out"),
    ],
)
def test_a_blank_name_is_refused_before_any_work(regrow: Run, words: tuple[str, ...]) -> None:
    for blank in ("", " "):
        code, out, err = regrow(*words, blank)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert f"'{words[-1]}': the name is blank; name a file or a folder" in err


def test_home_folders_are_known_in_every_path(regrow: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert regrow("show", "toys:classifier", "--json", "~/axes.json")[0] == 0
    assert (tmp_path / "home" / "axes.json").is_file() and not Path("~").exists()
    code, _, err = regrow("show", "toys:classifier", "--json", "~nobodyhere/axes.json")
    assert code == 2 and "there is no such user's home folder; write the path out" in err
    with pytest.raises(SourceError, match="no such user's home folder; write the path out"):
        text("~nobodyhere/x.txt")


def test_a_user_without_a_home_is_told_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.delenv("REGROW_CACHE", raising=False)
    assert boundary.failure_of(KeyError("/usr/lib/x")).line == "this is a bug in regrow: KeyError: '/usr/lib/x'"
    with pytest.raises(ModelError, match="REGROW_CACHE"):
        cache_folder()


def test_the_handler_of_failures_does_not_fail(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class MutedError(Exception):
        def __str__(self) -> str:
            raise TypeError("no text")

    def fail(*_: object) -> None:
        raise MutedError

    monkeypatch.setattr("regrow.methods.find_method", fail)
    code, _, err = regrow("methods", "flap")
    assert code == 70 and "MutedError, and TypeError" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ("export", "run", "--to", "transformers", "--out", "bad\udcff"),
        ("chat", "run", "--prompt", "bad\udcff"),
        ("prune", "toys:classifier", *SMALL, "--out", "bad\udcff"),
        ("learn", "digits", "--out", "x", "--set", "a=bad\udcff"),
    ],
)
def test_words_that_are_no_text_are_refused(regrow: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    code, out, err = regrow(*words)
    assert (code, out) == (2, "") and re.fullmatch(r"regrow: '.*bad\\udcff' is not valid UTF-8; .*\n", err)
    assert not list(tmp_path.iterdir())


def test_a_deleted_working_directory_is_told(regrow: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert regrow("show", "toys:classifier") == (
        2,
        "",
        "regrow: the working directory was deleted; change to one that is there\n",
    )


def test_names_and_numbers_are_shown_as_they_are(regrow: Run) -> None:
    _, _, err = regrow("show", "nosuchpackage:x")
    assert "nosuchpackage:x: cannot import" in err
    _, _, err = regrow("prune", "toys:classifier", *SMALL, "--out", "x", "--seed", f"{2**63}")
    assert "--seed must be 0 to 9,223,372,036,854,775,807" in err
