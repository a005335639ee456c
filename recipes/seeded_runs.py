"""Small seeded runs of every command that trains or cuts: a refactoring must not change a digest of what they make.

    python recipes/seeded_runs.py                   run all, compare with what is committed
    python recipes/seeded_runs.py --only mgas       those with this in their names
    python recipes/seeded_runs.py --record          write what is found; only where an old result was wrong

Digests are of every tensor of every result in the run folder, with names, dtypes and shapes. They hold for one thread,
one version of torch and one kind of processor, which the file names; elsewhere run the old and the new version in turns
(``--source CHECKOUT``).
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open

HERE = Path(__file__).parent
OUT = HERE / "results" / "seeded_runs.json"
TEXT = "--source digits --tokens 896 --eval-tokens 64"
CODE = "--code toys:classifier"
LEARN = "learn split:digits:2 --model mlp:12-12 --epochs 2 --train 400 --test 200 --batch-size 32 --lr 0.1 --method"
SEARCH = (
    "search cells:4-2-1 --data digits --target params=3k --train 120 --test 60 --batch-size 48 --epochs 8 --retrain 2 "
    "--stride 1 --method"
)
RUNS = {
    "prune flap": f"prune toys:classifier --method flap --keep 0.6 {TEXT}",
    "prune gprune": f"prune toys:classifier --method gprune --set steps=6 --set every=2 --keep 0.6 {TEXT} --finetune 2",
    "recover refit": f"recover 'prune flap' --by refit {CODE} --tokens 896",
    "recover lora": f"recover 'prune flap' --by lora {CODE} --tokens 896 --set passes=3 --set checks=3 --set windows=1",
    "recover distil": f"recover 'prune flap' --by distil {CODE} --tokens 896",
    "learn sparsegrow": f"{LEARN} sparsegrow",
    "learn ewc": f"{LEARN} ewc",
    "learn der++": f"{LEARN} replay",
    "search mgas": f"{SEARCH} mgas --set warm=1 --set every=1 --set share=0.3",
    "search darts": f"{SEARCH} darts",
}
"""Name and folder of a run → its command."""


def digest(folder: Path) -> str:
    """Of all tensors in the results of a run, wherever they lie, but for those of the model that it started from."""
    found = hashlib.sha256()
    results = (path for path in folder.rglob("model.safetensors") if "before" not in path.relative_to(folder).parts)
    for path in sorted(results):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                found.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
                found.update(tensor.contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


def run(name: str, command: str, work: Path, source: Path) -> dict[str, Any]:
    """Run a command in a folder on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = f"{(source / 'src').resolve()}{os.pathsep}{work}"
    began = time.monotonic()
    words = [sys.executable, "-W", "ignore", "-m", "regrow", *shlex.split(command), "--out", name]
    done = subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}: {done.stderr.strip()[-600:]}")
    return {"digest": digest(work / name), "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    """Run and compare, or write."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="runs with this in their names, and those they need")
    parser.add_argument("--record", action="store_true", help="write the digests")
    parser.add_argument("--source", type=Path, default=HERE.parent, help="another checkout")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    known = json.loads(given.out.read_text())["digests"] if given.out.exists() else {}
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copy(HERE.parent / "tests" / "cli" / "toys.py", work)
        for name, command in RUNS.items():
            needed = "recover" in given.only and name == "prune flap"
            if given.only not in name and not needed:
                continue
            made = run(name, command, work, given.source)
            found[name] = made["digest"]
            same = "new" if name not in known else "as before" if known[name] == found[name] else "DIFFERENT"
            print(f"{name:18} {made['digest'][:16]} {same} ({made['seconds']} s)", flush=True)
    if given.record:
        machine = {"torch": torch.__version__, "processor": platform.machine(), "threads": 1}
        result = {"date": time.strftime("%Y-%m-%d"), **machine, "digests": {**known, **found}}
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    elif changed := [name for name, one in found.items() if known.get(name) not in (None, one)]:
        raise SystemExit(f"other results than before: {', '.join(changed)}")


if __name__ == "__main__":
    main()
