"""The memory of regrow prune, evaluate, export and recover on SmolLM2-135M: predicted and measured.

    python benchmarks/command_memory.py                      # up to 10 minutes when idle; resumes where it was stopped
    python benchmarks/command_memory.py --only export        # commands whose name contains a word
    python benchmarks/command_memory.py --again              # measure all again

Each command runs in a process of its own, with one thread. The peak is the resident memory of the process, imports
included, to the four digits that the command prints. The limit of `evaluate, one block` is exceeded by the whole model.
What is recovered is SmolLM2-135M cut to 0.8 of its weights, in float32; windows have 256 tokens. Rows go to
benchmarks/results/command_memory.jsonl.
"""

import re
import sys
import tempfile
from pathlib import Path

from shared import Row, Timed, arguments, collect, last_line, timed

from regrow.core.amounts import parse_bytes
from regrow.store.run_record import versions

OUT = Path(__file__).parent / "results" / "command_memory.jsonl"
DATA = "--source news --eval-tokens 512 --seq-len 256"
PRUNE = f"prune smollm2-135m --method flap --keep 0.8 --tokens 1024 {DATA} --dtype float32 --out cut"
LEARN = f"prune smollm2-135m --method flap --keep 0.8 --tokens 1024 {DATA} --no-undo --memory 64GiB"
COMMANDS = {
    "evaluate, whole": f"evaluate smollm2-135m {DATA} --dtype float32 --memory 64GiB",
    "evaluate, one block": f"evaluate smollm2-135m {DATA} --dtype float32 --memory 1GiB",
    "evaluate, whole, bfloat16": f"evaluate smollm2-135m {DATA} --dtype bfloat16 --memory 64GiB",
    "export": "export smollm2-135m --to gguf --memory 64GiB --out model.gguf",
    "prune, llm_pruner": f"{LEARN} --dtype float32 --method llm_pruner --out pruned-gradients",
    "recover, refit": "recover cut --by refit --tokens 4096 --memory 64GiB --out refit",
    "recover, refit, one block": "recover cut --by refit --tokens 4096 --memory 1.5GiB --out refit-streamed",
    "recover, lora": "recover cut --by lora --tokens 4096 --memory 64GiB --out lora",
    "recover, distil": "recover cut --by distil --tokens 4096 --memory 64GiB --out distil",
}
"""Name → command line."""
PEAK = re.compile(r"memory: ([\d.]+ \w+) at the peak, ([\d.]+ \w+) predicted")


def run(words: str, place: Path) -> Timed:
    """Run a command of regrow; the benchmark ends if it fails."""
    done = timed([sys.executable, "-W", "ignore", "-m", "regrow", *words.split()], place)
    if done.code:
        raise SystemExit(f"regrow {words}: {last_line(done.text)}")
    return done


def measure(name: str, place: Path) -> Row:
    """Run a command, after pruning the model that it recovers, and return its row."""
    if name.startswith("recover") and not (place / "cut" / "run.json").exists():
        run(PRUNE, place)
    done = run(COMMANDS[name], place)
    line = PEAK.search(" ".join(done.text.split()))
    if line is None:
        raise SystemExit(f"regrow {COMMANDS[name]} printed no peak of memory")
    peak, prediction = map(parse_bytes, line.groups())
    row = {"command": COMMANDS[name], "peak": peak, "predicted": prediction}
    row["peak_over_predicted"] = round(peak / prediction, 3)
    return row | {"versions": versions(), "wall_s": round(done.seconds, 1)}


def main() -> None:
    """Measure the commands that have no row yet."""
    args = arguments(__doc__, only="", again=False, out=OUT)
    with tempfile.TemporaryDirectory() as place:
        names = [name for name in COMMANDS if args.only in name]
        collect(names, lambda name: measure(name, Path(place)), args.out, anew=args.again)


if __name__ == "__main__":
    main()
