"""A drawn sample of commands on folders whose files name code; all of them: ``recipes/hostile_folders.py``."""

import json
import os
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "recipes" / "hostile_folders.py"
SURE = ("run: model", "run: dense model of a recovery", "shapes: callable", "config: auto_map", "tokenizer: class")


def tried(out: Path, *words: str) -> list[dict]:
    """The rows of a run of the recipe in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(RECIPE), "--out", str(out), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_nothing_that_a_file_names_is_imported_or_called(tmp_path):
    folders = [word for name in SURE for word in ("--folder", name)]
    commands = [word for name in ("recover", "regrow.nets.load") for word in ("--command", name)]
    rows = tried(tmp_path / "rows", *folders, *commands)
    assert len(rows) == 10 and not any(row["foreign"] for row in rows)
    assert {row["code"] for row in rows} <= {0, 2}, rows
    refused = {row["folder"]: row["said"] for row in rows if row["command"] == "recover"}
    assert "add --code" in refused["run: model"] and "add --code" in refused["run: dense model of a recovery"]


def test_the_watch_sees_an_import_a_call_and_a_program(tmp_path):
    code = """
import os, pathlib, subprocess, sys
sys.path[:0] = [sys.argv[1]]
from hostile import watch
here = pathlib.Path(sys.argv[2])
watch.lay_canaries(here)
watch.start(here)
sys.path.append(str(here))
import torch
def call(function):
    try:
        function()
    except (RuntimeError, SystemExit):
        pass
code = compile("1", str(here / "x.py"), "exec")
deeds = (lambda: __import__("pwned"), os.abort, lambda: subprocess.run(["true"]), lambda: torch.hub.load("a", "b"))
for deed in (*deeds, lambda: exec(code), lambda: None):
    print(bool(watch.watched(lambda: call(deed))))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(RECIPE.parent), str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["True"] * 5 + ["False"]
