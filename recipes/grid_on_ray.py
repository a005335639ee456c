"""Twelve cells on a Ray cluster of two nodes: one cell fails, one worker is killed; then the fault is removed.

    pip install 'regrow[cluster]' psutil
    python recipes/grid_on_ray.py                  about 90 seconds of processor time, on two cores

The cells are 2 methods × 2 fractions × 3 seeds on a small convolutional network and pictures of digits. The function
that builds the network raises in one cell while a file named ``fault`` exists. The worker of another cell is killed
with SIGKILL when the run in it has begun to write. Expected: 11 rows of finished cells, one of them started twice, and
one row with an error; after ``fault`` is deleted, the same command runs that cell alone, and all 12 are finished. Their
weights are compared with those of the same grid on this machine without Ray, byte for byte. One row is appended to
``results/grid_on_ray.jsonl``.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "grid_on_ray.jsonl"
GRID = """
base: {source: digits, tokens: 256, eval_tokens: 256}
grid:
  method: [magnitude, flap]
  keep: [0.8, 0.6]
  seed: [0, 1, 2]
"""
FAILING = "method=flap,keep=0.6,seed=1"
KILLED = "method=flap,keep=0.8,seed=1"
NET = """
import sys
from pathlib import Path

import torch
from torch import nn


def net():
    words = " ".join(sys.argv)
    if Path("fault").exists() and "--method flap --keep 0.6" in words and "--seed 1" in words:
        raise RuntimeError("a fault planted in one cell")
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(24 * 64, 10)), torch.randn(2, 1, 8, 8)
"""


def command(out: str, *more: str) -> list[str]:
    """Return the command line of the grid."""
    return [sys.executable, "-P", "-m", "regrow", "grid", "grid.yaml", "--model", "own:net", "--out", out, *more]


def kill_worker(work: Path, grid: subprocess.Popen[bytes]) -> bool:
    """Kill the worker process of a cell once its run has begun to write; whether there was one."""
    while grid.poll() is None:
        if (work / "ray" / KILLED / ".work" / "run.json").is_file():
            for process in psutil.process_iter(["pid", "cmdline"]):
                if " ".join(process.info["cmdline"] or ()).startswith(f"ray::{KILLED}"):
                    os.kill(process.info["pid"], signal.SIGKILL)
                    return True
        time.sleep(0.05)
    return False


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a grid by the cell's name."""
    return {row["cell"]: row for row in map(json.loads, (folder / "grid.jsonl").read_text().splitlines())}


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of the weights of each cell."""
    files = sorted(folder.glob("*/model.safetensors"))
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def summary(code: int, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what became of the cells."""
    failed = {name: row["error"] for name, row in rows.items() if row["state"] == "failed"}
    again = {name: row["starts"] for name, row in rows.items() if row["starts"] != 1}
    return {"exit_code": code, "finished": len(rows) - len(failed), "failed": failed, "started_again": again}


def main() -> None:
    """Run the grid with its faults, without them, and on this machine; append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "grid.yaml").write_text(GRID)
        (work / "own.py").write_text(NET)
        (work / "fault").touch()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        try:
            on_ray = command("ray", "--on", "ray", "--address", cluster.address)
            grid = subprocess.Popen(on_ray, cwd=work)
            killed = kill_worker(work, grid)
            first = summary(grid.wait(), rows_of(work / "ray"))
            times = {name: path.stat().st_mtime_ns for name, path in _results(work / "ray")}
            (work / "fault").unlink()
            code = subprocess.run(on_ray, cwd=work, check=False).returncode
            second = summary(code, rows_of(work / "ray"))
            ran_again = [name for name, path in _results(work / "ray") if times.get(name) != path.stat().st_mtime_ns]
        finally:
            ray.shutdown()
            cluster.shutdown()
        subprocess.run(command("local", "--jobs", "2"), cwd=work, check=True)
        row = {
            "date": date.today().isoformat(),
            "cells": len(rows_of(work / "ray")),
            "nodes": 2,
            "worker_killed": KILLED if killed else None,
            "first": first,
            "second": second | {"ran": ran_again},
            "same_weights_as_on_one_machine": digests(work / "ray") == digests(work / "local"),
            "seconds": round(time.monotonic() - began),
            "versions": versions() | {"ray": version("ray")},
        }
    print(json.dumps(row, indent=1))
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    if not (killed and first["finished"] == 11 and second["finished"] == 12 and ran_again == [FAILING]):
        raise SystemExit("not as expected")


def _results(folder: Path) -> list[tuple[str, Path]]:
    return [(path.parent.name, path) for path in sorted(folder.glob("*/run.json"))]


if __name__ == "__main__":
    main()
