"""The one place where failures end: what they say, with which exit code, and what is written to report a bug."""

import ast
import contextlib
import errno
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from safetensors import SafetensorError

from cli.conftest import Run
from regrow.cli import boundary, screen
from regrow.cli.app import regrow as commands
from regrow.core.errors import RefusedError, ResourceError
from regrow.nets.loaded import ModelError
from regrow.reports import quantities
from regrow.store.atomic import StoreError, explain_os_errors
from regrow.store.run_folder import RunFolder


def failing(error: BaseException):
    """A function that takes anything and fails."""

    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


OUTSIDE = {
    "what a command raises on purpose": (ModelError, "no model", 70),  # raised here, not by regrow's own code
    "a missing file": (FileNotFoundError(errno.ENOENT, "No such file", "x.json"), "x.json: no such file", 2),
    "a full disk": (OSError(errno.ENOSPC, "No space left", "x"), "free some space", 4),
    "a read-only place": (
        PermissionError(errno.EACCES, "Permission denied", "x"),
        "check the path and its permissions",
        4,
    ),
    "no memory": (MemoryError(), "not enough memory", 4),
    "no memory in torch": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory", 4),
    "a missing package": (ModuleNotFoundError("No module named 'peft'", name="peft.tuners"), "'peft>=0.15'", 4),
    "the end of a file": (EOFError("ended"), "bug in regrow: RuntimeError: a file ended", 70),
    "a slip": (KeyError("x"), "bug in regrow: KeyError", 70),
    "nothing written yet": (KeyboardInterrupt(), "stopped; nothing was written", 130),
}


