"""Pruned language models in the programs that load them, and whether all of them foresee the same next token.

    python recipes/five_places.py RUN … --plain PYTHON --llama-cpp PYTHON --vllm PYTHON --openvino PYTHON

The places: regrow (the reference, in float32); transformers in PYTHON, an interpreter with torch and transformers where
regrow is not installed; onnxruntime and OpenVINO, which read one file; llama.cpp and vLLM, in interpreters that have
xllamacpp and vllm; and lm-eval.
`--skip lm-eval uses` leaves out two. transformers and lm-eval read the run folder itself, vLLM what `regrow export --to
transformers` makes of it. The prompts are windows of real text of four kinds, from their evaluation halves. Told per
place: of how many prompts the next token is another one and by how much torch prefers its own, the largest difference
of a logit where the place gives logits, and how many of the first prompts go on with the same words. `uses` tells what
else was done with the run folder in transformers, and how that went. A place that fails is told by its last line.
llama.cpp is kept from ending a text; the other places go on after its end.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, add, arguments, last_line

import regrow
from regrow.data import Half, text, windows
from regrow.store.portable import read_tokenizer
from regrow.store.run_record import versions

OUT = Path(__file__).parent / "results" / "five_places.jsonl"
FEW = 4
"""Prompts that are carried on where every token takes a whole pass."""

SPEAK = """
import json, sys
from pathlib import Path
import numpy
folder = Path(sys.argv[1])
job = json.loads((folder / "job.json").read_text())
def tell(name, tokens, texts):
    (folder / f"{name}.json").write_text(json.dumps({"next": tokens, "texts": texts}))
def speak(ask, name, texts=()):
    logits = numpy.stack([ask(ids) for ids in job["prompts"]])
    numpy.save(folder / f"{name}.npy", logits)
    texts = [*texts]
    for ids in () if texts else job["prompts"][: job["few"]]:
        said = list(ids)
        for _ in range(job["steps"]):
            said.append(int(ask(said).argmax()))
        texts.append(said[len(ids):])
    tell(name, logits.argmax(-1).tolist(), texts)
def answer(ask, name):
    tell(name, [said[0] for said in ask(job["prompts"], 1)], ask(job["prompts"][: job["greedy"]], job["steps"]))
"""
TORCH = """
import torch
def asking(model):
    model.eval()
    def ask(ids):
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0, -1].float().numpy()
    return ask
def carry_on(model):
    ids, cache, said = torch.tensor(job["prompts"][: job["greedy"]]), None, []
    with torch.inference_mode():
        for _ in range(job["steps"]):
            told = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = told.logits[:, -1:].argmax(-1), told.past_key_values
            said.append(ids)
    return torch.cat(said, 1).tolist()
"""
PLACES = {
    "regrow": TORCH
    + """
import regrow
model = regrow.load(job["run"], dtype=torch.float32)
speak(asking(model), "regrow", carry_on(model))
""",
    "transformers": TORCH
    + """
import importlib.util
assert importlib.util.find_spec("regrow") is None, "regrow is installed here; it must not be"
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(job["run"], trust_remote_code=True, dtype=torch.float32)
speak(asking(model), "transformers", carry_on(model))
""",
    "onnxruntime": """
import onnxruntime
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
def ask(ids):
    ids = numpy.array([ids])
    return session.run(None, {"input_ids": ids, "attention_mask": numpy.ones_like(ids)})[0][0, -1]
speak(ask, "onnxruntime")
""",
    "openvino": """
