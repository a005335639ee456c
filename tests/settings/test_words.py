"""A run's command line gives its settings again; settings are declared without torch."""

import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from regrow.cli.app import regrow
from regrow.settings import evaluate, learn, prune, recover, search
from regrow.settings.words import format_command_line

RUNS = [
    prune.Settings("m", keep=1 / 3, sources=("news", "mail=a b/"), unseen=("talk",), round_to=8, dtype="float64"),
    prune.Settings(
        "m", target="ms=7.5@64", regular=True, reconstruct=True, marks=("folded", "competed"), input="1x3x8x8"
    ),
    prune.Settings("m", method="gprune", method_settings={"base": "flap", "on": True, "names": ["a", "b"], "x": None}),
    recover.Settings("runs/a b", "lora", tokens=64, recovery_settings={"rank": 4}, seed=2**63 - 1),
    learn.Settings(("permuted:digits:5", "mail box"), scenario="class", lr=1e-7, classes=20, precision="bfloat16"),
    search.Settings("cells:4-3-2", "a b/", "macs=20%", memory="2 GiB", fresh=True, weight_decay=0.0),
    evaluate.Settings("m", sources=("news",), items=3, speed=True),
]


@pytest.mark.parametrize("settings", RUNS, ids=lambda one: type(one).__module__[16:])
def test_a_command_line_gives_the_settings_again(settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a b").mkdir()  # the folder of a source, which has to be there
    output = "--json" if isinstance(settings, evaluate.Settings) else "--out"
    name, *words = shlex.split(format_command_line(settings, output, "x.json"))[1:]
    context = regrow.commands[name].make_context(name, words)
    assert asdict(context.params["settings"]) == asdict(settings)


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert (
        format_command_line(learn.Settings(("digits",))) == "regrow learn digits --model mlp:100-100 --method laplace"
    )
    assert format_command_line(prune.Settings("m", keep=0.5)) == "regrow prune m --keep 0.5"


def test_settings_need_no_torch() -> None:
    modules = ", ".join(
        f"regrow.settings.{name}" for name in ("prune", "recover", "learn", "search", "evaluate", "words")
    )
    code = f"import sys, {modules}; print(*{{'torch', 'numpy', 'yaml', 'rich'}} & sys.modules.keys())"
    assert not subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
