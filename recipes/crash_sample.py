"""A seeded sample of ``kill_matrix.py`` and ``faults.py``, in one process that prepares each case once; half a minute.

python recipes/crash_sample.py --seed 3 --out rows.jsonl
"""

import random
import sys
from pathlib import Path

from crashes.places import place_of, workplace
from faults import FAULTS
from harness import add, arguments
from kill_matrix import every_kill, kills

SAMPLE = {
    "prune": (2, ("no space",)),
    "learn --resume": (3, ("Ctrl-C",)),
    "save over a save": (
        3,
        ("two processes", "no space", "read-only system", "folder deleted", "clock set back", "Ctrl-C"),
    ),
}
"""Case → how many kills, and which faults; none needs root."""


def main() -> None:
    """Run the sample; the exit code is 1 if anything was wrong."""
    args, faulty = arguments(__doc__, seed=0, out=Path), False
    with workplace() as work:
        for name, (many, faults) in SAMPLE.items():
            draw, place = random.Random(f"{args.seed} {name}"), place_of(name, work)
            first = place.prepare()
            chosen = sorted(draw.sample(every_kill(first.operations), many))
            trials = [("kill", row) for row in kills(place, first.operations, chosen)]
            trials += [(fault, row) for fault in faults for row in FAULTS[fault](place, first, draw, 1)]
            for fault, row in trials:
                add(args.out, {"case": name, "fault": fault, **row})
                print(name, fault, row["faults"])
                faulty |= bool(row["faults"])
    sys.exit(faulty)


if __name__ == "__main__":
    main()
