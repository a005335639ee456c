"""Recovery at equal tokens after two cuts: whether the selection of units still matters, and how much is won back.

    python recipes/recovery_curve.py --texts FOLDER --work FOLDER [--arm fisher flap] [--by distil] [--tokens 100000]
    python recipes/recovery_curve.py --texts FOLDER --work FOLDER --tune          rates, by held-out text
    python recipes/recovery_curve.py --texts FOLDER --work FOLDER --tasks FOLDER  answers of dense, fitted, recovered
    python recipes/recovery_curve.py --show

The cuts are those of ``equal_terms.py`` on the same 28,672 tokens, with the same least squares. Then all weights are
distilled, or LoRA is trained and merged, on windows of 256 tokens from the calibration halves of the fold's four
domains, drawn without repetition, eight a step; ``--tokens`` counts what is read. 32 further windows are held out: they
choose the rate (``--tune``, 100,000 tokens after ``flap``) and the best of five states. The twelve unseen domains are
those of ``equal_terms.py``. A stopped training goes on where it was, and finished networks stay in ``--work``.
"""

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from equal_terms import ARMS, BATCH, FOLDS, SEQ_LEN, Bench, average, lost
from equal_terms import OUT as EQUAL
from harness import Row, add, arguments, rows, table
from safetensors.torch import load_file, save_file
from torch import nn

from regrow.core.process_memory import return_memory
from regrow.core.sources import Source
from regrow.data import Half
from regrow.data.batch_streams import join_sources
from regrow.evaluation.choice import choices, items_in
from regrow.jobs.recovery_steps import reconstruct
from regrow.methods import MethodKind, find_method
from regrow.methods.recovery import RecoveryTask
from regrow.nets.devices import autocasting

OUT = Path(__file__).parent / "results" / "recovery_curve.jsonl"
RATES = {"distil": (1e-4, 3e-4, 6e-4), "lora": (5e-4, 1e-3, 3e-3)}
BEST = {"distil": 1e-4, "lora": 3e-3}  # by --tune, on held-out text
TRAINED: dict[str, dict[str, Any]] = {"distil": {"mix": 0.1}, "lora": {"rank": 16, "alpha": 32.0}}
HELD, POOL, TASKS = 32, 20_000, ("arc_easy", "piqa")
KEYS = ("arm", "keep", "fold", "sample", "by", "tokens", "lr")


def training_source(bench: Bench, fold: int, tokens: int) -> Source:
    """Return windows of the fold's domains, mixed as they are there, and behind them those that are held out."""
    every = [bench.read(name, POOL, Half.CALIBRATION, 1000) for name in FOLDS[fold]]
    windows = [batch for source in every for batch in source]
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(fold)).tolist()
    held, rest = order[:HELD], order[HELD:]
    count = tokens // SEQ_LEN // BATCH * BATCH
    if count > len(rest):
        raise SystemExit(f"fold {fold} has {len(rest) * SEQ_LEN:,} tokens to learn from; ask for fewer")
    chosen = Source("text", [windows[i] for i in rest[:count] + held])
    return Source("text", [*join_sources([chosen], BATCH)])


def fitted(bench: Bench, args: Namespace, arm: str, keep: float, fold: int, sample: int) -> RecoveryTask:
    """Return the cut network after least squares, and what a recovery needs."""
    sources = bench.calibration(fold, sample, "written")
    network, _, plan = bench.prune(ARMS[arm], keep, fold, sample, "written")
    task = RecoveryTask(network, bench.model, bench.axes, plan, sources)
    path = args.work / f"{arm}-{keep}-{fold}-{sample}.safetensors"
    if path.is_file():
        read(network, path)
    else:
        reconstruct(task, precision=bench.precision)
        save(network, path)
    return task


def train(bench: Bench, args: Namespace, task: RecoveryTask, row: Row) -> Row:
    """Recover the network of a task in place, or read it where that is done; return the row with its figures."""
    name = "-".join(str(row[key]) for key in KEYS)
    source, done = training_source(bench, row["fold"], row["tokens"]), args.work / f"{name}.json"
    values = args.work / f"{name}.safetensors"
    if done.is_file():
        read(task.model, values)
        found: Row = json.loads(done.read_text("utf-8"))
        return found
    settings = {**TRAINED[row["by"]], "lr": row["lr"], "passes": 1, "windows": 1, "checks": 5}
    settings["held_out"] = HELD / BATCH / len(source)
    file, start = args.work / f"{name}-part.safetensors", time.perf_counter()
    one = replace(task, sources=[source], checkpoint=file, precision=bench.precision, progress=report)
    with autocasting(task.model, bench.precision), autocasting(bench.model, bench.precision):
        summary: dict[str, Any] = find_method(MethodKind.RECOVERY, row["by"]).create(row["by"], settings)(one)
    save(task.model, values)
    best = round(min(check["held_out"] for check in summary["history"]), 5)
    found = {**row, "held_out": best, "seconds": round(time.perf_counter() - start), "trained": summary["trained"]}
    done.write_text(json.dumps(found), "utf-8")
    file.unlink(missing_ok=True)
    return found


def save(network: nn.Module, path: Path) -> None:
    """Write the parameters of a network."""
    save_file({name: p.detach().contiguous() for name, p in network.named_parameters()}, path)


