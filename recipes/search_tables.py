"""Searches of a space on CIFAR-10 with the same training afterwards, at about the same seconds.

    python recipes/search_tables.py --cifar PICTURES --work FOLDER [--target params=25% macs=25%] [--arm mgas trials]
    python recipes/search_tables.py --show

PICTURES has ``train/CLASS/…`` and ``test/CLASS/…``; FOLDER gets a run per row, so that a row which is stopped goes on.
2,000 images are searched and trained on, a fifth of them held out in the search; 10,000 test, once. Every network is
trained for 15 epochs after the search from the weights that it has then; ``uniform`` is trained before it is cut, too.
``best of 3`` are three random draws of operations with a third of the epochs each, of which the best on the held-out
images is trained on. Epochs differ so that arms take about the same seconds on one thread.
*Difference*: in points to ``operations``, paired by seed, ± standard error.
"""

import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from harness import Row, add, arguments, finished, rows, table

from regrow.jobs.recording import Invocation
from regrow.jobs.search import search_named
from regrow.settings.search import Settings
from regrow.store.run_folder import RunFolder

OUT = Path(__file__).parent / "results" / "search.jsonl"
# Arm → method, its settings, epochs of search.
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "mgas": ("mgas", {}, 16),
    "mgas, operations alone": ("mgas", {"levels": "operations"}, 16),
    "trials": ("trials", {}, 12),
    "operations": ("trials", {"levels": "operations"}, 18),
    "filters": ("trials", {"levels": "filters"}, 18),
    "mgas, two stages": ("mgas", {}, 20),
    "two stages, nothing regrown": ("mgas", {"regrow": 0.0}, 20),
    "two stages, nothing repruned": ("mgas", {"reprune": False}, 20),
    "two stages, filters regrown, too": ("mgas", {"regrow_filters": 0.2}, 20),
    "DARTS": ("darts", {}, 12),
    "uniform": ("blind", {"what": "filters"}, 24),
    "best of 3": ("blind", {"what": "operations"}, 8),
}


def measure(args: Namespace, arm: str, target: str, seed: int) -> Row:
    """Return the figures of a run."""
    method, own, epochs = ARMS[arm]
    settings = Settings(args.space, str(args.cifar), target, method=method, method_settings=own, epochs=epochs)
    settings = replace(settings, train=args.train, test=10_000, retrain=args.retrain, seed=seed, undo=False)
    settings = replace(settings, stages=2 if "two stages" in arm else 1)
    start = time.process_time()
    place = args.work / f"{arm}-{target}-{seed}".replace(" ", "-").replace("%", "")
    drawn = [settings]
    if arm == "best of 3":
        drawn = [replace(settings, retrain=0, method_settings={**own, "seed": 100 * seed + i}) for i in range(3)]
        scores = [figures(search(one, place.with_name(f"{place.name}-{i}")))["found"] for i, one in enumerate(drawn)]
        drawn = [replace(drawn[scores.index(max(scores))], retrain=args.retrain)]
    return {**figures(search(drawn[0], place)), "cpu_seconds": round(time.process_time() - start)}


def search(settings: Settings, place: Path) -> RunFolder:
    """Return the finished run of a folder, which is resumed if it was stopped."""
    return RunFolder.open(place) if finished(place) else search_named(settings, Invocation(place))


def figures(folder: RunFolder) -> Row:
    """Return what a run measured."""
    by = {row["what"]: row for row in folder.metrics()}
    last, levels = by.get("test", by["found"]), by["levels"]
    return {
        "accuracy": 100 * last["accuracy"],
        "found": by["found"]["accuracy"],
        "parameters": last["parameters"],
        "used": levels["size"] / levels["asked"],
        "saved": {name: round(value) for name, value in levels["saved"].items()},
    }


def show(every: list[Row]) -> Iterator[str]:
    """Yield the table."""
    lines = []
    for target, arm in product(dict.fromkeys(row["target"] for row in every), ARMS):
        own = {row["seed"]: row for row in every if (row["target"], row["arm"]) == (target, arm)}
        rival = {row["seed"]: row for row in every if (row["target"], row["arm"]) == (target, "operations")}
        if not own:
            continue
        level = [row["accuracy"] for row in own.values()]
        more = [own[seed]["accuracy"] - rival[seed]["accuracy"] for seed in own if seed in rival]
        against = ""
        if arm != "operations" and len(more) > 1:
            against = f"{fmean(more):+.1f} ± {stdev(more) / len(more) ** 0.5:.1f}"
        saved = ", ".join(
            f"{fmean(row['saved'][name] for row in own.values()):,.0f}" for name in ("operations", "filters")
        )
        cells = [
            f"{fmean(row[name] for row in own.values()):,.{digits}f}"
            for name, digits in (("parameters", 0), ("used", 3), ("cpu_seconds", 0))
        ]
        sd = f" ± {stdev(level):.1f}" if len(level) > 1 else ""
        lines.append([target, arm, len(own), f"{fmean(level):.1f}{sd}", against, *cells, saved])
    columns = ["target", "arm", "seeds", "test accuracy, %", "difference", "parameters", "used", "CPU s"]
    yield from table([*columns, "removed: operations, filters"], lines)


def main() -> None:
    """Compute, or print the table."""
    which: dict[str, Any] = {"target": ["params=25%", "macs=25%"], "arm": tuple(ARMS), "space": "cells:8-4-2"}
    sizes: dict[str, Any] = {"train": 2000, "retrain": 15, "first": 0, "seeds": 5}
    args = arguments(__doc__, OUT, cifar=Path("cifar"), work=Path("search-runs"), **which, **sizes)
    if args.show:
        print(*show(rows(args.out)), sep="\n")
        return
    torch.set_num_threads(1)
    done = {(row["target"], row["arm"], row["seed"]) for row in rows(args.out)}
    for seed, target, arm in product(range(args.first, args.seeds), args.target, args.arm):
        if (target, arm, seed) not in done:
            row = add(args.out, {"target": target, "arm": arm, "seed": seed, **measure(args, arm, target, seed)})
            print(f"{target}, {arm}, seed {seed}: {row['accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
