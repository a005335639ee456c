"""A seeded sample of the recipes that kill and disturb commands; the whole of them takes hours.

The sample runs in a process of its own: it forks, which a process whose threads have worked cannot do safely.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
HERE = sys.platform == "linux" and Path("/proc/self/mem").exists()
pytestmark = pytest.mark.skipif(not HERE, reason="file operations are watched with ptrace, which is of Linux")


def test_a_command_that_was_disturbed_and_runs_again_leaves_what_an_undisturbed_one_does(tmp_path):
    """Killed at file operations, run twice at once, without space or the right to write, without its folder, with a
    clock that was set back, stopped by Ctrl-C."""
    out = tmp_path / "rows.jsonl"
    call = [sys.executable, "-W", "ignore", str(RECIPES / "crash_sample.py"), "--out", str(out), "--seed", "3"]
    said = subprocess.run(call, capture_output=True, text=True, timeout=600)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    assert not [row for row in rows if row["faults"]], said.stdout
    assert said.returncode == 0, said.stdout + said.stderr[-3000:]
    assert Counter(row["fault"] for row in rows) == {
        "kill": 8, "two processes": 1, "no space": 2, "read-only system": 1, "folder deleted": 1, "clock set back": 1,
        "Ctrl-C": 2,
    }  # fmt: skip
    codes = {row["fault"]: row["code"] for row in rows if row["fault"] != "kill"}
    assert codes["no space"] == codes["read-only system"] == 2


@pytest.mark.parametrize("call", ["rename", "exchange", "open", "write"])
def test_the_watcher_stops_at_what_any_code_does(call, tmp_path):
    """Kill before and after one operation: before, it has not happened; after, it has."""
    for when in ("before", "after"):
        script = f"""
import ctypes, os, sys
from pathlib import Path
sys.path.insert(0, {str(RECIPES)!r})
from crashes.supervised import run
folder = Path({str(tmp_path)!r}) / {when!r}
folder.mkdir()
(folder / "a").write_text("a")
(folder / "b").write_text("b")
def work():
    if {call!r} == "exchange":
        ctypes.CDLL(None).renameat2(-100, b"a", -100, b"b", 2)
    elif {call!r} == "rename":
        os.rename("a", "b")
    else:
        with open("c", "w") as file:
            file.write("c")
    os.mkdir("never")
found = run(work, folder, folder.parent / "text", root=folder,
    act=lambda one, now, _: (one.name, now) == ({call!r}, {when!r}))
print(found.code, found.operations[-1].name)
"""
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert said.stdout.split() == ["-9", call], said.stderr
        there = {path.name: path.read_text() for path in (tmp_path / when).iterdir()}
        done = {
            "rename": {"b": "a"},
            "exchange": {"a": "b", "b": "a"},
            "open": {"a": "a", "b": "b", "c": ""},
            "write": {"a": "a", "b": "b", "c": "c"},
        }
        undone = {"a": "a", "b": "b"} | ({"c": ""} if call == "write" else {})
        assert there == (done[call] if when == "after" else undone)
