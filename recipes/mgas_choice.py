"""By which pictures settings of a search are chosen: training pictures that no run of that seed has seen, never tests.

    python recipes/mgas_choice.py --work FOLDER --cifar PICTURES
    python recipes/mgas_choice.py --show

FOLDER has finished runs of ``regrow search``, such as those of one setting of ``mgas_tables.py``. The trained network
of each is asked about 10,000 pictures of the training folder that are not among those which its seed drew: it has not
learned from them, and they are in no table of results.
"""

import argparse
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from rows import add, head, line, rows

import regrow
from regrow.core.tasks import Examples
from regrow.data import streams
from regrow.evaluation.continual import share_right
from regrow.jobs.search import Settings
from regrow.jobs.search_inputs import read_parts
from regrow.settings.search import parse_search_target
from regrow.store.run_folder import RunFolder
from regrow.store.run_record import convert_settings

OUT = Path(__file__).parent / "results" / "mgas_choice.jsonl"


def others(settings: Settings, learned: Examples, many: int) -> Examples:
    """Training pictures that a run did not draw."""
    own = {one.numpy().tobytes() for one in learned.inputs}
    drawn = streams.of(settings.data, 4 * settings.train, 1, settings.seed).train
    new = [i for i, one in enumerate(drawn.inputs) if one.numpy().tobytes() not in own][:many]
    if not new:
        raise SystemExit(f"a run of --train {settings.train} leaves no training pictures that it did not learn from")
    return Examples(drawn.inputs[new], drawn.labels[new])


def asked(folder: RunFolder, data: str, many: int) -> dict[str, Any]:
    """A row."""
    settings = convert_settings(folder.run()["settings"] | {"data": data, "test": 1}, Settings)
    learned, net = read_parts(settings).whole.train, regrow.load(folder.path)
    unseen = others(settings, learned, many)
    return {
        "space": settings.space,
        "measure": str(parse_search_target(settings.target).measure),
        "method": settings.method,
        "settings": settings.method_settings,
        "seed": settings.seed,
        "pictures": len(unseen),
        "unseen": share_right(net, unseen),
        "learned": share_right(net, learned),
    }


def said(value: Any) -> str:
    """A setting as the command line has it.

    >>> said([1.0, 0.6470638]), said("filters")
    ('1,0.647', 'filters')
    """
    if isinstance(value, list):
        return ",".join(map(said, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def shown(path: Path) -> Iterator[str]:
    """The table in Markdown."""
    yield head(["", "seed", "unseen training pictures, %", "those learned from, %"])
    for row in rows(path):
        told = " ".join(f"{name}={said(value)}" for name, value in row["settings"].items())
        right = (f"{100 * row[name]:.1f}" for name in ("unseen", "learned"))
        yield line([f"{row['method']} {told}".strip(), str(row["seed"]), *right])


def main() -> None:
    """Ask what is there, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of runs")
    parser.add_argument("--cifar", help="pictures as train/CLASS/…")
    parser.add_argument("--pictures", type=int, default=10_000, help="how many")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the table")
    args = parser.parse_args()
    if args.show:
        print("\n".join(shown(args.out)))
        return
    if not (args.work and args.cifar):
        parser.error("--work and --cifar say where runs and pictures are; or take --show")
    there = {row["run"] for row in rows(args.out)}
    for place in sorted(args.work.iterdir()):
        if place.name not in there and (place / "run.json").is_file():
            folder = RunFolder.open(place)
            if folder.run().get("finished"):
                row = {"run": place.name} | asked(folder, args.cifar, args.pictures) | {"date": str(date.today())}
                add(args.out, row)
                print(f"{place.name}: {row['unseen']:.4f}", flush=True)


if __name__ == "__main__":
    main()
