"""``regrow prune`` on two hosts, which are two network namespaces of one machine: the plan of a single process.

    sudo python recipes/two_hosts.py                      # Linux, with `ip` of iproute2; about a minute

A pair of virtual Ethernet devices joins the namespaces ``regrow-a`` and ``regrow-b``. ``torchrun --nnodes 2`` runs one
process in each; a single process prunes the same tiny Llama besides. Compared are the ledger with the plan, the
weights, the scores and the measurements, byte for byte; nothing may have been written on the second host. A row goes to
``results/two_hosts.jsonl``, and the namespaces are removed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from rows import add

from regrow.nets import load
from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "two_hosts.jsonl"
HOSTS = {"regrow-a": "10.77.0.1", "regrow-b": "10.77.0.2"}
FILES = ("ledger.json", "model.safetensors", "shapes.json", "scores.json", "metrics.jsonl")
WORDS = [
    "--keep",
    "0.7",
    "--source",
    "news",
    "--source",
    "code",
    "--tokens",
    "640",
    "--eval-tokens",
    "640",
    "--seq-len",
    "64",
]


def ip(*words: str) -> None:
    """Run ``ip`` of iproute2."""
    subprocess.run(["ip", *words], check=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two network namespaces, joined by a pair of virtual Ethernet devices."""
    try:
        ip("link", "add", "regrow-a0", "type", "veth", "peer", "name", "regrow-b0")
        for name, address in HOSTS.items():
            device = f"{name}0"
            ip("netns", "add", name)
            ip("link", "set", device, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in HOSTS:  # and with them their devices
            subprocess.run(["ip", "netns", "delete", name], check=False)


def make_model(folder: Path) -> None:
    """Write a tiny random Llama with the tokenizer of SmolLM2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load("smollm2-135m").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def start(host: str, number: int, model: Path, place: Path) -> subprocess.Popen[bytes]:
    """Start torchrun on a host, in a folder of its own."""
    place.mkdir()
    meeting = ["--master-addr", HOSTS["regrow-a"], "--master-port", "29577"]
    launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
    command = [sys.executable, *launch, *meeting, "-m", "regrow", "prune", str(model), *WORDS, "--out", "run"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": f"{host}0"}
    return subprocess.Popen(["ip", "netns", "exec", host, *command], cwd=place, env=environment)


def main() -> None:
    """Prune on one host and on two, compare, and add the row."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model, one = place / "model", place / "one"
        make_model(model)
        subprocess.run([sys.executable, "-m", "regrow", "prune", str(model), *WORDS, "--out", str(one)], check=True)
        began = time.time()
        with two_hosts():
            running = [start(host, number, model, place / host) for number, host in enumerate(HOSTS)]
            codes = [process.wait(300) for process in running]
        first, second = (place / host for host in HOSTS)
        same = {file: (one / file).read_bytes() == (first / "run" / file).read_bytes() for file in FILES}
        row = {
            "hosts": len(HOSTS),
            "exit_codes": codes,
            "same_bytes": same,
            "files_on_the_second_host": sorted(str(path.relative_to(second)) for path in second.rglob("*")),
            "seconds": round(time.time() - began, 1),
            "date": str(date.today()),
            "versions": versions(),
        }
    print(json.dumps(row, indent=1))
    if any(codes) or not all(same.values()) or row["files_on_the_second_host"]:
        raise SystemExit("two hosts gave another result than one")
    add(OUT, row)


if __name__ == "__main__":
    main()
