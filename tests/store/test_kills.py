"""A seeded sample of the recipe that kills commands at their file operations; the whole of it takes hours.

The recipe runs in a process of its own: it forks, which a process whose threads have worked cannot do safely.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
HERE = sys.platform == "linux" and Path("/proc/self/mem").exists()
pytestmark = pytest.mark.skipif(not HERE, reason="file operations are watched with ptrace, which is of Linux")


def ran(tmp_path: Path, recipe: str, *words: str) -> list[dict]:
    """Run a recipe; gives its rows, all of which are without fault."""
    out = tmp_path / "rows.jsonl"
    call = [sys.executable, "-W", "ignore", str(RECIPES / recipe), "--out", str(out), *words]
    said = subprocess.run(call, capture_output=True, text=True, timeout=600)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    assert rows, said.stdout + said.stderr[-3000:]
    assert not [row for row in rows if row["faults"]], said.stdout
    assert said.returncode == 0
    return rows


def test_a_killed_command_run_again_leaves_what_an_undisturbed_one_does(tmp_path):
    cases = ["prune", "learn --resume", "save over a save"]
    rows = ran(tmp_path, "kill_matrix.py", *(f"--case={case}" for case in cases), "--sample", "8", "--seed", "3")
    assert len(rows) == 8 and {row["case"] for row in rows} == {*cases}


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
