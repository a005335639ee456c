"""What is killed and made to fail: every command that writes, as a run of about a second.

A case runs in the folder ``at`` of its place; what it reads lies in ``in`` beside it. The result has one name, so that
every other file in the place that was not there before is a leftover.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGITS = "--source digits --tokens 192 --eval-tokens 64"
PRUNE = f"prune toys:classifier --method flap --keep 0.6 {DIGITS}"
GROW = "grow toys:classifier --axis body.0.weight:0=+4 --source digits --eval-tokens 64"
LEARN = "learn split:digits:2 --model mlp:12-12 --method sparsegrow --epochs 2 --train 200 --test 100 --lr 0.1"
LEARN += " --batch-size 32"
SEARCH = (
    "search cells:4-1-1 --data digits --target params=1k --train 120 --test 60 --batch-size 48 --epochs 4 --retrain 1 "
    "--stride 2 --set warm=1 --set every=1 --set share=0.5"
)
TEXT = ["The cat sat on the mat, and the rat sat on the cat.", "12 + 345 = 357 of them, that is that."] * 3

BOTH = ("regrow", "transformers")

Step = str | Callable[[], Any]
"""Words of the command line, or a function."""


@dataclass(frozen=True)
class Case:
    """One command.

    Args:
        command: What is killed, and then run again.
        result: The file or folder it makes.
        prepare: What is done before, undisturbed; if it makes ``result``, the command replaces that.
        read: By whom a result must be readable at every moment: ``regrow``, ``transformers``; none for single files.
    """

    command: Step
    result: str
    prepare: tuple[Step, ...] = ()
    read: tuple[str, ...] = ("regrow",)


def llama(folder: str, width: int = 40, *, cut: bool = False, seed: int = 0) -> None:
    """A tiny random Llama with a tokenizer, as transformers saves it; cut unevenly, as regrow saves it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from regrow import apply, trace
    from regrow.core.plan import Plan
    from regrow.store import save

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, words)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=width,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
    )
    model = LlamaForCausalLM(config).eval()
    if not cut:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    axes = trace(model, torch.arange(6)[None])
    widths = [axis for axis in axes.free() if ".mlp." in axis.key]
    keep = {axis.key: tuple(range(axis.size - 3 * i - 1)) for i, axis in enumerate(widths)}
    apply(model, axes, Plan.keeping(axes, keep))
    model.tokenizer = tokenizer
    save(model, folder)


def copied(source: str, folder: str) -> None:
    """A saved network, saved once more."""
    from regrow.store import load, save

    save(load(source), folder)


def shufflenet(folder: str) -> None:
    """A small network of torchvision, cut."""
    import torch
    from torchvision.models import get_model

    from regrow.nets import Origin
    from regrow.store import save

    torch.manual_seed(0)
    name, arguments = "shufflenet_v2_x0_5", {"num_classes": 7}
    save(get_model(name, **arguments).eval(), folder, origin=Origin("torchvision", name, arguments, name))


def export(form: str, out: str, source: str, *, over: bool = False) -> Case:
    """An export of a prepared network; over an earlier export of another one, or to a new place."""
    makers = {
        "cut": lambda: llama("../in/cut", cut=True),
        "even": lambda: llama("../in/even", cut=True, width=36, seed=1),
        "learned": f"{LEARN} --out ../in/learned",
        "other": f"{LEARN} --seed 1 --out ../in/other",
        "shuffled": lambda: shufflenet("../in/shuffled"),
    }
    earlier = {"cut": "even", "learned": "other"}.get(source, "")
    words = "export ../in/{} --to " + form + f" --out {out}"
    prepare = [makers[source], *([makers[earlier], words.format(earlier)] if over else [])]
    return Case(words.format(source), out, tuple(prepare), BOTH if form == "transformers" else ())


LORA = "recover ../in/pruned --by lora --tokens 96 --set passes=2 --set checks=2 --set windows=1 --code toys:classifier"
CUT = lambda: llama("../in/cut", cut=True)  # noqa: E731
COPY = lambda: copied("../in/cut", "net")  # noqa: E731
ONE, TWO = f"{PRUNE} --out ../in/one", f"{PRUNE} --seed 1 --out ../in/two"
COMPARE = "report ../in/one ../in/two --out page.html"
CASES: dict[str, Case] = {
    "prune": Case(f"{PRUNE} --out run", "run"),
    "prune --dry-run": Case(f"{PRUNE} --dry-run plan.json", "plan.json", read=()),
    "recover": Case(f"{LORA} --out run", "run", (f"{PRUNE} --out ../in/pruned",)),
    "learn": Case(f"{LEARN} --out run", "run"),
    "learn --resume": Case("learn --resume run --task permuted:digits:1", "run", (f"{LEARN} --classes 10 --out run",)),
    "search": Case(f"{SEARCH} --out run", "run"),
    "apply": Case("apply ../in/plan.json toys:classifier --out net", "net", (f"{PRUNE} --dry-run ../in/plan.json",)),
    "grow": Case(f"{GROW} --out run", "run"),
    "undo": Case("undo ../in/pruned --out net", "net", (f"{PRUNE} --out ../in/pruned",)),
    "export transformers": export("transformers", "net", "cut"),
    "export transformers, over another": export("transformers", "net", "cut", over=True),
    "export gguf": export("gguf", "net.gguf", "cut"),
    "export gguf, over another": export("gguf", "net.gguf", "cut", over=True),
    "export onnx": export("onnx", "net.onnx", "learned"),
    "export onnx, over another": export("onnx", "net.onnx", "learned", over=True),
    "export torchvision": export("torchvision", "net", "shuffled"),
    "save": Case(COPY, "net", (CUT,), BOTH),
    "save over a save": Case(COPY, "net", (CUT, lambda: llama("net", width=36, cut=True, seed=1)), BOTH),
    "report over a report": Case("report run", "run", (f"{PRUNE} --out run",)),
    "compare": Case(COMPARE, "page.html", (ONE, TWO), ()),
    "compare over a comparison": Case(
        COMPARE, "page.html", (ONE, TWO, "report ../in/two ../in/one --out page.html"), ()
    ),
}


def work(step: Step) -> Callable[[], Any]:
    """A step as a function that ends as a process does: with an exit code, and in one line if it is refused."""
    if callable(step):
        return lambda: _ended(step)

    def command() -> None:
        from regrow.cli import main

        sys.argv = ["regrow", *step.split()]
        main()

    return command


def _ended(step: Callable[[], Any]) -> None:
    try:
        step()
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("KeyboardInterrupt\n")
        sys.exit(130)


def network(folder: Path) -> Any:
    """The network in a folder, as :func:`regrow.load` gives it."""
    import json

    from toys import classifier

    import regrow

    try:
        own = json.loads((folder / "shapes.json").read_text())["origin"]["kind"] == "callable"
    except (OSError, ValueError):
        own = False
    return regrow.load(folder, model=classifier if own else None)


def digest_by(reader: str, folder: Path) -> str:
    """What a reader finds in a folder, as a short digest; the first line of what is wrong, if it cannot be read."""
    import hashlib

    import torch

    try:
        if reader == "regrow":
            found = network(folder).state_dict()
        else:
            from transformers import AutoModelForCausalLM

            net = AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=True, local_files_only=True)
            with torch.no_grad():
                found = {"logits": net.eval()(torch.arange(9)[None]).logits}
    except Exception as error:
        return f"unreadable: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    digest = hashlib.sha256()
    for name, value in sorted(found.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def page_again(folder: Path, out: Path) -> None:
    """The page of a run, rendered from what its folder holds now."""
    from regrow.reports import write_page

    write_page([folder], out)
