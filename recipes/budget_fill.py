"""How much of a target is used: what is found is counted on the network itself, over measures, spaces and seeds.

    python recipes/budget_fill.py --seeds 3
    python recipes/budget_fill.py --show

Every row is a short search on scikit-learn's digits (or a cut of a small network, for ``prune``), and what the network
that it leaves weighs: stored parameters, entries that are not 0, multiply–accumulates of the dense kernels that one
image runs (by torch's own counter) and bytes of the tensors of its file. A row that exceeds its target is marked.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rows import add, head, line, rows
from torch import nn

import regrow
from regrow.api.prune import prune
from regrow.core.sources import Batch, Source
from regrow.evaluation import dense
from regrow.jobs.recording import Invocation
from regrow.jobs.search import Settings, run
from regrow.jobs.search_inputs import read_parts

OUT = Path(__file__).parent / "results" / "budget_fill.jsonl"
MEASURES = ("params", "nonzero", "macs", "bytes")
SPACES = ("cells:4-2-1", "mobile:4-1", "resnet:4-2")
LEVELS: dict[str, dict[str, Any]] = {
    "all granularities": {},
    "operations": {"levels": ("operations",)},
    "filters": {"levels": ("filters",)},
}
SHARES = {"cells:4-2-1": (30, 60), "mobile:4-1": (50, 70), "resnet:4-2": (30, 60)}


def searched(space: str, measure: str, share: int, levels: str, seed: int, epochs: int) -> dict[str, Any]:
    """What a search leaves."""
    own = {"warm": 0, "every": 1} | LEVELS[levels]
    given: dict[str, Any] = {"train": 120, "test": 60, "batch_size": 48, "retrain": 0, "stride": 1, "stages": 1}
    given |= {"epochs": epochs, "seed": seed, "method_settings": own}
    settings = Settings(space, "digits", f"{measure}={share}%", **given)
    with tempfile.TemporaryDirectory() as place:
        folder = run(settings, Invocation(Path(place) / "run"))
        asked = next(row["asked"] for row in folder.metrics() if row["what"] == "levels")
        found = dense(regrow.load(folder.path / "found"), read_parts(settings).test.inputs[:1])
    return {"asked": asked, **found}


def pruned(measure: str, share: int, method: str, seed: int) -> dict[str, Any]:
    """What a cut leaves."""
    torch.manual_seed(seed)
    first, second, third = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 24), (24, 40), (40, 32)))
    body = [first, nn.BatchNorm2d(24), nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    net, x = nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 10)).eval(), torch.randn(16, 1, 8, 8)
    name = "parameters" if measure == "params" else measure
    asked = share * dense(net, x)[name] // 100
    small, _ = prune(net, method=method, target=f"{measure}={asked}", data=[Source("noise", [Batch((x,))])])
    return {"asked": asked, **dense(small, x)}


def cases(seeds: int) -> Iterator[dict[str, Any]]:
    """What is to be there."""
    for seed in range(seeds):
        for space in SPACES:
            for levels in LEVELS:
                if space == "resnet:4-2" and levels == "operations":
                    continue
                for measure in MEASURES:
                    for share in SHARES[space]:
                        yield {"of": space, "levels": levels, "measure": measure, "share": share, "seed": seed}
        for method in ("magnitude", "flap"):
            for measure in ("params", "macs", "bytes"):
                for share in (30, 60, 90):
                    yield {"of": "prune", "levels": method, "measure": measure, "share": share, "seed": seed}


def shown(path: Path) -> Iterator[str]:
    """The table in Markdown."""
    yield head(["", "searched", "target in", "runs", "used, mean %", "least", "most", "exceeded"])
    for of in (*SPACES, "prune"):
        for levels in dict.fromkeys(row["levels"] for row in rows(path) if row["of"] == of):
            for measure in MEASURES:
                own = [row for row in rows(path) if (row["of"], row["levels"], row["measure"]) == (of, levels, measure)]
                used = [100 * row["parameters" if measure == "params" else measure] / row["asked"] for row in own]
                if used:
                    over = sum(one > 100 for one in used)
                    figures = [f"{one:.1f}" for one in (fmean(used), min(used), max(used))]
                    yield line([of, levels, measure, str(len(used)), *figures, str(over)])


def main() -> None:
    """Run what is not there yet, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="begin no further row after so long")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the table")
    args = parser.parse_args()
    start = time.monotonic()
    for case in cases(args.seeds) if not args.show else ():
        if any(case.items() <= row.items() for row in rows(args.out)) or time.monotonic() - start > 60 * args.minutes:
            continue
        try:
            if case["of"] == "prune":
                found = pruned(case["measure"], case["share"], case["levels"], case["seed"])
            else:
                names = ("measure", "share", "levels", "seed")
                found = searched(case["of"], *(case[name] for name in names), epochs=args.epochs)
        except ValueError as error:  # a target below what this level can leave is refused before the search
            print(f"{case}: {error}", flush=True)
            continue
        add(args.out, case | found | {"date": str(date.today())})
        print(case | found, flush=True)
    print("\n".join(shown(args.out)))


if __name__ == "__main__":
    main()
