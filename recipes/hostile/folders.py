"""Honest folders, and what somebody may have written into one: names of code in every file that has a name."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrow.store.shapes import content_digest

TESTS = Path(__file__).parents[2] / "tests"
FIXTURES = TESTS / "fixtures" / "runs"
TARGETS = (
    "pwned:boom", "os:abort", "subprocess:run", "webbrowser:open", "toys:classifier", "torch.hub:load",
    "plugin:Method", "evil:boom", "builtins:exec", "pwned.sub:boom",
)  # fmt: skip
"""What files name; ``toys:classifier`` is harmless, and is not imported either."""
CLASSES = ("modeling_evil.Evil", "pwned.Evil", "other/repository--modeling_evil.Evil")


Change = Callable[[Path, str, str], None]
"""Tampers with a copy of an honest folder; gets the folder, a name of code and a name of a class."""


def edit(name: str, change: Callable[[Any, str, str], Any]) -> Change:
    """A change of a JSON file."""

    def changed(folder: Path, target: str, named: str) -> None:
        path = folder / name
        data = json.loads(path.read_text()) if path.exists() else {}
        change(data, target, named)
        if name == SHAPES:
            data["sha256"] = content_digest(data)  # whoever changes it can write the digest anew
        path.write_text(json.dumps(data))

    return changed


def put(path: tuple[str, ...], value: Callable[[str, str], Any]) -> Callable[[Any, str, str], None]:
    """Set an entry in nested objects (and the first of a list)."""

    def change(data: Any, target: str, named: str) -> None:
        for key in path[:-1]:
            data = data[0] if key == "0" else data.setdefault(key, {})
        data[path[-1]] = value(target, named)

    return change


def named(*path: str) -> Callable[[Any, str, str], None]:
    """Set an entry to the name of code."""
    return put(path, lambda target, _: target)


def says(value: Any, *path: str) -> Callable[[Any, str, str], None]:
    """Set an entry to a value."""
    return put(path, lambda *_: value)


AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")


def auto_map(data: Any, _: str, named: str) -> None:
    """Classes of the folder's own code for everything that transformers loads automatically."""
    data["auto_map"] = {name: [named, named] if name == "AutoTokenizer" else named for name in AUTO}


def own_type(data: Any, target: str, named: str) -> None:
    """A kind of model that only the folder's code knows."""
    auto_map(data, target, named)
    data["model_type"] = "pwned"


