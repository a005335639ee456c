"""What each recovery wins back of what pruning lost, at equal tokens, on kinds of text seen and unseen.

    python recipes/recovery_table.py --work FOLDER --out recipes/results/recovery.jsonl
    python recipes/recovery_table.py --out recipes/results/recovery.jsonl --table

SmolLM2-135M in float32, cut by FLAP; calibrated, and recovered, on news and code, evaluated on the other half of these
(seen) and on manual and talk (unseen). ``--arms`` names recoveries with their settings (``refit``,
``refit:target=output``); each reads the same windows. One dated line is written per arm as soon as it is measured; arms
that are there already are not run again, and a stopped one goes on where it was (its runs are in ``--work``).

won = (nll pruned − nll recovered) / (nll pruned − nll dense), with mean nll over the kinds
"""

import argparse
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rows import add, rows

from regrow.cli.screen import working
from regrow.jobs import recover as recovery_run
from regrow.jobs.prune import Settings
from regrow.jobs.prune import run as prune
from regrow.jobs.recording import Invocation
from regrow.settings import recover
from regrow.settings.words import parse_pairs
from regrow.store.run_folder import RunFolder

SEEN, UNSEEN = ("news", "code"), ("manual", "talk")
SIDES = ("dense", "pruned", "recovered")
KEYS = ("arm", "keep", "compensate", "tokens", "seed", "prune_tokens", "eval_tokens", "seq_len")


def pruning(args: argparse.Namespace) -> Settings:
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
        proof=False,
    )


def row_of(args: argparse.Namespace, arm: str, folder: RunFolder) -> dict[str, Any]:
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


def run(args: argparse.Namespace) -> None:
    """Fill in the arms that are missing."""
    out, work = Path(args.out), Path(args.work)
    out.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    name = f"flap-{args.keep:g}-{args.prune_tokens}-{args.eval_tokens}{'' if args.compensate else '-plain'}"
    with working() as progress:
        base = work / name
        if not (base / "run.json").is_file() or not RunFolder.open(base).run().get("finished"):
            prune(pruning(args), Invocation(base, progress=progress))
        for arm in args.arms:
            key = {key: getattr(args, key) for key in KEYS if key != "arm"} | {"arm": arm}
            if any(all(row[part] == value for part, value in key.items()) for row in rows(out)):
                continue
            by, _, given = arm.partition(":")
            place = (
                work / f"{name}-{args.tokens}-{args.seed}-{arm.replace(':', '-').replace('=', '-').replace(',', '-')}"
            )
            if not (place / "run.json").is_file() or not RunFolder.open(place).run().get("finished"):
                settings = parse_pairs([pair for pair in given.split(",") if pair])
                asked = recover.Settings(str(base), by, args.tokens, settings, seed=args.seed)
                recovery_run.run(asked, Invocation(place, progress=progress))
            row = row_of(args, arm, RunFolder.open(place))
            add(out, row)
            print(f"{arm}: won {row['won_seen']:.3f} seen, {row['won_unseen']:.3f} unseen", flush=True)


def table(args: argparse.Namespace) -> None:
    """Print perplexity per kind, dense, pruned and recovered, and the shares won back."""
    kinds = (*SEEN, *UNSEEN)
    print(f"| keep | tokens | recovery | {' | '.join(kinds)} | won, seen | won, unseen | seconds |")
    print("|---|---|---|" + "---|" * (len(kinds) + 3))
    shown = set()
    for row in rows(Path(args.out)):
        base = (row["keep"], row["compensate"], row["prune_tokens"], row["eval_tokens"])
        for side in SIDES if base not in shown else SIDES[2:]:
            cells = " | ".join(f"{math.exp(min(row['nll'][kind][side], 50)):.4g}" for kind in kinds)
            last = f"{row['won_seen']:.1%} | {row['won_unseen']:.1%} | {row['seconds']:.0f}"
            head = {"dense": "1 | – | (dense)", "pruned": f"{row['keep']} | – | (none)"}
            cut = f"{row['keep']} | {row['tokens']} | {row['arm']}"
            print(f"| {head.get(side, cut)} | {cells} | {last if side == 'recovered' else '– | – | –'} |")
        shown.add(base)


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="one JSON line per arm")
    parser.add_argument("--work", default="work", help="where the runs are kept")
    parser.add_argument("--arms", nargs="+", default=["bias", "refit", "lora", "distil"], help="recoveries")
    parser.add_argument("--keep", type=float, default=0.5, help="the fraction of the weights that stays")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of each recovery, of all sources together")
    parser.add_argument("--prune-tokens", type=int, default=16384, help="calibration tokens of the cut, per source")
    parser.add_argument("--eval-tokens", type=int, default=2048, help="evaluation tokens per kind")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per window")
    parser.add_argument("--seed", type=int, default=0, help="which windows a recovery gets, and their order")
    parser.add_argument("--no-compensate", dest="compensate", action="store_false", help="cut without FLAP's biases")
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    args = parser.parse_args()
    table(args) if args.table else run(args)


if __name__ == "__main__":
    main()
