"""Topologies of NAS-Bench-201 that searches find, looked up in the table of AnalogNAS-Bench (``bench201_table.py``).

    python recipes/bench201_table.py convert WHEEL --table analog201.csv
    python recipes/bench201_search.py --cifar PICTURES --table analog201.csv --work FOLDER --seeds 5
    python recipes/bench201_search.py --show

PICTURES has CIFAR-10 as ``train/CLASS/…`` and ``test/CLASS/…``; FOLDER gets a run per row. A search sees its training
part alone (4/5 of ``--train`` images); nothing is trained anew, since the table says what each topology reaches with a
training of its own (IBM's, not NAS-Bench-201's). Only operations are searched, one is left on each edge. A row is held
against all topologies of at most as many parameters: the share of them that are worse (percentile), the best of
``--draws`` random ones, and those with as many 3 × 3 convolutions as fit.
"""

import argparse
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from bench201_table import Table, table_of, topology
from rows import add, difference, head, line, rows, spread

from regrow.jobs.recording import Invocation
from regrow.jobs.search import Settings, run

OUT = Path(__file__).parent / "results" / "bench201.jsonl"
ARMS: dict[str, dict[str, Any]] = {
    "MGAS (reconstructed), operations": {},
    "random": {"method": "blind", "epochs": 0},
}
COLUMNS = ("accuracy", "percentile", "params", "as many and skips, mean", "best of the size")


def measured(arm: str, target: float, seed: int, table: Table, args: argparse.Namespace) -> dict[str, Any]:
    """A row: the search, and what the table says of what it left."""
    given: dict[str, Any] = {"space": args.space, "data": str(args.cifar), "target": f"{target:g}", "seed": seed}
    given |= {"epochs": args.epochs, "train": args.train, "test": args.train, "batch_size": args.batch}
    told = f"{args.space.replace(':', '-')}-{args.train}-{args.batch}-{args.epochs}"
    given |= {"stride": 1, "retrain": 0, "stages": 1}
    folder = run(
        Settings(**{**given, **ARMS[arm]}), Invocation(args.work / told / f"{arm.split()[0]}-{target:g}-{seed}")
    )
    seconds = round(folder.run()["seconds"]["search"])
    return {**table.look(topology(str(folder.path)), args.draws), "seconds": seconds}


def shown(path: Path) -> Iterator[str]:
    """A table per setting and target, in Markdown."""
    for setting, target in dict.fromkeys((row["setting"], row["target"]) for row in rows(path)):
        own = [row for row in rows(path) if (row["setting"], row["target"]) == (setting, target)]
        draws = next(name for name in own[0] if name.startswith("random, best"))
        names = (*COLUMNS[:3], "random, one draw", draws, *COLUMNS[3:], "seconds")
        yield f"\n{setting}, target {target:g} of the space\n"
        yield head(["", "seeds", *names])
        for arm in ARMS:
            if done := [row for row in own if row["arm"] == arm]:
                each = [[float(row[name]) for row in done] for name in names]
                yield line([arm, str(len(done)), *(spread(one, 1) for one in each)])
        first, other = ({row["seed"]: row for row in own if row["arm"] == arm} for arm in ARMS)
        yield f"\n{next(iter(ARMS))}, points of accuracy above, paired by seed:\n"
        for name in (*(name for name in names if name.startswith("random")), "as many of them, mean"):
            yield f"* {name}: {difference([(row['accuracy'] / 100, row[name] / 100) for row in first.values()])}"
        both = [(first[seed]["accuracy"] / 100, other[seed]["accuracy"] / 100) for seed in first if seed in other]
        yield f"* the arm random: {difference(both)}"


def main() -> None:
    """Run what is not there yet, or show what is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as folders of pictures")
    parser.add_argument("--table", type=Path, default=Path("analog201.csv"))
    parser.add_argument("--work", type=Path, default=Path("bench201-runs"), help="where runs are kept")
    parser.add_argument("--space", default="bench201:16-1")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5])
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10, help="of the random search beside what is found")
    parser.add_argument("--match", default="", help="part of an arm's name")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the tables")
    args = parser.parse_args()
    if args.show:
        print("\n".join(shown(args.out)))
        return
    table, setting = (
        table_of(args.table),
        f"{args.space}, {args.train} images in batches of {args.batch}, {args.epochs} epochs",
    )
    for seed in range(args.seeds):
        for target in args.targets:
            for arm in ARMS:
                told = {"setting": setting, "target": target, "arm": arm, "seed": seed}
                if args.match not in arm or any(told.items() <= row.items() for row in rows(args.out)):
                    continue
                row = told | measured(arm, target, seed, table, args) | {"date": str(date.today())}
                add(args.out, row)
                print(f"{target:g}, seed {seed}, {arm}: {row['accuracy']}, percentile {row['percentile']}", flush=True)


if __name__ == "__main__":
    main()
