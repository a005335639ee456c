"""One pruned language model in five places, and whether all of them foresee the same next token.

    python recipes/five_places.py RUN --plain PYTHON --llama-cpp PYTHON

The places: regrow (the reference, in float32); transformers in PYTHON, an interpreter with torch and transformers where
regrow is not installed; onnxruntime; stock llama.cpp, in an interpreter that has llama-cpp-python; and lm-eval. The
first two read the run folder itself. 200 prompts are windows of real text of four kinds, from their evaluation halves.
Told per place: of how many prompts the next token is another one and by how much torch prefers its own, the largest
difference of a logit, and how many of the first prompts go on with the same words.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, arguments, today, write

import regrow
from regrow.data import Half, text, windows
from regrow.store.portable import read_tokenizer
from regrow.store.run_record import versions

OUT = Path(__file__).parent / "results" / "five_places.json"
GREEDY = 4
"""Prompts that are carried on."""

SPEAK = """
import json, sys
from pathlib import Path
import numpy
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
def speak(ask, name):
    numpy.save(folder / f"{name}.npy", numpy.stack([ask(ids) for ids in job["prompts"]]))
    told = []
    for ids in job["prompts"][: job["greedy"]]:
        said = list(ids)
        for _ in range(job["steps"]):
            said.append(int(ask(said).argmax()))
        told.append(said[len(ids):])
    (folder / f"{name}.json").write_text(json.dumps(told))
"""
TORCH = """
import torch
def asking(model):
    model.eval()
    def ask(ids):
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0, -1].float().numpy()
    return ask
"""
PLACES = {
    "regrow": TORCH
    + """
import regrow
speak(asking(regrow.load(job["run"], dtype=torch.float32)), "regrow")
""",
    "transformers": TORCH
    + """
import importlib.util
assert importlib.util.find_spec("regrow") is None, "regrow is installed here; it must not be"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(job["run"], trust_remote_code=True, dtype=torch.float32)
speak(asking(model), "transformers")
""",
    "onnxruntime": """
import onnxruntime
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
def ask(ids):
    ids = numpy.array([ids])
    return session.run(None, {"input_ids": ids, "attention_mask": numpy.ones_like(ids)})[0][0, -1]
speak(ask, "onnxruntime")
""",
    "lm-eval": TORCH
    + """
from lm_eval.models.huggingface import HFLM
harness = HFLM(pretrained=job["run"], trust_remote_code=True, device="cpu", dtype="float32")
def ask(ids):
    return harness._model_call(torch.tensor([ids]))[0, -1].float().numpy()
speak(ask, "lm-eval")
""",
    "llama.cpp": """
import llama_cpp
net = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=256, type_k=0, type_v=0, logits_all=True, verbose=False)
def ask(ids):
    net.reset()
    net.eval(ids)
    return numpy.array(net.scores[len(ids) - 1])
speak(ask, "llama.cpp")
""",
}


def ran(python: str, code: str, folder: Path) -> None:
    """Run a piece of code.

    Raises:
        SystemExit: If it fails.
    """
    done = subprocess.run(
        [python, "-W", "ignore", "-c", SPEAK + code, str(folder)], capture_output=True, text=True, cwd="/"
    )
    if done.returncode:
        raise SystemExit(done.stderr[-1500:])


def prompts_of(tokenizer: Any, n: int, length: int) -> torch.Tensor:
    """Windows of all kinds of text, one kind after the other, ``[n, length]``."""
    kinds = ("news", "code", "manual", "talk")
    sources = [windows(text(kind), tokenizer, n=-(-n // 4), seq_len=length, half=Half.EVALUATION) for kind in kinds]
    ids = [torch.cat([batch.args[0] for batch in source]) for source in sources]
    return torch.stack(ids, 1).flatten(0, 1)[:n]


def compared(name: str, folder: Path, tokenizer: Any) -> Row:
    """A place beside the reference."""
    ours, theirs = np.load(folder / "regrow.npy"), np.load(folder / f"{name}.npy")
    other = np.flatnonzero(ours.argmax(-1) != theirs.argmax(-1))
    margins = [float(ours[i].max() - ours[i, theirs[i].argmax()]) for i in other]
    mine, told = (json.loads((folder / f"{one}.json").read_text()) for one in ("regrow", name))
    return {
        "next_tokens_differ": len(other),
        "margins": [round(m, 5) for m in sorted(margins)],
        "max_logit_difference": float(np.abs(ours - theirs).max()),
        "same_text": sum(a == b for a, b in zip(mine, told, strict=True)),
        "texts": [tokenizer.decode(one) for one in told[:2]],
    }


def main() -> None:
    """Ask everywhere, and write."""
    sizes = {"prompts": 200, "tokens": 32, "steps": 24}
    args = arguments(__doc__, OUT, {"run": ()}, plain="", llama_cpp="", **sizes)
    run = Path(args.run).resolve()
    tokenizer = read_tokenizer(run)
    prompts = prompts_of(tokenizer, args.prompts, args.tokens)
    settings = json.loads((run / "run.json").read_text())["settings"]
    result: Row = {"date": today(), "versions": versions(), "places": {}}
    result["run"] = {name: settings[name] for name in ("model", "method", "method_settings", "keep", "seed")}
    result |= {"prompts": len(prompts), "tokens_of_a_prompt": args.tokens}
    result |= {"carried_on": {"prompts": GREEDY, "tokens": args.steps}}
    pythons = {"transformers": args.plain, "onnxruntime": sys.executable, "lm-eval": sys.executable}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = {"run": str(run), "prompts": prompts.tolist(), "greedy": GREEDY, "steps": args.steps}
        (folder / "job.json").write_text(json.dumps(job))
        ran(sys.executable, PLACES["regrow"], folder)
        result["largest_logit"] = float(np.abs(np.load(folder / "regrow.npy")).max())
        result["texts"] = [tokenizer.decode(ids) for ids in json.loads((folder / "regrow.json").read_text())[:2]]
        regrow.export(run, folder / "model.onnx", format="onnx")
        if args.llama_cpp:
            regrow.export(run, folder / "model.gguf", format="gguf", dtype="f32")
        for name, python in {**pythons, "llama.cpp": args.llama_cpp}.items():
            if python:
                ran(python, PLACES[name], folder)
                result["places"][name] = compared(name, folder, tokenizer)
                print(name, result["places"][name], flush=True)
    write(args.out, result)


if __name__ == "__main__":
    main()
