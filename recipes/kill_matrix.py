"""Kill every command before and after each of its file operations, run it again, and compare: nothing may differ.

    python recipes/kill_matrix.py                                    every kill of every case
    python recipes/kill_matrix.py --case learn --case "save over a save"
    python recipes/kill_matrix.py --sample 40 --seed 1               so many of all, drawn
    python recipes/kill_matrix.py --no-exchange --out FILE           as where a file system cannot exchange names
    python recipes/kill_matrix.py --show                             the table of what is committed

For each kill: the command runs in a child process that stops at file operation k (``crashes/supervised.py``) and gets
SIGKILL before or after it. Then

* an earlier result must be readable, and be the old or the new one, file by file;
* the same command runs again to its end. All files must equal those of an undisturbed run, but for fields that tell the
  time (``crashes/places.py``, CLOCK); a page must be what its folder's page is when it is rendered anew; no other
  file may lie in the folder or beside it.

Where two kills leave the same files, the second is not followed by another run (``as`` names the first). Rows are
added to the output as they come; what is there is not done again. Cases run in memory, or in ``--work FOLDER``.
"""

import random
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from crashes.cases import CASES
from crashes.places import Place, contents, place_of, state, workplace
from crashes.supervised import AFTER, BEFORE, Operation
from harness import Row, add, arguments, rows, table, today

OUT = Path(__file__).parent / "results" / "kill_matrix.jsonl"


def every_kill(operations: list[Operation]) -> list[tuple[int, str]]:
    """Before and after each operation."""
    return [(index, when) for index in range(len(operations)) for when in (BEFORE, AFTER)]


def kills(place: Place, operations: list[Operation], chosen: list[tuple[int, str]]) -> Iterator[Row]:
    """Kill a case at chosen operations, one after the other."""
    seen: dict[str, Row] = {}
    for index, when in chosen:
        operation = operations[index]
        place.reset()
        killed = place.go(watched=True, act=lambda one, now, _, at=(index, when): (one.index, now) == at)
        row: Row = {"index": index, "when": when, "operation": str(operation)}
        if killed.code != -9 or str(killed.operations[-1]) != str(operation):
            row["faults"] = [f"not killed there: {killed.code} {killed.operations[-1:]} {killed.last[:200]}"]
        elif (same := seen.get(left := state(contents(place.root)))) is not None:
            row |= {"as": [same["index"], same["when"]], "faults": same["faults"]}
        else:
            seen[left] = row
            row["faults"], again = place.faults()
            row["seconds"] = round(again.seconds, 2)
        yield row


def matrix(args: Namespace, work: Path) -> None:
    """Run the cases and add a row for every kill."""
    done = {(row["case"], row["index"], row["when"]) for row in rows(args.out)}
    draw, names = random.Random(args.seed), args.case
    for number, name in enumerate(names):
        place = place_of(name, work, exchange=not args.no_exchange)
        first = place.prepare()
        every = every_kill(first.operations)
        if args.sample is not None:
            share = args.sample * (number + 1) // len(names) - args.sample * number // len(names)
            every = sorted(draw.sample(every, min(share, len(every))))
        chosen = [kill for kill in every if (name, *kill) not in done]
        print(f"{name}: {len(first.operations)} operations, {len(chosen)} kills, {first.seconds:.1f} s a run")
        began = time.monotonic()
        for count, row in enumerate(kills(place, first.operations, chosen), 1):
            add(args.out, {"case": name, **row}, day=today())
            left = (time.monotonic() - began) / count * (len(chosen) - count)
            if row["faults"] or count % 20 == 0:
                print(f"  {count}/{len(chosen)}, {left:.0f} s left:", row["when"], row["operation"], row["faults"][:4])
            sys.stdout.flush()


def show(results: list[Row]) -> Iterator[list[object]]:
    """What was found, case by case."""
    for name in [*dict.fromkeys(row["case"] for row in results), ""]:
        mine = [row for row in results if name in ("", row["case"])]
        kinds = Counter(kind for row in mine for kind in {_kind(fault) for fault in row["faults"]})
        faulty = sum(bool(row["faults"]) for row in mine)
        each = (kinds[kind] for kind in ("difference", "leftover", "moment"))
        yield [name or "all", len(mine), sum("as" not in row for row in mine), faulty, *each]


def _kind(fault: str) -> str:
    if fault.startswith("left over"):
        return "leftover"
    return "moment" if fault.startswith("at once") else "difference"


def main() -> None:
    """Run the chosen part of the matrix, or print the table of an earlier one."""
    args = arguments(__doc__, OUT, case=(*CASES,), sample=int, seed=0, no_exchange=False, work=Path)
    if not args.show:
        with workplace(args.work) as work:
            matrix(args, work)
    results = rows(args.out)
    columns = ("case", "kills", "states", "faults", "with differences", "with leftovers", "unreadable or mixed")
    print("\n".join(table(columns, show(results))))
    sys.exit(any(row["faults"] for row in results))


if __name__ == "__main__":
    main()
