"""Prune a Llama in memory from the command line: peak memory, and the share of verification in the CPU time.

    python benchmarks/pruning_memory.py                  # 0.54B parameters in bfloat16; about 1 minute when idle

Weights are random, in shards. The peak is the resident memory of the process (VmHWM), imports included, beside 1.6 ×
the weights + 0.5 GB. Verification is the comparison of the cut network with the masked one in float64, and the proof
before the cut; its share is of the CPU seconds of the whole run. Rows go to benchmarks/results/pruning_memory.jsonl.
"""

import json
import platform
import shutil
from pathlib import Path

import torch
from shared import Row, add, arguments
from streamed_pruning import FOLDER, SIZES, made, measured

from regrow.store.run_record import versions

OUT = Path(__file__).parent / "results" / "pruning_memory.jsonl"
RUN = """
import json, sys, time
from contextlib import contextmanager
import regrow.cli
from regrow.jobs.recording import ActiveRun
from regrow.jobs.prune import prune_named
from regrow.jobs.recording import Invocation
from regrow.settings.prune import Settings
surgery = sys.modules["regrow.surgery.apply"]
def peak():
    return next(1024 * int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
cpu, peaks, proof, true_stage, true_check = {}, {}, [0.0], ActiveRun.stage, surgery.check_blocks
@contextmanager
def stage(self, name):
    open("/proc/self/clear_refs", "w").write("5")
    start = time.process_time()
    with true_stage(self, name): yield
    cpu[name] = cpu.get(name, 0) + time.process_time() - start
    peaks[name] = max(peaks.get(name, 0), peak())
def check_blocks(change):
    start = time.process_time()
    true_check(change)
    proof[0] += time.process_time() - start
ActiveRun.stage, surgery.check_blocks = stage, check_blocks
folder, out, tokens, seq = sys.argv[1:5]
settings = Settings(folder, "flap", {}, 0.7, sources=("news",), tokens=int(tokens), eval_tokens=int(seq),
                    seq_len=int(seq), undo=False)
done = prune_named(settings, Invocation(out))
print(json.dumps({"peaks": peaks, "peak": max(peaks.values()), "cpu": cpu, "proof": proof[0],
                  "total_cpu": time.process_time(), "verify": done.last("verify")}))
"""


def prune(size: str, layers: int, tokens: int, seq: int, place: Path) -> Row:
    """Make a model unless it is there, prune it, and return the row of the result."""
    folder, _ = made(size, layers, place)
    out = place / "in-memory"
    shutil.rmtree(out, ignore_errors=True)
    row = measured(RUN, folder, out, tokens, seq)
    shutil.rmtree(out)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    first = {"model": folder.name, "tokens": tokens, "seq_len": seq, "model_bytes": stored}
    first |= {"bound": round(1.6 * stored + 0.5e9), "peak_over_model": round(row["peak"] / stored, 3)}
    return first | {"verify_share": round((row["cpu"]["verify"] + row["proof"]) / row["total_cpu"], 3)} | row


def main() -> None:
    """Measure and append the row."""
    args = arguments(__doc__, size={*SIZES}, layers=28, tokens=4096, seq_len=512, folder=FOLDER)
    row = prune(args.size or "0.5B", args.layers, args.tokens, args.seq_len, args.folder)
    row |= {"versions": versions(), "threads": torch.get_num_threads()}
    print(json.dumps(add(OUT, row | {"processor": platform.processor() or platform.machine()}), indent=1))


if __name__ == "__main__":
    main()
