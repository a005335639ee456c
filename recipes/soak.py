"""Long runs: what grows with the number of tasks or commits, and what does not.

    python recipes/soak.py                       two streams of 200 tasks, and a search with 200 commits; 10 minutes
    python recipes/soak.py --only learn --many 60 --out FILE
    python recipes/soak.py --show                the table of what is committed

* ``learn``: every task widens both hidden layers by one unit, from 100 to 300 units;
* ``fixed``: the same stream, of which the first tasks use up what the network may grow by, so that all rows that are
  fitted are of one width;
* ``search``: every commit removes units of a network of twice 400.

After every second task (or commit of the search) a row is taken of the process, with all garbage collected and freed
memory given back to the system:

* ``resident``: resident memory less the bytes of the network, of the tensors of its learner (masks, factors,
  preconditioners), of gradients and of the optimizer's moments;
* ``files``: open files; ``threads``; ``temporary``: files in the run folder whose names begin with a dot;
* ``seconds`` of processor time per task (commit) since the row before;
* ``state``: bytes of the file that a killed run resumes from, less the tensors in it and the list of units that a
  search has removed (a mask in words: it names at most all units); ``metrics`` and ``ledger``: bytes of those files.

glibc is told to give every block above 128 KiB back to the system when it is freed. Left alone it raises that limit as
it goes, and the heap keeps about 7 MB that have been freed.

Fitted to the rows from the twenty-first on, by the median of slopes (Theil and Sen): what each gains per 100, also as
a share of its median.
"""

import ctypes
import gc
import json
import os
import resource
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from harness import Row, arguments, table, today, write

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
LIBC.mallopt(M_MMAP_THRESHOLD, 2**17)
LIBC.mallopt(M_ARENA_MAX, 1)

OUT = Path(__file__).parent / "results" / "soak.json"
EVERY, FIRST = 2, 20
CONSTANT = ("resident", "files", "threads", "temporary", "seconds", "state")
LINEAR = ("metrics", "ledger")


