"""Prune a Llama in memory from the command line: peak memory, and the share of verification in the CPU time.

    python benchmarks/pruning_memory.py                  # 0.54B parameters in bfloat16; about 1 minute when idle

Weights are random, in shards. The peak is the resident memory of the process (VmHWM), imports included, beside 1.6 ×
the weights + 0.5 GB. Verification is the comparison of the cut network with the masked one in float64, and the proof
before the cut; its share is of the CPU seconds of the whole run. Rows go to benchmarks/results/pruning_memory.jsonl.
"""

import argparse
import json
import platform
import shutil
import tempfile
from datetime import date
from pathlib import Path

import torch
from streamed_pruning import SIZES, configuration, make_model, measured

from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "pruning_memory.jsonl"
RUN = """
import json, sys, time
from contextlib import contextmanager
import regrow.cli
from regrow.jobs.recording import ActiveRun
from regrow.jobs.prune import run
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
done = run(settings, Invocation(out))
print(json.dumps({"peaks": peaks, "peak": max(peaks.values()), "cpu": cpu, "proof": proof[0],
                  "total_cpu": time.process_time(), "verify": done.last("verify")}))
"""


def prune(size: str, layers: int, tokens: int, seq: int, place: Path) -> dict[str, object]:
    """Make a model unless it is there, prune it, and return the row of the result."""
    config = configuration(size, layers)
    folder, out = place / f"llama-{size}-{config['num_hidden_layers']}", place / "in-memory"
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        make_model(folder, config)
    shutil.rmtree(out, ignore_errors=True)
    row = measured(RUN, folder, out, tokens, seq)
    shutil.rmtree(out)
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    cpu, peak, proof, total = row["cpu"], row["peak"], row["proof"], row["total_cpu"]
    assert isinstance(cpu, dict) and isinstance(peak, int) and isinstance(proof, float) and isinstance(total, float)
    return {
        "model": f"llama-{size}-{config['num_hidden_layers']}",
        "tokens": tokens,
        "seq_len": seq,
        "model_bytes": stored,
        "bound": round(1.6 * stored + 0.5e9),
        "peak_over_model": round(peak / stored, 3),
        "verify_share": round((cpu["verify"] + proof) / total, 3),
    } | row


def main() -> None:
    """Measure and append the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="0.5B", choices=SIZES)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "streamed-pruning")
    given = parser.parse_args()
    row = prune(given.size, given.layers, given.tokens, given.seq_len, given.folder)
    row |= {"date": str(date.today()), "versions": versions(), "threads": torch.get_num_threads()}
    row |= {"processor": platform.processor() or platform.machine()}
    with OUT.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
