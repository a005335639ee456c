"""A seeded sample of ``kill_matrix.py`` and ``faults.py``, in one process that prepares each case once; half a minute.

python recipes/crash_sample.py --seed 3 --out rows.jsonl
"""

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.dont_write_bytecode = True
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "cli")]

from crashes.cases import CASES  # noqa: E402
from crashes.places import Place  # noqa: E402
from crashes.supervised import AFTER, BEFORE, usable  # noqa: E402
from faults import FAULTS  # noqa: E402
from kill_matrix import kills  # noqa: E402

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked, rows = parser.parse_args(), []
    if why := usable():
        sys.exit(why)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:
        os.environ |= {"HF_HOME": f"{work}/hf", "TMPDIR": work}
        for name, (many, faults) in SAMPLE.items():
            draw, place = random.Random(f"{asked.seed} {name}"), Place(CASES[name], Path(work) / name.replace(" ", "-"))
            first = place.prepare()
            every = [(index, when) for index in range(len(first.operations)) for when in (BEFORE, AFTER)]
            for row in kills(place, first.operations, sorted(draw.sample(every, many))):
                rows.append({"case": name, "fault": "kill", **row})
            for fault in faults:
                rows += ({"case": name, "fault": fault, **row} for row in FAULTS[fault](place, first, draw, 1))
    asked.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        print(*(row[key] for key in ("case", "fault", "faults")))
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