def code_files(*names: str) -> Change:
    """Files of code that others might run."""

    def change(folder: Path, _: str, named: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("import pwned\nclass Evil: pass\npwned.boom()\n")

    return change


def adapter(folder: Path, target: str, named: str) -> None:
    """An adapter of peft that leads to another model and names a library."""
    data = {"peft_type": "LORA", "base_model_name_or_path": "/nowhere", "auto_mapping": {"parent_library": "pwned"}}
    (folder / "adapter_config.json").write_text(json.dumps(data | {"auto_mapping": {"base_model_class": named}}))


TEMPLATE = "{{ cycler.__init__.__globals__.os.abort() }}{{ self._TemplateReference__context }}"
RUN, SHAPES, CONFIG, TOKENS = "run.json", "shapes.json", "config.json", "tokenizer_config.json"

HOSTILE: dict[str, tuple[str, Change]] = {
    # run.json
    "run: model": ("prune", edit(RUN, named("settings", "model"))),
    "run: method": ("prune", edit(RUN, named("settings", "method"))),
    "run: method of a method": ("prune", edit(RUN, named("settings", "method_settings", "base"))),
    "run: recovery": ("prune", edit(RUN, named("settings", "recover"))),
    "run: source": ("prune", edit(RUN, put(("settings", "sources"), lambda t, _: [t, f"x={t}"]))),
    "run: device and dtype": ("prune", edit(RUN, put(("settings", "device"), lambda t, _: t))),
    "run: unknown fields": ("prune", edit(RUN, named("settings", "builder"))),
    "run: verb": ("prune", edit(RUN, named("verb"))),
    "run: dense model of a recovery": ("recover", edit(RUN, named("settings", "pruning", "model"))),
    "run: recovery of a recovery": ("recover", edit(RUN, named("settings", "by"))),
    "run: network of learning": ("learn", edit(RUN, named("settings", "model"))),
    "run: method of learning": ("learn", edit(RUN, named("settings", "method"))),
    "run: tasks": ("learn", edit(RUN, put(("settings", "tasks"), lambda t, _: [t]))),
    "run: space of a search": ("search", edit(RUN, named("settings", "space"))),
    # shapes.json
    "shapes: callable": ("prune", edit(SHAPES, named("origin", "reference"))),
    "shapes: kind": ("prune", edit(SHAPES, named("origin", "kind"))),
    "shapes: callable instead of a class": (
        "saved",
        edit(SHAPES, put(("origin",), lambda t, _: {"kind": "callable", "reference": t, "config": {}})),
    ),
    "shapes: class": ("saved", edit(SHAPES, named("origin", "reference"))),
    "shapes: function of transformers": ("saved", edit(SHAPES, says("pipeline", "origin", "reference"))),
    "shapes: automatic class": ("saved", edit(SHAPES, says("AutoModel", "origin", "reference"))),
    "shapes: auto_map": ("saved", edit(SHAPES, lambda d, t, c: auto_map(d["origin"]["config"], t, c))),
    "shapes: kernel": ("saved", edit(SHAPES, says("pwned/kernel", "origin", "config", "attn_implementation"))),
    "shapes: dtype": ("saved", edit(SHAPES, says("load", "origin", "config", "dtype"))),
    "shapes: small network": ("learn", edit(SHAPES, named("origin", "reference"))),
    "shapes: torchvision network": ("exported", edit(SHAPES, named("origin", "reference"))),
    "shapes: weights that are fetched": ("exported", edit(SHAPES, says(True, "origin", "config", "pretrained"))),
    "shapes: attribute": ("saved", edit(SHAPES, says(1, "attributes", "model:forward"))),
    # config.json and its neighbours
    "config: auto_map": ("llama", edit(CONFIG, auto_map)),
    "config: kind of its own": ("llama", edit(CONFIG, own_type)),
    "config: architecture": ("llama", edit(CONFIG, says(["pipeline", "Trainer", "Evil"], "architectures"))),
    "config: kernel": ("llama", edit(CONFIG, says("pwned/kernel", "attn_implementation"))),
    "config: quantisation": ("llama", edit(CONFIG, says({"quant_method": "pwned"}, "quantization_config"))),
    "config: dtype": ("llama", edit(CONFIG, says("load", "torch_dtype"))),
    "config: pipelines": ("llama", edit(CONFIG, put(("custom_pipelines",), lambda _, c: {"x": {"impl": c}}))),
    "config: adapter": ("llama", adapter),
    "config: generation": ("llama", code_files("custom_generate/generate.py", "modeling_evil.py")),
    "config: saved model, auto_map": ("saved", edit(CONFIG, auto_map)),
    "config: saved model, carried code": ("saved", code_files("modeling_regrow.py", "reshape_regrow.py")),
    # tokenizer
    "tokenizer: auto_map": ("llama", edit(TOKENS, auto_map)),
    "tokenizer: class": ("llama", edit(TOKENS, says("AutoModelForCausalLM", "tokenizer_class"))),
    "tokenizer: class of a saved model": ("saved", edit(TOKENS, says("pipeline", "tokenizer_class"))),
    "tokenizer: template": ("saved", edit(TOKENS, says(TEMPLATE, "chat_template"))),
    # plans
    "ledger: fill": ("prune", edit("ledger.json", named("plans", "0", "origin", "method"))),
    "ledger: branch": ("prune", edit("ledger.json", put(("plans", "0", "drop"), lambda t, _: {t: {t: {"gives": t}}}))),
    "plan: axis": ("plan", edit("ledger.json", put(("changes",), lambda t, _: {t: {"size": 3, "keep": [0]}}))),
    # the rest
    "network: builder": ("exported", edit("network.json", named("builder"))),
    "network: code beside it": ("exported", code_files("load_regrow.py", "reshape_regrow.py")),
    "gguf: architecture": ("gguf", lambda folder, t, c: metadata(folder, "general.architecture", t)),
    "gguf: tokenizer": ("gguf", lambda folder, t, c: metadata(folder, "tokenizer.ggml.model", t)),
    "gguf: neighbours": ("gguf", lambda folder, t, c: neighbours(folder, t, c)),
}
"""What it is called → which honest folder it was (:func:`make_honest`), and what was done to it."""


def metadata(folder: Path, key: str, text: str) -> None:
    """Write another text of the same length into the metadata of a GGUF file."""
    import gguf

    path = folder / "model.gguf"
    field = gguf.GGUFReader(path).fields.get(key)
    old = bytes(field.parts[field.data[0]]) if field else b"llama"
    path.write_bytes(path.read_bytes().replace(old, text.encode()[: len(old)].ljust(len(old), b"x"), 1))


def neighbours(folder: Path, target: str, named: str) -> None:
    """Files beside a GGUF file."""
    for name in (CONFIG, TOKENS, "generation_config.json"):
        edit(name, auto_map)(folder, target, named)
    edit(CONFIG, own_type)(folder, target, named)
    adapter(folder, target, named)
    code_files("custom_generate/generate.py", "modeling_evil.py")(folder, target, named)


def make_honest(out: Path) -> None:
    """Small folders of every kind."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from regrow import Plan, apply, export, load, trace
    from regrow.exporters import gguf
    from regrow.nets import load as load_by_name
    from regrow.store import save

    for name in ("prune", "recover", "learn", "search"):
        shutil.copytree(FIXTURES / name, out / name)
    (out / "plan").mkdir()
    ledger = json.loads((FIXTURES / "prune" / "ledger.json").read_text())
    (out / "plan" / "ledger.json").write_text(json.dumps(ledger["plans"][0]))
    torch.manual_seed(0)
    tokenizer = load_by_name("smollm2-135m").tokenizer
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)).eval()
    model.save_pretrained(out / "llama")
    tokenizer.save_pretrained(out / "llama")
    loaded = load_by_name(str(out / "llama"))
    (out / "gguf").mkdir()
    gguf.write(loaded.model, out / "gguf" / "model.gguf", dtype="f32")
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    key = next(axis.key for axis in axes.free() if "mlp" in axis.key)
    apply(loaded.model, axes, Plan.keeping(axes, {key: range(7)}))
    save(loaded, out / "saved")
    net = load_by_name("shufflenet_v2_x0_5")
    export(load(save(net, out / "vision")), out / "exported", format="torchvision")


def tamper(name: str, honest: Path, place: Path, seed: int) -> Path:
    """A hostile folder: a copy of an honest one that somebody tampered with, with names drawn by the seed."""
    (base, change), draw = HOSTILE[name], random.Random(f"{name} {seed}")
    shutil.copytree(honest / base, place)
    change(place, draw.choice(TARGETS), draw.choice(CLASSES))
    return place
