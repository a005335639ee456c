"""Who can load a pruned SmolLM2-135M again, and where: regrow beside two other tools, widths even and uneven.

    python recipes/save_load_matrix.py --work FOLDER --torch-pruning PYTHON --optipfair PYTHON
    python recipes/save_load_matrix.py --work FOLDER … --llama-cpp PYTHON --llama-cpp-source FOLDER
    python recipes/save_load_matrix.py --show

Each tool drops MLP neurons: half of them in every layer (even), or a share that differs from layer to layer (uneven),
and saves as its own pages say: Torch-Pruning 1.5.2 pickles the whole model, and its example for language models patches
``config.json`` and calls ``save_pretrained``; optipfair 0.4.2 calls ``save_pretrained``. Then each of these is tried in
a process of its own, without the tool:

* ``own``: the tool's own way back with default arguments: ``torch.load(file)``, ``from_pretrained``, ``regrow.load``;
* ``from_pretrained``: transformers' ``AutoModelForCausalLM`` with ``trust_remote_code=True``;
* ``GGUF``: stock llama.cpp runs a GGUF file of it, by llama.cpp's own converter for the other tools (which wants
  sentencepiece);
* ``lm-eval``: the harness's ``HFLM`` reads the folder.

Yes means that it says what the network said before it was saved: logits within 1e-3 of the largest (GGUF in 16 bits:
2e-2, and the same next token).
"""

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from harness import arguments, table, today, write

OUT = Path(__file__).parent / "results" / "save_load_matrix.json"
PROMPT = "The capital of France is the city of"
PLACES = ("own", "from_pretrained", "GGUF", "lm-eval")

COMMON = """
import json, sys
from pathlib import Path
import numpy, torch
dense, out, shape = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
tokens = torch.tensor([json.loads(sys.argv[4])])
out.mkdir(parents=True, exist_ok=True)
def left(layer, width):
    return width // 2 if shape == "even" else width // 2 + 16 * (layer % 7)
def tell(model):
    with torch.no_grad():
        numpy.save(out / "said.npy", model(tokens).logits[0].float().numpy())
"""
MAKERS = {
    "regrow": """
import regrow
from regrow.nets import load
from regrow.core.plan import Plan
from regrow.store import save
from regrow.tracing import trace
loaded = load(dense)
axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
keep = {}
for axis in axes.free():
    if ".mlp.gate_proj" in axis.key:
        keep[axis.key] = range(left(int(axis.key.split(".")[2]), axis.size))
regrow.apply(loaded.model, axes, Plan.keeping(axes, keep))
tell(loaded.model)
save(loaded, out / "folder")
""",
    "Torch-Pruning 1.5.2": """
import torch_pruning as tp
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(dense).eval()
graph = tp.DependencyGraph().build_dependency(
    model, example_inputs=tokens, output_transform=lambda answer: answer.logits)
for i, layer in enumerate(model.model.layers):
    width = layer.mlp.gate_proj.out_features
    gone = list(range(left(i, width), width))
    graph.get_pruning_group(layer.mlp.gate_proj, tp.prune_linear_out_channels, idxs=gone).prune()
model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
tell(model)
torch.save(model, out / "model.pt")
model.save_pretrained(out / "folder")
AutoTokenizer.from_pretrained(dense).save_pretrained(out / "folder")
""",
    "optipfair 0.4.2": """
from optipfair.pruning.mlp_glu import prune_model_mlp_glu
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(dense).eval()
layers = None if shape == "even" else list(range(0, len(model.model.layers), 2))
model = prune_model_mlp_glu(model, pruning_percentage=50, layer_indices=layers, show_progress=False)
tell(model)
model.save_pretrained(out / "folder")
AutoTokenizer.from_pretrained(dense).save_pretrained(out / "folder")
""",
}
HOLD = """
import json, sys
from pathlib import Path
import numpy, torch
out, tokens = Path(sys.argv[1]), json.loads(sys.argv[2])
said = numpy.load(out / "said.npy")
def hold(says, bound=1e-3):
    gap = float(abs(says - said[-len(says):]).max() / abs(said).max())
    assert gap <= bound, f"its logits are off by {gap:.2g} of the largest"
def ask(model):
    with torch.no_grad():
        hold(model.eval()(torch.tensor([tokens])).logits[0].float().numpy())
"""
WITHOUT = "import sys\nsys.modules['regrow'] = None\n"
PRETRAINED = """
from transformers import AutoModelForCausalLM
ask(AutoModelForCausalLM.from_pretrained(out / "folder", trust_remote_code=True))
"""
HARNESS = """
from lm_eval.models.huggingface import HFLM
harness = HFLM(pretrained=str(out / "folder"), trust_remote_code=True, device="cpu", dtype="float32", batch_size=1)
((found, _),) = harness._loglikelihood_tokens([(("", ""), tokens[:-1], tokens[-1:])], disable_tqdm=True)
wanted = float(torch.tensor(said[-2]).log_softmax(-1)[tokens[-1]])
assert abs(found - wanted) < 1e-3 * max(1, abs(wanted)), f"log-likelihood {found}, it was {wanted}"
"""
OWN = {
    "regrow": HOLD + "import regrow\nask(regrow.load(out / 'folder'))\n",
    "Torch-Pruning 1.5.2": HOLD + "ask(torch.load(out / 'model.pt'))\n",
    "optipfair 0.4.2": WITHOUT + HOLD + PRETRAINED,
}
LLAMA_CPP = """
import json, sys
import llama_cpp, numpy
net = llama_cpp.Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False)
net.eval(json.loads(sys.argv[2]))
numpy.save(sys.argv[3], numpy.array(net.scores[: net.n_tokens]))
"""


