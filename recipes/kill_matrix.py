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
added to the output as they come; what is there is not done again.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.dont_write_bytecode = True
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "cli")]

from crashes.cases import CASES  # noqa: E402
from crashes.places import Place, contents, state  # noqa: E402
from crashes.supervised import AFTER, BEFORE, Operation, usable  # noqa: E402

OUT = HERE / "results" / "kill_matrix.jsonl"
Row = dict[str, Any]


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


def main() -> None:
    """Run the chosen part of the matrix, or print the table of an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--sample", type=int, help="so many kills of all, drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-exchange", action="store_true", help="as on file systems that cannot exchange names")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, help="where cases run; a temporary folder in memory, unless given")
    parser.add_argument("--show", action="store_true")
    asked = parser.parse_args()
    if not asked.show:
        if why := usable():
            sys.exit(why)
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=asked.work or (memory if memory.is_dir() else None)) as work:
            os.environ |= {"HF_HOME": f"{work}/hf", "TMPDIR": work}
            matrix(asked, Path(work))
    sys.exit(show(asked.out))


def matrix(asked: argparse.Namespace, work: Path) -> None:
    """Run the cases and add a row for every kill."""
    done = {(row["case"], row["index"], row["when"]) for row in read(asked.out)}
    draw, names = random.Random(asked.seed), asked.case or list(CASES)
    for number, name in enumerate(names):
        place = Place(CASES[name], work / re.sub(r"\W+", "-", name), not asked.no_exchange)
        first = place.prepare()
        every = [(index, when) for index in range(len(first.operations)) for when in (BEFORE, AFTER)]
        if asked.sample is not None:
            share = asked.sample * (number + 1) // len(names) - asked.sample * number // len(names)
            every = sorted(draw.sample(every, min(share, len(every))))
        chosen = [one for one in every if (name, *one) not in done]
        print(f"{name}: {len(first.operations)} operations, {len(chosen)} kills, {first.seconds:.1f} s a run")
        began = time.monotonic()
        for count, row in enumerate(kills(place, first.operations, chosen), 1):
            with asked.out.open("a") as file:
                file.write(json.dumps({"case": name, **row, "day": time.strftime("%Y-%m-%d")}) + "\n")
            left = (time.monotonic() - began) / count * (len(chosen) - count)
            if row["faults"] or count % 20 == 0:
                print(
                    f"  {count}/{len(chosen)}, {left:.0f} s left: {row['when']} {row['operation']}:", row["faults"][:4]
                )
            sys.stdout.flush()


def read(path: Path) -> list[Row]:
    """The rows of earlier calls."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def show(path: Path) -> int:
    """Print what was found, case by case; returns how many kills had faults, at most 1."""
    rows = read(path)
    print("| case | kills | states | faults | with differences | with leftovers | unreadable or mixed |")
    print("|" + "---|" * 7)
    for name in [*dict.fromkeys(row["case"] for row in rows), ""]:
        mine = [row for row in rows if name in ("", row["case"])]
        kinds = Counter(kind for row in mine for kind in {_kind(fault) for fault in row["faults"]})
        cells = [name or "all", len(mine), sum("as" not in row for row in mine), sum(bool(r["faults"]) for r in mine)]
        print("| " + " | ".join(map(str, [*cells, kinds["difference"], kinds["leftover"], kinds["moment"]])) + " |")
    return int(any(row["faults"] for row in rows))


def _kind(fault: str) -> str:
    if fault.startswith("left over"):
        return "leftover"
    return "moment" if fault.startswith("at once") else "difference"


if __name__ == "__main__":
    main()
