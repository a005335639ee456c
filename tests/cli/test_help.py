"""What `--help` lists, in which words and colours, and what a shell completes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from rich.console import Console

from cli.conftest import Run
from regrow.cli import app, command, screen
from regrow.cli.command import GroupedOption, PositionalArgument

RUN = Path(__file__).parents[1] / "fixtures" / "runs" / "prune"
COMMANDS = app.regrow.commands
LONG = {name: verb.options for name, verb in COMMANDS.items() if verb.options}
OPTION = re.compile(r"^  (?:-h, )?(--[a-z-]+)", re.MULTILINE)


def helps(verb: click.Command) -> dict[str, tuple[bool, str]]:
    """Parameter → whether `--help` lists it, and its help, without its default."""
    found = {}
    for parameter in verb.params:
        text = parameter.text if isinstance(parameter, PositionalArgument) else getattr(parameter, "help", None)
        is_common = not (verb.options and isinstance(parameter, GroupedOption)) or parameter.common
        found[parameter.name] = is_common, re.sub(r"  \[.*\]$", "", text or "")
    return found


def test_every_command_is_listed_once_with_one_whole_line(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = regrow("--help")
    assert code == 0 and "…" not in out
    for name, verb in COMMANDS.items():
        assert len(verb.short_help) <= 50
        assert re.search(rf"^  {name} +{re.escape(verb.short_help)}$", out, re.MULTILINE)
    assert len(COMMANDS) == sum(map(len, app.HEADINGS.values())) <= 13


@pytest.mark.parametrize("name", LONG)
def test_help_lists_the_common_options_and_help_all_all(name: str, regrow: Run) -> None:
    code, short, _ = regrow(name, "--help")
    listed = {*OPTION.findall(short)} - {"--help", "--help-all"}
    assert code == 0 and 10 <= len(listed) <= 15, sorted(listed)
    assert short.rstrip().endswith(f"All {LONG[name]} options: regrow {name} --help-all")
    code, whole, _ = regrow(name, "--help-all")
    every = {*OPTION.findall(whole)} - {"--help", "--help-all"}
    assert code == 0 and every > listed and len(every) == LONG[name]


def test_the_common_options_of_prune_are_those_of_an_ordinary_run() -> None:
    common = {name for name, (is_common, _) in helps(COMMANDS["prune"]).items() if is_common}
    assert common == {
        *("model", "smaller", "target", "keep", "time", "sources", "unseen", "method", "method_settings", "only"),
        *("seed", "device", "finetune", "out", "memory", "help_all"),
    }


def test_a_command_with_few_options_lists_them_all(regrow: Run) -> None:
    _, out, _ = regrow("evaluate", "--help")
    assert "--help-all" not in out and len({*OPTION.findall(out)}) == 15
    assert regrow("evaluate", "--help-all")[:2] == (0, out)
    assert max(len(verb.params) for name, verb in COMMANDS.items() if name not in LONG) <= command.MOST_LISTED + 2


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short(name: str) -> None:
    about = " ".join((COMMANDS[name].help or "").split())
    for parameter, (is_common, text) in {"": (False, about), **helps(COMMANDS[name])}.items():
        sentences = [len(sentence.split()) for sentence in re.split(r"[.!?] ", text)]
        assert max(sentences) <= 30, (parameter, text)
        assert not is_common or len(text.split()) <= 27, (parameter, text)


def test_headings_and_options_are_coloured_in_a_terminal_alone(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in regrow("prune", "--help")[1]
    verb = COMMANDS["prune"]
    for no_color, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(screen, "out", Console(force_terminal=True, color_system="standard"))
        text = verb.make_context("regrow prune", [], resilient_parsing=True).get_help()
        assert ("\x1b[33m\x1b[1mCommon options\x1b[0m:" in text) == ("\x1b[36m\x1b[1m--seed" in text) == coloured


# Words up to the one to complete → what is offered, and what is not.
COMPLETED = {
    "pru": ("prune", "show"),
    "prune smollm": ("smollm2-135m", "gemma3-270m"),
    "prune ": ("gemma3-270m run-1", "other"),
    "prune smollm2-135m --method g": ("gprune", "flap"),
    "prune smollm2-135m --source ": ("news generated", "flap"),
    "evaluate smollm2-135m --source ": ("news digits", "generated"),
    "prune smollm2-135m --time ": ("quick night", "flap"),
    "recover run-1 --by ": ("refit lora", "flap"),
    "report r": ("run-1", "other"),
    "learn --config run": ("run-1", "other"),
    "methods s": ("si sparsegrow", "flap"),
    "search res": ("resnet18", "run-1"),
}
ALL = """
import json, os, sys
from regrow.cli import main
for line in sys.argv[1:]:
    sys.stdout.write("\\0")
    sys.argv = ["regrow"]
    words = line.split(" ")
    os.environ |= {"COMP_WORDS": f"regrow {line}", "COMP_CWORD": str(len(words)), "_REGROW_COMPLETE": "bash_complete"}
    try:
        main()
    except SystemExit:
        sys.stdout.flush()
assert "torch" not in sys.modules
"""


def test_a_shell_completes_names_and_runs_without_torch(tmp_path: Path) -> None:
    shutil.copytree(RUN, tmp_path / "run-1")
    (tmp_path / "other").mkdir()
    words = [sys.executable, "-c", ALL, *COMPLETED]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    for (line, (offered, absent)), text in zip(COMPLETED.items(), done.stdout.split("\0")[1:], strict=True):
        values = {value for kind, _, value in (row.partition(",") for row in text.splitlines()) if kind == "plain"}
        assert {*offered.split()} <= values and absent not in values, (line, values)


def test_the_page_says_how_completion_is_switched_on() -> None:
    page = Path(__file__).parents[2].joinpath("docs/command-line.md").read_text("utf-8")
    assert all(f"_REGROW_COMPLETE={shell}_source regrow" in page for shell in ("bash", "zsh", "fish"))