def read(network: nn.Module, path: Path) -> None:
    """Give a network the parameters in a file; tied ones are there once."""
    own = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in load_file(path).items():
            own[name].copy_(value)


def report(done: int, total: int, what: str) -> None:
    """Print a line per twentieth of a training."""
    if done % max(1, total // 20) == 0:
        print(f"  {what}: {done} of {total}", flush=True)


def points(args: Namespace) -> Iterator[Row]:
    """Yield what is to be trained."""
    if args.tune:
        for by in args.by:
            for lr in RATES[by]:
                yield dict(zip(KEYS, ("flap", args.keep, 0, 0, by, 100_000, lr), strict=True))
        return
    for fold, sample, tokens, by, arm in product(args.fold, args.sample, args.tokens, args.by, args.arm):
        yield dict(zip(KEYS, (arm, args.keep, fold, sample, by, tokens, BEST[by]), strict=True))


def run(args: Namespace) -> None:
    """Compute the rows that are missing."""
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    for point in points(args):
        found = [row for row in rows(args.out) if all(row.get(key) == point[key] for key in KEYS) and "nats" in row]
        if found:
            continue
        where = {key: point[key] for key in KEYS[:4]}
        task = fitted(bench, args, **where)
        if not any(row["by"] == "" and where.items() <= row.items() for row in rows(args.out)):
            start = {**where, "by": "", "tokens": 0, "lr": 0.0, "nats": bench.measure(task.model, point["fold"])}
            add(args.out, start)
        row = train(bench, args, task, point)
        row["nats"] = bench.measure(task.model, point["fold"])
        add(args.out, row)
        print(f"{point}: held out {row['held_out']}, unseen {fmean(row['nats'].values()):.4f}", flush=True)
        return_memory()


def answer(args: Namespace) -> None:
    """Compute the answers of the dense network and of all trained ones that have none, the most tokens first."""
    bench, done = Bench(args), {json.dumps(row["of"]) for row in rows(args.out) if "task" in row}
    trained = sorted((row for row in rows(args.out) if "nats" in row), key=lambda row: -row["tokens"])
    best = [next((row for row in trained if (row["arm"], row["fold"]) == (arm, 0)), None) for arm in args.arm]
    starts = [row for row in trained if row["by"] == "" and row["arm"] in args.arm]
    for row in (None, *filter(None, best), *starts):
        of = {key: row[key] for key in KEYS} if row else {}
        if json.dumps(of) in done:
            continue
        network: nn.Module = bench.model
        if row:
            task = fitted(bench, args, **{key: row[key] for key in KEYS[:4]})
            network = task.model
            if row["by"]:
                train(bench, args, task, of)
        for name in TASKS:
            with autocasting(network, bench.precision):
                found = choices(network, bench.loaded.tokenizer, items_in(args.tasks / f"{name}.jsonl.gz"), task=name)
            add(
                args.out,
                {"of": of, **{key: found.record()[key] for key in ("task", "items", "right", "right_per_byte")}},
            )
            print(f"{of}: {name} {found.accuracy:.4f}", flush=True)


def show(every: list[Row]) -> Iterator[str]:
    """Yield the table of nats lost, with the difference between arms, and that of answers."""
    equal, lines = rows(EQUAL), []
    for row in sorted((row for row in every if "nats" in row), key=lambda row: (row["by"], row["tokens"], row["arm"])):
        own = lost({**row, "model": "smollm2-135m"}, equal)
        rivals = (one for one in every if "nats" in one and one["arm"] == "flap" != row["arm"])
        same = next((one for one in rivals if all(one[key] == row[key] for key in KEYS[1:])), None)
        against = average([{name: row["nats"][name] - same["nats"][name] for name in own}], "+") if same else ""
        cells = [row[key] for key in KEYS]
        lines.append([*cells, row.get("held_out", ""), average([own]), against, row.get("seconds", "")])
    yield from table([*KEYS, "held out", "nats lost", "against `flap`", "seconds"], lines)
    yield ""
    answers = [row for row in every if "task" in row]
    lines = []
    for of in {json.dumps(row["of"]): row["of"] for row in answers}.values():
        right = {
            key: [one for row in answers if row["of"] == of for one in row[key]] for key in ("right", "right_per_byte")
        }
        shares = [
            f"{fmean(values):.2%} ± {(fmean(values) * (1 - fmean(values)) / len(values)) ** 0.5:.2%}"
            for values in right.values()
        ]
        lines.append([of.get("arm", "dense"), of.get("by", ""), of.get("tokens", ""), len(right["right"]), *shares])
    yield from table(["arm", "recovery", "tokens", "items", "right", "right, per byte"], lines)


def main() -> None:
    """Compute, or print the tables."""
    which: dict[str, Any] = {"arm": ["fisher", "flap"], "by": ["distil"], "tokens": [100_000, 300_000, 1_000_000]}
    which |= {"fold": [0], "sample": [0], "keep": 0.8, "tune": False, "tasks": Path}
    args = arguments(__doc__, OUT, model="smollm2-135m", texts=Path("texts"), work=Path("work"), **which)
    if args.show:
        print(*show(rows(args.out)), sep="\n")
    elif args.tasks:
        answer(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
