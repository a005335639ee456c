"""The memory of a search: what was planned before it started, what its stages really needed, and what less costs.

    python benchmarks/search_memory.py --cifar PICTURES --work FOLDER --out benchmarks/results/search_memory.json

The super-network is searched by MGAS on real pictures (few, for few epochs: sizes do not depend on them) under budgets
that are shares of what one stage of it needs; some cut it into several. Per stage: bytes planned from shapes alone, and
foretold when it began from what earlier ones had left (``null``: the first one, as it was planned); bytes of live
tensors in a step of it in which masks learn, as a dispatch mode counts them; and by how much the process grew. A budget
that cannot be kept is refused before anything runs. Last, a step with parts computed anew over one without, in turns.
"""

import argparse
import copy
import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

from search_step import in_turns, step_of

from regrow import trace
from regrow.core.tasks import Examples
from regrow.jobs.recording import Invocation
from regrow.jobs.search import Settings, build_search, build_space, run
from regrow.jobs.search_inputs import read_parts
from regrow.store.versions import versions
from regrow.training.learner import Context


def searched(settings: Settings, whole: int, work: Path) -> dict[str, Any]:
    """What a search under a budget planned and needed."""
    try:
        folder = run(settings, Invocation(work))
    except ValueError as error:
        return {"refused": str(error)}
    told: dict[str, list[dict[str, Any]]] = {}
    for row in folder.metrics():
        told.setdefault(row["what"], []).append(row)
    plan, seen = told["stages"][0], told["memory"]
    rows = [
        {
            "up to part": end,
            "planned": peak,
            "of one stage": round(peak / whole, 3),
            "foretold": one["predicted"],
            "recomputed": one["recomputed"],
            "live": one["peak"],
            "live / planned": round(one["peak"] / peak, 3),
            "live / foretold": round(one["peak"] / (one["predicted"] or peak), 3),
            "process": one["resident"],
            "process / planned": one["resident"] and round(one["resident"] / peak, 3),
        }
        for end, peak, one in zip(plan["ends"], plan["peaks"], seen, strict=True)
    ]
    return {"recomputed": plan["recomputed"], "stages": rows}


def anew(settings: Settings, repeats: int) -> dict[str, Any]:
    """A step of the whole super-network, masks and all, with its parts computed anew or kept."""
    task = read_parts(settings).search
    size = settings.batch_size
    batch = Examples(task.train.inputs[:size], task.train.labels[:size])
    net, _, _ = build_space(Settings(**{**vars(settings), "memory": "", "stages": 1}), task)
    axes, steps = trace(net, batch.inputs[:2]), {}
    for name in ("kept", "anew"):
        model = copy.deepcopy(net)
        model.recomputed = name == "anew"  # type: ignore[assignment]
        own = build_search(Settings(settings.space, "", settings.target, method_settings={"warm": 0}), model, axes)
        steps[name] = step_of(own.learner, Context(model, axes, task, epochs=10, steps=100), batch)
    found = in_turns(steps, repeats)
    return {"repeats": repeats, **{f"{name}_s": round(wall, 3) for name, (wall, _) in found.items()}} | {
        "ratio": round(found["anew"][0] / found["kept"][0], 3),
        "ratio of cpu time": round(found["anew"][1] / found["kept"][1], 3),
    }


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, required=True, help="CIFAR-10 as folders of pictures")
    parser.add_argument("--work", type=Path, default=Path("memory-runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/search_memory.json"))
    parser.add_argument("--space", default="cells:8-6-3")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.85, 0.6, 0.4, 0.1])
    parser.add_argument("--train", type=int, default=480)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    args = parser.parse_args()
    own = {"warm": 1, "every": 2}
    given: dict[str, Any] = {
        "target": "nonzero=25%",
        "method_settings": own,
        "retrain": 0,
        "train": args.train,
        "test": 100,
    }
    settings = Settings(args.space, str(args.cifar), epochs=args.epochs, **given)
    _, _, plan = build_space(Settings(**{**vars(settings), "memory": "1TiB"}), read_parts(settings).search)
    assert plan is not None
    whole, budgets = plan.peak, {}
    for share in args.shares:
        budget = Settings(**{**vars(settings), "memory": str(round(share * whole * 1.0001))})
        budgets[f"{share:g}"] = searched(budget, whole, args.work / f"share-{share:g}")
        print(share, json.dumps(budgets[f"{share:g}"]), flush=True)
    record = {
        "date": f"{date.today()}",
        "machine": {"cores": os.cpu_count(), "machine": platform.machine()},
        "versions": versions(),
        "note": args.note,
        "space": args.space,
        "batch": settings.batch_size,
        "one stage, planned": whole,
        "budgets, as a share of that": budgets,
        "a step with parts computed anew": anew(settings, args.repeats),
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
