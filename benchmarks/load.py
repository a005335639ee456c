"""What it costs to load a saved network: with and without the comparison of digests and of the answer to the probe.

    python benchmarks/load.py resnet50 smollm2-135m llama-1b     CPU seconds of one thread, one row each
    python benchmarks/load.py resnet50 --out results/load.jsonl

A version of regrow that has no ``check`` gives one figure (its load compares the digests of files). Run it from the
source tree of another version by PYTHONPATH to compare.
"""

import argparse
import datetime
import inspect
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch

import regrow
from regrow.nets import load as load_by_name
from regrow.store import save

BIG = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 16,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
"""A Llama of 1.24 G parameters."""


def network(name: str) -> Any:
    """A network by name."""
    if name != "llama-1b":
        return load_by_name(name)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(LlamaConfig(**BIG)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def seconds(folder: Path, times: int, **more: Any) -> tuple[float, float]:
    """The median of CPU and of wall-clock seconds of a load; the first, which reads the disk, is left out."""
    found = []
    for _ in range(times + 1):
        cpu, wall = time.process_time(), time.perf_counter()
        regrow.load(folder, **more)
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return statistics.median(cpu for cpu, _ in found[1:]), statistics.median(wall for _, wall in found[1:])


def main() -> None:
    """Measure each network that was named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--times", type=int, default=5, help="loads of each kind")
    parser.add_argument("--out", type=Path, help="a file of rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.names:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "m"
            begin = time.process_time()
            save(network(name), folder)
            row: dict[str, Any] = {"network": name, "saved": round(time.process_time() - begin, 2)}
            row["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
            kinds = {"checked": {}}
            if "check" in inspect.signature(regrow.load).parameters:
                row["probe_bytes"] = (folder / "probe.st").stat().st_size if (folder / "probe.st").exists() else 0
                kinds["unchecked"] = {"check": False}
            for kind, more in kinds.items():
                cpu, wall = seconds(folder, given.times, **more)
                row |= {f"{kind}_cpu": round(cpu, 3), f"{kind}_wall": round(wall, 3)}
            row |= {"torch": torch.__version__, "date": datetime.date.today().isoformat()}
            print(json.dumps(row))
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