def run(python: str, code: str, *arguments: str) -> str:
    """Empty if a piece of code runs to its end; otherwise the last line of what it complained about."""
    done = subprocess.run([python, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, cwd="/")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]] or lines
    text = re.sub(r"\x1b\[[0-9;]*m", "", errors[-1] if errors else "it failed")
    return "" if done.returncode == 0 else text[:300]


def gguf(tool: str, out: Path, tokens: str, args: Namespace) -> str:
    """The same for a GGUF file, made by regrow or by llama.cpp's converter, in stock llama.cpp."""
    path = out / "model.gguf"
    if tool == "regrow":
        code = "import sys, regrow\nregrow.export(sys.argv[1], sys.argv[2], format='gguf', dtype='f16')\n"
        failed = run(sys.executable, code, str(out / "folder"), str(path))
    else:
        script = str(args.llama_cpp_source / "convert_hf_to_gguf.py")
        code = "import runpy, sys\nsys.argv[0] = sys.argv.pop(1)\nsys.path.insert(0, sys.argv.pop(1))\n"
        code += "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        options = [str(out / "folder"), "--outfile", str(path), "--outtype", "f16"]
        failed = run(sys.executable, code, script, str(args.llama_cpp_source), *options)
    failed = failed or run(args.llama_cpp, LLAMA_CPP, str(path), tokens, str(out / "says.npy"))
    check = "says = numpy.load(out / 'says.npy')\nhold(says, 2e-2)\nassert (says[-1].argmax() == said[-1].argmax())\n"
    return failed or run(sys.executable, HOLD + check, str(out), tokens)


def tried(tool: str, python: str, shape: str, dense: str, tokens: str, args: Namespace) -> dict[str, str]:
    """Make a network and try each place; ``yes`` or what was said."""
    out = args.work / f"{tool.split()[0]}-{shape}"
    row = {"made": run(python, COMMON + MAKERS[tool], dense, str(out), shape, tokens) or "yes"}
    if row["made"] == "yes":
        # A pickle of the peer's wants the peer's package, so it is opened where that is.
        row["own"] = run(sys.executable if tool == "regrow" else python, OWN[tool], str(out), tokens)
        row["from_pretrained"] = run(sys.executable, WITHOUT + HOLD + PRETRAINED, str(out), tokens)
        row["GGUF"] = gguf(tool, out, tokens, args) if args.llama_cpp else "not tried"
        row["lm-eval"] = run(sys.executable, WITHOUT + HOLD + HARNESS, str(out), tokens)
    return {place: text.replace(str(args.work), "FOLDER") or "yes" for place, text in row.items()}


def shown(rows: dict[str, dict[str, str]]) -> str:
    """The table in Markdown; reasons follow it."""
    plain = ("yes", "not tried", "not made")
    cells = {name: [row.get(place, "not made") for place in PLACES] for name, row in rows.items()}
    lines = ([name, *(cell if cell in plain else "no" for cell in each)] for name, each in cells.items())
    reasons = (
        f"* {name}, {place}: {text}" for name, row in rows.items() for place, text in row.items() if text not in plain
    )
    return "\n".join([*table(("tool and widths", *PLACES), lines), "", *reasons])


def main() -> None:
    """Make, try, write."""
    pythons = {"torch_pruning": "", "optipfair": "", "llama_cpp": "", "llama_cpp_source": Path}
    args = arguments(__doc__, OUT, work=Path, **pythons)
    if not args.show:
        from regrow.nets import load
        from regrow.nets.packaged import packaged_folder

        dense = str(packaged_folder("smollm2-135m", lambda *_: None))
        tokens = json.dumps(load("smollm2-135m").tokenizer(PROMPT)["input_ids"])
        tools = dict(zip(MAKERS, (sys.executable, args.torch_pruning, args.optipfair), strict=True))
        rows: dict[str, Any] = {}
        for tool, python in tools.items():
            for shape in ("even", "uneven") if python else ():
                rows[f"{tool}, {shape}"] = tried(tool, python, shape, dense, tokens, args)
                print(tool, shape, rows[f"{tool}, {shape}"], flush=True)
        write(args.out, {"date": today(), "prompt": PROMPT, "table": rows})
    print(shown(json.loads(args.out.read_text("utf-8"))["table"]))


if __name__ == "__main__":
    main()
