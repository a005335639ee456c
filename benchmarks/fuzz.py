"""Random networks: whatever tracing calls an axis must be one, over thousands of seeds.

    python benchmarks/fuzz.py --cases 20000 --jobs 2

Each seed makes one network (``tests/fuzz.py``). It is traced, and then

* every free axis has its units renamed in all their slots, which must not change the function;
* a random plan over the neutral axes is compared with zeros written into the uncut weights;
* two random plans over all free axes are compared with the masked network;
* one plan widens all axes that can be widened, and the function must stay, in evaluation and in training.

All in float64, within 1e-9 of the largest output. The result file is written every 25 cases and a run goes on where
the last one stopped; a failure is kept with its seed and its law, and ends nothing.
"""

import argparse
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from regrow.core.axes import Mark
from regrow.core.change import FILLS
from regrow.core.plan import PlanError
from regrow.store.run_record import versions
from regrow.surgery.verify import RELATIVE_BOUND, measure_distances
from regrow.tracing import trace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import laws
from fuzz import network

EMPTY: dict[str, Any] = {
    "cases": 0,
    "seconds": 0.0,
    "wrong": [],
    "errors": [],
    "refused": 0,
    "plans": 0,
    "renamed": 0,
    "widened": 0,
    "steps": {},
    "marks": {},
    "nets_without_a_free_axis": 0,
}


def case(seed: int, result: dict[str, Any]) -> None:
    """One network through all laws; what is wrong goes into the result."""
    model, example = network(seed)
    for kind in model.kinds:
        result["steps"][kind] = result["steps"].get(kind, 0) + 1
    axes = trace(model, *example)
    free = axes.free()
    for mark, n in Counter(str(axis.mark) for axis in axes).items():
        result["marks"][mark] = result["marks"].get(mark, 0) + n
    result["nets_without_a_free_axis"] += not free
    generator = torch.Generator().manual_seed(seed)
    for axis in free:
        laws.permuting_units_keeps_function(model, axes, axis, seed)
        result["renamed"] += 1
    try:
        laws.zeroed_equals_shrunk(model, axes, laws.random_plan(axes, generator, marks={Mark.NEUTRAL}))
        plans = [laws.random_plan(axes, generator) for _ in range(2)]
        for plan, distance in measure_distances(model, axes, plans):
            assert distance <= RELATIVE_BOUND, f"masked and shrunk differ by {distance:.2e}: {kept(plan)}"
            result["plans"] += 1
        wider = laws.joint_growing_plan(axes, [*FILLS][seed % len(FILLS)])
        if wider.changes:
            laws.widening_keeps_function(model, axes, wider, alive=False)
            result["widened"] += len(wider.changes)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return  # a BatchNorm over a single value cannot train, widened or not
        if not isinstance(error, PlanError):
            raise
        result["refused"] += 1
        refusals = result.setdefault("refusals", {})
        refusals[str(error)[:160]] = refusals.get(str(error)[:160], 0) + 1


def kept(plan: Any) -> str:
    """A plan in few words."""
    return json.dumps({key: change.keep for key, change in plan.changes.items()})[:600]


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:800]


BLOCK = 25


def block(first: int) -> dict[str, Any]:
    """The cases from a seed on."""
    torch.set_num_threads(1)
    result = json.loads(json.dumps(EMPTY))
    for seed in range(first, first + BLOCK):
        try:
            case(seed, result)
        except AssertionError as error:
            result["wrong"].append({"seed": seed, "law": told(error)})
        except Exception as error:
            result["errors"].append({"seed": seed, "error": told(error)})
        result["cases"] += 1
    return result


def added(a: Any, b: Any) -> Any:
    """Two results as one: numbers and lists add up, tables add up entry by entry."""
    if isinstance(a, dict):
        return {key: added(a[key], b[key]) if key in a and key in b else a.get(key, b.get(key)) for key in {**a, **b}}
    return a if isinstance(a, str) else a + b


def main() -> None:
    """Run on from where the result file ends, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fuzz.json"))
    parser.add_argument("--cases", type=int, default=20_000, help="how many seeds in all, from 0, those done included")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args()
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    result = {key: known.get(key, value) for key, value in (EMPTY | {"refusals": {}}).items()}
    start, before = time.perf_counter(), result["seconds"]
    starts = range(result["cases"], args.cases, BLOCK)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for made in pool.map(block, starts):
            for wrong in (*made["wrong"], *made["errors"]):
                print(json.dumps(wrong), flush=True)
            result = added(result, made)
            result["seconds"] = round(before + time.perf_counter() - start, 1)
            about = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(["python", *sys.argv])}
            about |= {"seeds": [0, result["cases"]], "versions": versions()}
            args.out.write_text(json.dumps(result | about, indent=1) + "\n")
            print(f"{result['cases']} cases, {len(result['wrong'])} wrong, {result['seconds']} s", flush=True)
    if result["wrong"]:
        sys.exit(f"{len(result['wrong'])} wrong functions; see {args.out}")


if __name__ == "__main__":
    main()