class Watch:
    """Takes a row whenever the run has stored one more task or commit.

    Args:
        folder: The run folder.
        what: The kind of row in ``metrics.jsonl`` that is counted.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what, self.rows = folder, f'"what": "{what}"'.encode(), list[Row]()
        self.size = self.count = 0
        self.began, self.start = time.process_time(), time.monotonic()

    def __call__(self, done: int, total: int, what: str) -> None:
        """What a run calls as it goes on."""
        metrics = self.find("metrics.jsonl")
        if metrics is None or metrics.stat().st_size == self.size:
            return
        self.size = metrics.stat().st_size
        count = metrics.read_bytes().count(self.what)
        if count < self.count + EVERY:
            return
        spent, many, self.count = time.process_time() - self.began, count - self.count, count
        self.rows.append({"count": count, "seconds": spent / many, **self.taken()})
        left = (time.monotonic() - self.start) / max(done, 1) * (total - done)
        if count % 20 == 0:
            print(f"{what}: {self.rows[-1]}, {left:.0f} s left", flush=True)
        self.began = time.process_time()

    def find(self, name: str) -> Path | None:
        """A file of the run, wherever unfinished work is kept."""
        return next((path for path in sorted(self.folder.rglob(name)) if path.stat().st_size), None)

    def taken(self) -> Row:
        """What there is now."""
        gc.collect()
        LIBC.malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        course = self.find("course.safetensors")
        return {
            "resident": pages * resource.getpagesize() - working_bytes(),
            "files": len(list(Path("/proc/self/fd").iterdir())),
            "threads": len(list(Path("/proc/self/task").iterdir())),
            "temporary": sum(path.name.startswith(".") for path in self.folder.rglob("*") if path.is_file()),
            "state": state_bytes(course) if course else 0,
            "metrics": self.size,
            "ledger": ledger.stat().st_size if (ledger := self.find("ledger.json")) else 0,
        }


def state_bytes(path: Path) -> int:
    """How much of the file that a run resumes from is neither tensors nor names of removed units."""
    with path.open("rb") as file:
        length = int(struct.unpack("<Q", file.read(8))[0])
        header = json.loads(json.loads(file.read(length))["__metadata__"]["regrow"])
    return 8 + length - len(json.dumps(header["values"].get("cut", {})))


def working_bytes() -> int:
    """Bytes of networks, gradients, what learners keep, and moments of optimizers: all that live in this process."""
    import torch

    from regrow.training.state import TrainState

    storages: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            add(list(value.values()))
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        elif is_dataclass(value):
            add(list(vars(value).values()))

    for thing in gc.get_objects():
        kind = type(thing)  # isinstance would wake what torch makes when it is first asked for
        if issubclass(kind, torch.nn.Module):
            for tensor in (*thing.parameters(recurse=False), *thing.buffers(recurse=False)):
                add(tensor)
                add(tensor.grad)
        elif issubclass(kind, TrainState):
            add(vars(thing))
        elif issubclass(kind, torch.optim.Optimizer):
            add(dict(thing.state))
    return sum(storages.values())


def settled(rows: list[Row]) -> list[Row]:
    """The rows behind the first tasks, in which caches fill."""
    return [row for row in rows if row["count"] > FIRST]


def slope(rows: list[Row], name: str) -> float:
    """The median of all slopes between two rows, per 100."""
    points = [(row["count"], row[name]) for row in settled(rows)]
    pairs = ((a, b) for a, b in combinations(points, 2) if a[0] != b[0])
    return 100 * median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs)


def bend(rows: list[Row], name: str) -> float:
    """How much steeper the last half grows than the first: 0 for a line, 1 for a parabola."""
    rows = settled(rows)
    half = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    gains = [(part[-1][name] - part[0][name]) / (part[-1]["count"] - part[0]["count"]) for part in half]
    return gains[1] / gains[0] - 1 if gains[0] else 0.0


def learn(folder: Path, many: int, width: float = 0.01, cap: float = 1000) -> list[Row]:
    """A stream of so many small tasks, of which each makes a layer wider by a share of its first size, up to a cap."""
    from regrow.jobs.learn import Settings, run
    from regrow.jobs.recording import Invocation

    settings = Settings(
        (f"permuted:digits:{many}",), "mlp:100-100", "sparsegrow", {"width": width, "multiple": 1, "cap": cap},
        epochs=2, train=96, test=32, batch_size=32, lr=0.05,
    )  # fmt: skip
    watch = Watch(folder, "task")
    run(settings, Invocation(folder, progress=watch))
    return watch.rows


def search(folder: Path, many: int) -> list[Row]:
    """A search that changes the network's shape so many times."""
    from regrow.jobs.recording import Invocation
    from regrow.jobs.search import Settings, run

    settings = Settings(
        "mlp:400-400", "digits", "params=10%", method_settings={"warm": 1, "every": 1, "levels": ["filters"]},
        epochs=round(1.65 * many), retrain=1, train=96, test=32, batch_size=48, stages=1,
    )  # fmt: skip
    watch = Watch(folder, "commit")
    run(settings, Invocation(folder, progress=watch))
    return watch.rows


RUNS = {"learn": learn, "fixed": partial(learn, width=0.1, cap=3.0), "search": search}
"""``fixed`` has its full width before the rows that are fitted."""


def fitted(rows: list[Row]) -> dict[str, Any]:
    """What each quantity gains per 100, and whether what grows does so along a line."""
    names = (*CONSTANT, *LINEAR)
    return {
        "median": {name: median(row[name] for row in settled(rows)) for name in names},
        "gain per 100": {name: round(slope(rows, name), 4) for name in names},
        "bend": {name: round(bend(rows, name), 3) for name in LINEAR},
    }


def show(results: dict[str, Any]) -> Iterator[list[str]]:
    """A line per run and quantity."""
    for run, fit in results.items():
        for name, middle in fit["median"].items():
            gain = fit["gain per 100"][name]
            share = f"{gain / middle:+.1%}" if middle else "–"
            yield [f"{run}, {fit['many']}", name, f"{middle:,.4g}", f"{gain:,.4g}", share, fit["bend"].get(name, "")]


def main() -> None:
    """Run, fit and store; or print what is committed."""
    args = arguments(__doc__, OUT, only=(*RUNS,), many=200)
    results = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in () if args.show else args.only:
        with tempfile.TemporaryDirectory() as work:
            rows = RUNS[name](Path(work) / "run", args.many)
        results[name] = {"day": today(), "many": rows[-1]["count"], **fitted(rows), "rows": rows[::5]}
        write(args.out, results)
    print("\n".join(table(("run", "quantity", "median", "gain per 100", "of the median", "bend"), show(results))))


if __name__ == "__main__":
    main()
