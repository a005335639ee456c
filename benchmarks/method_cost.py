"""What ``regrow prune`` costs on SmolLM2-135M by method and fit: CPU seconds and peak memory of the command, in turn.

    python benchmarks/method_cost.py                                       # all arms, one window at a time, once each
    python benchmarks/method_cost.py --dtype bfloat16 --arms flap fisher --repeats 2
    python benchmarks/method_cost.py --show                                # in multiples of flap

The command loads the model, calibrates on 16 windows of 256 tokens of each of three sources, cuts MLP neurons to keep
0.8, writes the run folder and evaluates 2,048 tokens of each source, as it does by default, on one thread. Arms named
*N generated windows* generate N windows of 256 tokens, calibrate on them too, and fit layers to the dense network. One
row per run is appended to benchmarks/results/method_cost.jsonl; rows of this processor are not measured again. 2 to 15
minutes a run. Ratios depend on the processor and the dtype: products of bfloat16 are fast where there is AMX, and slow
where there is none.
"""

import platform
import sys
import tempfile
from argparse import Namespace
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from shared import Row, add, arguments, last_line, rows, timed

from regrow.store.run_record import versions

OUT = Path(__file__).parent / "results" / "method_cost.jsonl"
WORDS = "smollm2-135m --keep 0.8 --only mlp --source news --source code --source manual --tokens 4096"
ARMS = {
    "flap": "flap",
    "fisher": "fisher",
    "flap, reconstructed": "flap --reconstruct",
    **{
        f"{method}, {n} generated windows, reconstructed": (
            f"{method} --source generated --generated-tokens {n * 256} --reconstruct"
        )
        for method, n in (*product(("flap", "fisher"), (96, 64, 48)), ("obs", 48))
    },
}
"""What is compared: name → the method, and further words of the command."""
GIVEN = ("processor", "dtype", "batch_size", "eval_tokens")
"""What rows that are compared have in common."""


def measure(arm: str, args: Namespace) -> Row:
    """Run the command; the peak is that of its process."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"{WORDS} --method {ARMS[arm]} --dtype {args.dtype} --batch-size {args.batch_size}"
        words += f" --eval-tokens {args.eval_tokens} --out {folder}/run"
        done = timed([sys.executable, "-m", "regrow", "prune", *words.split()], environment={"OMP_NUM_THREADS": "1"})
    if done.code:
        raise SystemExit(f"{arm} failed: {last_line(done.text)}")
    return {"cpu_s": round(done.cpu, 1), "wall_s": round(done.seconds, 1), "peak_mib": round(done.peak)}


def show(every: list[Row]) -> None:
    """Print the means of each method, and their ratios to the first."""
    for group in sorted({tuple(row[name] for name in GIVEN) for row in every}):
        flap: list[float] = []
        for arm in ARMS:
            own = [row for row in every if row["arm"] == arm and tuple(row[name] for name in GIVEN) == group]
            if own:
                means = [fmean(row[name] for row in own) for name in ("cpu_s", "peak_mib")]
                flap = means if arm == "flap" else flap
                ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(means, flap, strict=False))
                given = ", ".join(f"{name} {value}" for name, value in zip(GIVEN, group, strict=True))
                print(f"{given}, {arm}: {means[0]:.1f} CPU s, {means[1]:.0f} MiB; {ratios} x flap")


def main() -> None:
    """The arms in turn."""
    sizes = {"dtype": "float32", "batch_size": 1, "eval_tokens": 2048, "repeats": 1}
    args = arguments(__doc__, OUT, arms=(*ARMS,), **sizes)
    if args.show:
        show(rows(args.out))
        return
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    for repeat, arm in product(range(args.repeats), args.arms):
        key = {
            "arm": arm,
            "processor": processor,
            **{name: getattr(args, name) for name in GIVEN[1:]},
            "repeat": repeat,
        }
        if not any(key.items() <= row.items() for row in rows(args.out)):
            print(add(args.out, {**key, **measure(arm, args), **versions()}), flush=True)


if __name__ == "__main__":
    main()
