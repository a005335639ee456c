"""Standard streams that are closed or break, and words, names and places that no command can use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import Run
from regrow.data import SourceError
from regrow.data.text import text
from regrow.nets import ModelError
from regrow.nets.packaged import cache_folder

SMALL = ("--method", "wanda_sp", "--keep", "0.7", "--source", "digits", "--tokens", "64", "--eval-tokens", "32")


@pytest.mark.parametrize("closed", [("stderr",), ("stdout",), ("stdin", "stdout", "stderr")])
def test_closed_streams_change_nothing(regrow: Run, monkeypatch: pytest.MonkeyPatch, closed: tuple[str, ...]) -> None:
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    code, _, err = regrow("evaluate", "toys:classifier", "--json", "size.json")
    assert code == 0 and "Traceback" not in err
    assert Path("size.json").is_file()


def test_a_process_goes_on_without_descriptors_and_ends_without_a_reader(tmp_path: Path) -> None:
    paths = {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    for line, code in (
        ("evaluate toys:classifier --json made.json >&- 2>&- <&-", 0),
        ("nosuch >&- 2>&- <&-", 2),
        ("show toys:classifier | true", 1),
        ("show toys:classifier >/dev/full", 4),
    ):
        words = ["bash", "-c", f"{sys.executable} -m regrow {line}; exit ${{PIPESTATUS[0]}}"]
        done = subprocess.run(words, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, (line, done.stderr)
    assert (tmp_path / "made.json").is_file()


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "toys:classifier", "--source", "digits", "--json"),
        ("prune", "toys:classifier", *SMALL, "--dry-run"),
        ("report", "run", "--out"),
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
    assert regrow("evaluate", "toys:classifier", "--json", "~/size.json")[0] == 0
    assert (tmp_path / "home" / "size.json").is_file() and not Path("~").exists()
    code, _, err = regrow("evaluate", "toys:classifier", "--json", "~nobodyhere/size.json")
    assert code == 2 and "there is no such user's home folder; write the path out" in err
    with pytest.raises(SourceError, match="no such user's home folder; write the path out"):
        text("~nobodyhere/x.txt")


def test_a_user_without_a_home_is_told_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("REGROW_CACHE", raising=False)
    with pytest.raises(ModelError, match="REGROW_CACHE"):
        cache_folder()


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
        "regrow: no such file or directory; check the path and its permissions\n",
    )


def test_names_and_numbers_are_shown_as_they_are(regrow: Run) -> None:
    _, _, err = regrow("show", "nosuchpackage:x")
    assert "nosuchpackage:x: cannot import" in err
    _, _, err = regrow("prune", "toys:classifier", *SMALL, "--out", "x", "--seed", f"{2**63}")
    assert "--seed must be 0 to 9,223,372,036,854,775,807" in err