import openvino
network = openvino.compile_model(str(folder / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
def ask(ids):
    ids = numpy.array([ids])
    return network({"input_ids": ids, "attention_mask": numpy.ones_like(ids)})[0][0, -1]
speak(ask, "openvino")
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
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel = str(folder / "model.gguf"), 256, 1
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1  # two wait for each other beside other work
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
server = xllamacpp.Server(settings)
def ask(prompts, steps):
    settings = {"n_predict": steps, "temperature": 0, "ignore_eos": True, "logprobs": 1, "cache_prompt": False}
    said = [server.handle_completions({"prompt": ids, **settings}) for ids in prompts]
    return [[token["id"] for token in one["choices"][0]["logprobs"]["content"]] for one in said]
answer(ask, "llama.cpp")
""",
    "vllm": """
import os
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
from vllm import LLM, SamplingParams
code = (Path(job["exported"]) / "modeling_regrow.py").is_file()
settings = {"trust_remote_code": True, "model_impl": "transformers"} if code else {}
llm = LLM(job["exported"], dtype="float32", max_model_len=256, max_num_seqs=32, enforce_eager=True, **settings)
def ask(prompts, steps):
    settings = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    said = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in said]
answer(ask, "vllm")
""",
}
USES = (
    TORCH
    + """
import shutil, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
ids = torch.tensor(job["prompts"][:1])
def load(place=job["run"], **settings):
    settings = {"trust_remote_code": True, "dtype": torch.float32, **settings}
    return AutoModelForCausalLM.from_pretrained(place, **settings)
def logits(model):
    with torch.inference_mode():
        return model.eval()(ids).logits
base = load()
def compare(model, other=base):
    return f"largest difference {float((logits(model) - logits(other)).abs().max())}"
def generate(**settings):
    return base.generate(ids, max_new_tokens=16, do_sample=False, **settings)
def static_cache():
    return "same text" if torch.equal(generate(), generate(cache_implementation="static")) else "another text"
def save():
    base.save_pretrained(folder / "saved")
    return compare(load(folder / "saved"))
def lora():
    model = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.save_pretrained(folder / "adapter")
    return compare(PeftModel.from_pretrained(load(), folder / "adapter"), model)
def trainer():
    settings = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    data = [{"input_ids": row, "labels": row} for row in job["prompts"][:4]]
    def make():
        arguments = TrainingArguments(folder / "trained", per_device_train_batch_size=1, **settings)
        return Trainer(load(), arguments, train_dataset=data)
    first = make()
    first.train()
    last = load(folder / "trained" / "checkpoint-2")
    second = make()
    second.train(resume_from_checkpoint=str(folder / "trained" / "checkpoint-1"))
    return f"checkpoint: {compare(last, first.model)}; resumed: {compare(second.model, first.model)}"
def pipeline():
    model = transformers.pipeline("text-generation", job["run"], trust_remote_code=True, dtype=torch.float32)
    return model("The capital of France is", max_new_tokens=4, do_sample=False)[0]["generated_text"]
def tokenizer():
    return type(AutoTokenizer.from_pretrained(job["run"])).__name__
def class_without_code():
    return f"loads, {compare(base.__class__.__mro__[2].from_pretrained(job['run'], dtype=torch.float32))}"
def without_code():
    return f"loads, {compare(load(trust_remote_code=False))}"
told = {}
for use in (static_cache, save, lora, trainer, pipeline, tokenizer, without_code, class_without_code):
    try:
        told[use.__name__] = use()
    except Exception as error:
        told[use.__name__] = f"{type(error).__name__}: {' '.join(str(error).replace(job['run'], 'RUN').split())[:200]}"
(folder / "uses.json").write_text(json.dumps(told))
"""
)


def ran(python: str, code: str, folder: Path) -> str:
    """Run a piece of code; return the last error that it told if it failed."""
    command = [python, "-W", "ignore", "-c", SPEAK + code, str(folder)]
    variables = {**os.environ} if python == sys.executable else {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=variables)
    errors = [line.strip() for line in done.stderr.splitlines() if "Error" in line]
    return [last_line(done.stderr), *errors][-1][:300] if done.returncode else ""


def prompts_of(tokenizer: Any, n: int, length: int) -> torch.Tensor:
    """Windows of all kinds of text, one kind after the other, ``[n, length]``."""
    kinds = ("news", "code", "manual", "talk")
    sources = [windows(text(kind), tokenizer, n=-(-n // 4), seq_len=length, half=Half.EVALUATION) for kind in kinds]
    ids = [torch.cat([batch.args[0] for batch in source]) for source in sources]
    return torch.stack(ids, 1).flatten(0, 1)[:n]


def compared(name: str, folder: Path, tokenizer: Any) -> Row:
    """A place beside the reference."""
    ours = np.load(folder / "regrow.npy")
    mine, told = (json.loads((folder / f"{one}.json").read_text()) for one in ("regrow", name))
    pairs = [(i, token) for i, token in enumerate(told["next"]) if token != mine["next"][i]]
    texts = [*zip(mine["texts"], told["texts"], strict=False)]
    row = {
        "next_tokens_differ": len(pairs),
        "margins": [round(m, 5) for m in sorted(float(ours[i].max() - ours[i, token]) for i, token in pairs)],
        "same_text": sum(a == b for a, b in texts),
        "of_texts": len(texts),
        "texts": [tokenizer.decode(one) for one in told["texts"][:2]],
    }
    if (path := folder / f"{name}.npy").is_file():
        row["max_logit_difference"] = float(np.abs(ours - np.load(path)).max())
    return row


def examined(run: Path, pythons: dict[str, str], args: Any) -> Row:
    """What all places make of a run folder."""
    tokenizer = read_tokenizer(run)
    prompts = prompts_of(tokenizer, args.prompts, args.tokens)
    result: Row = {"run": run.name, "versions": versions(), "places": {}}
    result |= {"prompts": len(prompts), "tokens_of_a_prompt": args.tokens, "tokens_carried_on": args.steps}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = {"run": str(run), "exported": str(folder / "exported"), "few": FEW, "greedy": args.greedy}
        (folder / "job.json").write_text(json.dumps({**job, "prompts": prompts.tolist(), "steps": args.steps}))
        if problem := ran(sys.executable, PLACES["regrow"], folder):
            raise SystemExit(problem)
        result["largest_logit"] = float(np.abs(np.load(folder / "regrow.npy")).max())
        result["loaded_as"] = regrow.export(run, folder / "exported", format="transformers").checked["loaded_as"]
        if {"onnxruntime", "openvino"} & set(pythons):
            regrow.export(run, folder / "model.onnx", format="onnx")
        if "llama.cpp" in pythons:
            regrow.export(run, folder / "model.gguf", format="gguf", dtype="f32")
        for name, python in pythons.items():
            problem = ran(python, PLACES[name], folder)
            result["places"][name] = {"error": problem} if problem else compared(name, folder, tokenizer)
            print(run.name, name, result["places"][name], flush=True)
        if "uses" not in args.skip:
            problem = ran(sys.executable, USES, folder)
            result["uses"] = {"error": problem} if problem else json.loads((folder / "uses.json").read_text())
            print(run.name, result["uses"], flush=True)
    return result


def main() -> None:
    """Ask everywhere, and write."""
    sizes = {"prompts": 200, "tokens": 32, "greedy": 20, "steps": 16}
    args = arguments(__doc__, OUT, {"run*": ()}, plain="", llama_cpp="", vllm="", openvino="", skip=[str], **sizes)
    pythons = {"transformers": args.plain, "onnxruntime": sys.executable, "lm-eval": sys.executable}
    pythons |= {"llama.cpp": args.llama_cpp, "vllm": args.vllm, "openvino": args.openvino}
    pythons = {name: python for name, python in pythons.items() if python and name not in args.skip}
    for run in args.run:
        add(args.out, examined(Path(run).resolve(), pythons, args))


if __name__ == "__main__":
    main()