@pytest.mark.parametrize("name", [name for name in OUTSIDE if not isinstance(OUTSIDE[name][0], type)])
def test_every_failure_is_one_line_with_an_exit_code(regrow: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    error, says, expected = OUTSIDE[name]
    monkeypatch.setattr("regrow.methods.describe_method", failing(error))
    monkeypatch.setattr(boundary, "_find_user_line", lambda tb: None)  # this file is no part of regrow either
    code, out, err = regrow("methods", "flap")
    assert code == expected and says in err and not out, err
    assert (len(err.splitlines()) == 1) == ("Traceback" not in err) == (code != 70)


def test_a_bug_is_reported_with_its_traceback(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.jobs.evaluate.evaluate_named", failing(KeyError("x\x1b[31m")))
    monkeypatch.setattr(boundary, "_find_user_line", lambda tb: None)
    code, _, err = regrow("evaluate", "toys:classifier")
    assert code == 70 and "\nTraceback" in err and "cli/evaluate.py" in err and "\x1b" not in err
    assert err.splitlines()[-1].startswith("regrow: this is a bug in regrow: KeyError")


def test_code_of_the_users_own_is_named_with_its_line(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("mynets.py").write_text("def net():\n    return {}['mine']\n")
    code, _, err = regrow("show", "mynets:net")
    assert code == 2 and "KeyError" in err and "mine" in err

    def call(*_: object, **__: object) -> None:
        __import__("mynets").net()

    monkeypatch.syspath_prepend(".")
    monkeypatch.setattr("regrow.jobs.models.load_model", call)
    code, _, err = regrow("show", "mynets:net")
    assert code == 2 and "mynets.py:2 in net failed: KeyError: 'mine'" in err and "bug in regrow" not in err, err


def test_a_value_error_is_the_users_only_where_regrow_raises_it() -> None:
    with pytest.raises(ValueError) as slip:
        quantities.power(math.nan)  # which has no exponent
    assert boundary.classify_failure(slip.value).traced
    with pytest.raises(ModelError) as meant:
        __import__("regrow.nets", fromlist=["load"]).load("")
    assert boundary.classify_failure(meant.value) == boundary.Failure(2, str(meant.value))


def test_the_machine_behind_an_error_gives_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as full, explain_os_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left")
    assert boundary.classify_failure(full.value).code == 4
    rust, numpy = "No space left on device (os error 28)", "9280 requested and 0 written"
    for error in (Exception(rust), SafetensorError(rust), OSError(numpy)):  # of tokenizers, safetensors and numpy
        with pytest.raises(StoreError, match="disk is full") as full, explain_os_errors(tmp_path):
            raise error
        assert boundary.classify_failure(full.value).code == 4
    with pytest.raises(StoreError) as wrong, explain_os_errors(tmp_path):
        raise OSError(errno.ENOENT, "No such folder")
    assert boundary.classify_failure(wrong.value).code == 2
    assert boundary._choose_exit_code(RefusedError("x")) == 3 and boundary._choose_exit_code(ResourceError("x")) == 4


def test_what_a_stopped_command_says_depends_on_the_command(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.jobs.export.export_named", failing(KeyboardInterrupt()))
    monkeypatch.setattr("regrow.jobs.prune.prune_named", failing(KeyboardInterrupt()))
    monkeypatch.setattr("regrow.jobs.prune.plan_named", failing(KeyboardInterrupt()))
    prune = ("prune", "toys:classifier", "--method", "magnitude", "--keep", "0.8")
    Path("made/.work").mkdir(parents=True)
    Path("made/.work/run.json").touch()
    nothing, resumes = "stopped; nothing was written", "run keeps what was finished, and the same command resumes"
    for words, says in (
        (("export", "resnet18", "--to", "onnx", "--out", "y"), nothing),
        ((*prune, "--out", "run"), nothing),
        ((*prune, "--dry-run", "plan.json", "--out", "made"), nothing),
        ((*prune, "--out", "made"), resumes.replace("run", "made")),
    ):
        code, _, err = regrow(*words)
        assert (code, says in err) == (130, True), err


def test_ctrl_c_is_told_as_such_where_what_it_interrupted_fails_in_its_own_way(
    regrow: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cleaned_up(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise RuntimeError("the mode is not there")

    monkeypatch.setattr("regrow.jobs.prune.prune_named", cleaned_up)
    code, _, err = regrow("prune", "toys:classifier", "--method", "magnitude", "--keep", "0.8", "--out", "run")
    assert code == 130 and "stopped; nothing was written" in err, err


def test_usage_errors_name_the_help(regrow: Run) -> None:
    for words, says in (
        (("chat",), "see `regrow chat --help`"),
        (("bogus",), "see `regrow --help`"),
        (("prune", "m", "--seed", "0", "1", "2"), "extra arguments (1 2); an option takes one value (several seeds"),
    ):
        code, _, err = regrow(*words)
        assert code == 2 and says in err and len(err.splitlines()) == 1


ELSEWHERE = {
    *("--include", "--no-deps", "--no-python", "--nproc-per-node"),
    *("--model-impl", "--trust-remote-code"),  # of vLLM
}
"""Options of other programs that messages name."""


def test_messages_name_only_options_that_commands_have() -> None:
    """``--trust`` was named, which no command has."""
    there = {"--help", "--help-all", "--version", *ELSEWHERE}
    there |= {word for command in commands.commands.values() for one in command.params for word in one.opts}
    there |= {word for command in commands.commands.values() for one in command.params for word in one.secondary_opts}
    house, named = Path(boundary.__file__).parents[1], dict[str, str]()
    for path in house.rglob("*.py"):
        if path.name != "figures.py":  # custom properties of CSS look alike
            texts = [one.value for one in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(one, ast.Constant)]
            named |= dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(map(str, texts))), path.name)
    assert not {word: name for word, name in named.items() if word not in there}
    assert {"--keep", "--code"} <= named.keys()


def test_the_exit_codes_are_documented(regrow: Run) -> None:
    _, out, _ = regrow("--help")
    page = Path(__file__).parents[2].joinpath("docs/command-line.md").read_text("utf-8")
    for code, meaning in boundary.EXIT_CODES.items():
        assert meaning in " ".join(out.split()) and f"| {code} | {meaning}" in page


HOSTILE = "a\x1b[31mb\x9b1mc\u202ed\ne[red]f[/x]\udcff"


def test_what_steers_a_terminal_is_shown_and_not_sent(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "LINE_SECONDS", 0.01)
    screen.set_up_terminal()
    screen.say(HOSTILE)
    screen.print_table(HOSTILE, (HOSTILE, "b"), [(HOSTILE, 1), ("[/x]", 2)])
    screen.print_failure(HOSTILE, 2)
    with screen.show_progress() as tell:
        tell(0, 1, HOSTILE)
        time.sleep(0.2)
    shown = "".join(capfd.readouterr())
    assert shown.count("a\\x1b[31mb\\x9b1mc\\u202ed") >= 6 and "[red]f[/x]" in shown and "[/x]" in shown
    assert not re.search("[\x1b\x9b\u202e]", shown)


def test_an_answer_keeps_its_lines_and_loses_its_escapes() -> None:
    assert screen.escape_controls("a\n\tb\x1b[2Jc", keep=screen.TEXT) == "a\n\tb\\x1b[2Jc"


def test_the_end_of_a_file_is_no_ctrl_c(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.methods.describe_method", failing(EOFError()))
    assert regrow("methods", "flap")[0] != 130


def test_errors_of_click_are_not_taken_for_bugs() -> None:
    assert boundary.classify_failure(click.BadParameter("x")).code == 2
    assert boundary.classify_failure(OSError(errno.EROFS, os.strerror(errno.EROFS), b"y")).line.startswith(
        "y: read-only"
    )


@pytest.fixture
def from_a_terminal() -> Iterator[None]:
    """SIGINT as a terminal sends it, also where the tests are a job behind, to which it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("from_a_terminal")
def test_an_error_that_compiled_code_makes_of_ctrl_c_is_ctrl_c(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def swallow(*_: object) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    monkeypatch.setattr("regrow.methods.describe_method", swallow)
    before = signal.getsignal(signal.SIGINT)
    code, _, err = regrow("methods", "flap")
    assert (code, err.strip()) == (130, "regrow: stopped; nothing was written")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_that_vanishes_before_its_figures_are_shown_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(StoreError, match=r"run/metrics.jsonl: it has no measurement 'matrix'; run the command again"):
        folder.last("matrix")


@pytest.mark.usefixtures("from_a_terminal")
def test_ctrl_c_while_modules_are_imported_ends_in_one_line(tmp_path):
    """Whatever a half-imported module makes of the exception."""
    (tmp_path / "torch.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\n"
        "try:\n    time.sleep(60)\nexcept BaseException:\n    time.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(boundary.__file__).parents[2])])
    words = [sys.executable, "-m", "regrow", "learn", "digits", "--out", "run"]
    with subprocess.Popen(
        words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "regrow: stopped; nothing was written\n"
    assert process.returncode == 130 and not (tmp_path / "run").exists()
