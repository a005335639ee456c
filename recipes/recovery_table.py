"""What each recovery wins back of what pruning lost, at equal tokens, on kinds of text seen and unseen.

    python recipes/recovery_table.py --work FOLDER
    python recipes/recovery_table.py --show

SmolLM2-135M in float32, cut by FLAP; calibrated, and recovered, on news and code, evaluated on the other half of these
(seen) and on manual and talk (unseen). ``--arms`` names recoveries with their settings (``refit``,
``refit:target=output``); each reads the same windows. One dated line is written per arm as soon as it is measured; arms
that are there already are not run again, and a stopped one goes on where it was (its runs are in ``--work``).

won = (nll pruned − nll recovered) / (nll pruned − nll dense), with mean nll over the kinds
"""

import math
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from harness import Row, add, arguments, finished, rows, table

from regrow.cli.screen import show_progress
from regrow.jobs import recover as recovery_run
from regrow.jobs.prune import Settings
from regrow.jobs.prune import prune_named as prune
from regrow.jobs.recording import Invocation
from regrow.settings import recover
from regrow.settings.words import parse_pairs
from regrow.store.run_folder import RunFolder

OUT = Path(__file__).parent / "results" / "recovery.jsonl"
SEEN, UNSEEN = ("news", "code"), ("manual", "talk")
SIDES = ("dense", "pruned", "recovered")
KEYS = ("arm", "keep", "compensate", "tokens", "seed", "prune_tokens", "eval_tokens", "seq_len")


def pruning(args: Namespace) -> Settings:
    """The pruning run that all arms recover."""
    return Settings(
        "smollm2-135m",
        method="flap",
        method_settings={} if args.compensate else {"compensate": False},
        keep=args.keep,
        sources=SEEN,
        unseen=UNSEEN,
        tokens=args.prune_tokens,
        eval_tokens=args.eval_tokens,
        seq_len=args.seq_len,
        dtype="float32",
    )


def row_of(args: Namespace, arm: str, folder: RunFolder) -> dict[str, Any]:
    """The figures of a finished arm, dated."""
    metrics = folder.metrics()
    nll: dict[str, dict[str, float]] = {}
    for line in metrics:
        if line["what"] == "perplexity":
            nll.setdefault(line["source"], {})[line["model"]] = line["nll"]
    done = next(line for line in reversed(metrics) if line["what"] == "recovery")
    layers = done.pop("layers", None)
    row = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "model": "smollm2-135m", "method": "flap"}
    row |= {key: getattr(args, key) for key in KEYS if key != "arm"} | {"arm": arm, "nll": nll}
    row |= {"won_seen": won(nll, SEEN), "won_unseen": won(nll, UNSEEN), "seconds": done["seconds"], "told": done}
    if layers:
        changed = [one for one in layers if one["ridge"]]
        row["layers"] = {
            "fitted": len(layers),
            "changed": len(changed),
            "ridges": sorted(one["ridge"] for one in changed),
        }
    return row | {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1), "torch": torch.__version__}


def won(nll: dict[str, dict[str, float]], kinds: tuple[str, ...]) -> float:
    """The share of the lost log-perplexity that came back, on some kinds together."""
    dense, cut, after = (math.fsum(nll[kind][side] for kind in kinds) for side in SIDES)
    return (cut - after) / (cut - dense)


def run(args: Namespace) -> None:
    """Fill in the arms that are missing."""
    args.work.mkdir(parents=True, exist_ok=True)
    name = f"flap-{args.keep:g}-{args.prune_tokens}-{args.eval_tokens}{'' if args.compensate else '-plain'}"
    base = args.work / name
    with show_progress() as progress:
        if not finished(base):
            prune(pruning(args), Invocation(base, progress=progress))
        for arm in args.arms:
            key = {key: getattr(args, key) for key in KEYS if key != "arm"} | {"arm": arm}
            if any(key.items() <= row.items() for row in rows(args.out)):
                continue
            by, _, words = arm.partition(":")
            place = args.work / f"{name}-{args.tokens}-{args.seed}-{re.sub('[:=,]', '-', arm)}"
            if not finished(place):
                settings = parse_pairs([pair for pair in words.split(",") if pair])
                asked = recover.Settings(str(base), by, args.tokens, settings, seed=args.seed)
                recovery_run.recover_named(asked, Invocation(place, progress=progress))
            row = add(args.out, row_of(args, arm, RunFolder.open(place)))
            print(f"{arm}: won {row['won_seen']:.3f} seen, {row['won_unseen']:.3f} unseen", flush=True)


def shown(every: list[Row]) -> Iterator[list[object]]:
    """Perplexity per kind, dense, pruned and recovered, and the shares won back."""
    bases = set()
    for row in every:
        base = (row["keep"], row["compensate"], row["prune_tokens"], row["eval_tokens"])
        for side in SIDES if base not in bases else SIDES[2:]:
            cells = [f"{math.exp(min(row['nll'][kind][side], 50)):.4g}" for kind in (*SEEN, *UNSEEN)]
            won = [f"{row['won_seen']:.1%}", f"{row['won_unseen']:.1%}", f"{row['seconds']:.0f}"]
            first = {"dense": ["1", "–", "(dense)"], "pruned": [row["keep"], "–", "(none)"]}
            cut = [row["keep"], row["tokens"], row["arm"]]
            yield [*first.get(side, cut), *cells, *(won if side == "recovered" else "–––")]
        bases.add(base)


def main() -> None:
    """Run, or print the table."""
    tokens = {"tokens": 16384, "prune_tokens": 16384, "eval_tokens": 2048, "seq_len": 256}
    arms = ["refit", "lora", "distil"]
    args = arguments(__doc__, OUT, work=Path("work"), arms=arms, keep=0.5, seed=0, compensate=True, **tokens)
    if args.show:
        columns = ("keep", "tokens", "recovery", *SEEN, *UNSEEN, "won, seen", "won, unseen", "seconds")
        print("\n".join(table(columns, shown(rows(args.out)))))
    else:
        run(args)


if __name__ == "__main__":
    main()
