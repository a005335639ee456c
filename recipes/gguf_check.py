"""Does llama.cpp compute from an exported GGUF file what torch computes? A pruned run, and the dense model beside it.

    python recipes/gguf_check.py RUN --python PYTHON --out recipes/results/gguf_check.json

RUN is the folder of a pruned language model; PYTHON an interpreter that has llama-cpp-python (``pip install
llama-cpp-python==0.3.36`` builds it, about ten minutes on one core), unmodified. Prompts are windows of real text of
four kinds, from their evaluation halves. Torch computes in float32 on one thread. llama.cpp runs as it does by itself
(keys and values in float16), and once more with keys and values in float32 (``f32-exact``), so that the file's part in
a difference can be told from that of llama.cpp's own arithmetic; so can the dense model's.

First a few small random networks of every form that is exported: widths, heads, rotary pairs and residual cut, with
biases; dropped layers, attentions, MLPs; scaled rotary positions. Then, for every rule by which text is split, a
tokenizer that has learnt 3,000 tokens under it: texts of all kinds, and odd ones, in both's tokens.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from regrow import Plan, apply, load, trace, with_branches
from regrow.core.axes.operations import Placeholder
from regrow.data import Half, text, windows
from regrow.data.halves import select_half
from regrow.exporters.gguf import write
from regrow.exporters.gguf.llama_cpp import RULES, WHOLE_WORDS
from regrow.nets import load as load_dense
from regrow.tracing.branches import insert_placeholders

KINDS = ("news", "code", "manual", "talk")
PARTS = ("small", "rules", "pruned", "dense")
TYPES = ("f32", "f16", "q8_0")
WHOLE = 8
"""Prompts of which logits after every token are compared, and that are carried on."""

Said: TypeAlias = tuple[np.ndarray, np.ndarray, list[list[int]]]

ODD = (
    "I've 'told he's there, 'RE you sure? WE'LL 12345 3.14  x\n\n  y\t\tz \r\n q  1 22 333 4444",
    "e\u0301 \u00e9 Stra\u00dfe \u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e",
    "\u041d\u0435\u0449\u043e \u043d\u0430 \U0001f999\U0001f680 (normal) \u17d2\u1780\u17b6 ``````....!!??==== --x",
    "  leading",
    "trailing  ",
    "\n\n\n a \n  b",
    "a\u00a0b\u3000c \u0661\u0662\u0663 \u00bd \u2167",
)
"""Texts that rules split differently."""

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
ROPES = {
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def random_net(family: str = "Llama", **settings: Any) -> nn.Module:
    """A small decoder of random weights."""
    import transformers

    torch.manual_seed(0)
    net = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SMALL | settings))
    for parameter in net.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
        start = 1.0 if parameter.dim() == 1 and parameter.numel() == SMALL["hidden_size"] else 0.0
        nn.init.normal_(parameter, start, (1.5 / fan_in) ** 0.5)
    return net.eval()


def cut(net: nn.Module) -> nn.Module:
    """Cut every free axis somehow, the residual width and rotary pairs too, and leave means of what goes in biases."""
    axes = trace(net, input_ids=torch.arange(9)[None])
    drawn = torch.Generator().manual_seed(1)
    keep: dict[str, list[int]] = {}
    for axis in axes.free():
        if not axis.count and axis.size > 2:
            step = axis.multiple
            n = step * int(torch.randint(axis.size // step // 2 + 1, axis.size // step + 1, (), generator=drawn))
            keep[axis.key] = torch.randperm(axis.size, generator=drawn)[:n].tolist()
    plan = Plan.keeping(axes, keep)
    means: dict[str, dict[int, float]] = {}
    for key, change in plan.changes.items():
        for slot in axes[key].consumers():
            if slot.name.endswith("mlp.down_proj.weight") and change.dropped:
                means[slot.name] = {unit: 0.1 + 0.01 * unit for unit in change.dropped}
    apply(net, axes, Plan(plan.changes, means))
    return net


def dropped(*paths: str) -> nn.Module:
    """A small network without some of its branches."""
    net = random_net()
    axes = with_branches(net, trace(net, input_ids=torch.arange(9)[None]))
    apply(net, axes, Plan.dropping(axes, list(paths)))
    return net


def small_nets() -> Iterator[tuple[str, nn.Module]]:
    """Every form of network that is exported."""
    yield "regular", random_net()
    for family, settings in (("Llama", {"attention_bias": True}), ("Mistral", {"sliding_window": None}), ("Qwen2", {})):
        yield f"{family}, cut irregularly", cut(random_net(family, **settings))
    for kind, settings in ROPES.items():
        yield (
            f"rotary positions: {kind}",
            random_net(rope_parameters=settings | {"rope_type": kind, "rope_theta": 500.0}),
        )
    yield "no attention in layer 2", dropped("model.layers.2.self_attn")
    yield "no attention in the last layer", dropped("model.layers.3.self_attn")
    yield "no MLP in layer 1", dropped("model.layers.1.mlp")
    yield "no MLP in the last layer", dropped("model.layers.3.mlp")
    yield "no layer 1", dropped("model.layers.1")
    first = random_net()
    insert_placeholders(first, {"model.layers.0.self_attn": Placeholder("zero", "hidden_states", 2)})
    yield "no attention in the first layer", first


def asked(python: str, job: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What llama.cpp says, in a process of its own: logits as .npy files in a folder, the rest as this.

    Raises:
        SystemExit: If it does not run.
    """
    (folder / "job.json").write_text(json.dumps(job))
    serve = Path(__file__).with_name("gguf_llama_cpp.py")
    done = subprocess.run([python, serve, folder / "job.json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed ({done.returncode}): {done.stderr.strip()[-400:]}")
    return json.loads((folder / "said.json").read_text())


def check_small(python: str, folder: Path) -> dict[str, Any]:
    """Largest difference of logits, each network of its own form."""
    ids, rows, job, expected = list(range(1, 41)), {}, [], []
    for i, (name, net) in enumerate(small_nets()):
        with torch.no_grad():
            expected.append(net(torch.tensor([ids]), use_cache=False).logits[0].numpy())
        done = write(net, folder / f"{i}.gguf", dtype="f32")
        rows[name] = {"architecture": done.checked["architecture"], "logit_std": float(expected[-1].std())}
        one = {"file": str(done.path), "name": str(i), "exact": True, "prompts": [ids], "whole": 1}
        job.append(one | {"greedy": [0, 0], "texts": []})
    asked(python, job, folder)
    for i, row in enumerate(rows.values()):
        there = np.load(folder / f"{i}.whole.npy")[0]
        row["max_abs_diff"] = float(np.abs(there - expected[i]).max())
        row["other_next_tokens"] = int((there.argmax(-1) != expected[i].argmax(-1)).sum())
    return rows


def learnt(steps: tuple[str, ...], rule: str) -> Any:
    """A tokenizer that splits text by some steps, and has learnt from the calibration halves."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(ignore_merges=WHOLE_WORDS.get(rule, False)))
    known = {
        "words": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "digits": pre_tokenizers.Digits(individual_digits=True),
    }
    split = [known[one] if one in known else pre_tokenizers.Split(Regex(one), "isolated") for one in steps]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    if rule == "qwen2":
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts_of(Half.CALIBRATION, 60, 4000), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def check_rules(python: str, folder: Path) -> dict[str, Any]:
    """Texts that llama.cpp splits otherwise, for every rule."""
    texts, rows, job = [*texts_of(Half.EVALUATION, 40, 1500), *ODD], {}, []
    for steps, rule in RULES.items():
        tokenizer, net = learnt(steps, rule), random_net(vocab_size=3000, num_hidden_layers=1)
        net.tokenizer = tokenizer
        done = write(net, folder / f"{rule}.gguf", dtype="f32")
        one = {"file": str(done.path), "name": rule, "exact": True, "prompts": [[1]], "whole": 1, "greedy": [0, 0]}
        job.append(one | {"texts": texts})
        rows[rule] = {"expected": [tokenizer(text)["input_ids"] for text in texts]}
    said = asked(python, job, folder)["said"]
    for rule, row in rows.items():
        expected = row.pop("expected")
        other = [text for text, a, b in zip(texts, expected, said[rule]["tokens"], strict=True) if a != b]
        row |= {"texts": len(texts), "tokens": sum(map(len, expected)), "tokenized_otherwise": other}
    return rows


def texts_of(half: Half, n: int, length: int) -> list[str]:
    """Documents of every kind, each cut to a length."""
    return [d[:length] for kind in KINDS for d in select_half(text(kind).documents, half, kind)[:n]]


def prompts_of(tokenizer: Any, n: int, length: int) -> Tensor:
    """Windows of all kinds of text, one kind after the other, (n, length)."""
    each = -(-n // len(KINDS))
    found = [windows(text(kind), tokenizer, n=each, seq_len=length, half=Half.EVALUATION) for kind in KINDS]
    ids = [torch.cat([batch.args[0] for batch in source]) for source in found]
    return torch.stack(ids, 1).flatten(0, 1)[:n]


def torch_says(model: Any, prompts: Tensor, steps: int) -> Said:
    """Logits after every token of the first prompts, after the last of all, and how the first go on."""
    with torch.inference_mode():
        logits = [model(part, use_cache=False).logits for part in prompts[:WHOLE].split(4)]
        last = [model(part, use_cache=False, logits_to_keep=1).logits[:, -1] for part in prompts.split(8)]
        given = []
        for ids in prompts[:WHOLE]:
            more = model.generate(
                ids[None], attention_mask=torch.ones_like(ids[None]), do_sample=False, max_new_tokens=steps
            )
            given.append(more[0, len(ids) :].tolist())
    return torch.cat(logits).numpy(), torch.cat(last).numpy(), given


def compared(
    ours: tuple[np.ndarray, np.ndarray, list[list[int]]], name: str, folder: Path, said: Any
) -> dict[str, Any]:
    """One file beside torch."""
    whole, last, given = ours
    there_whole, there = np.load(folder / f"{name}.whole.npy"), np.load(folder / f"{name}.last.npy")
    other = np.flatnonzero(last.argmax(-1) != there.argmax(-1))
    # By how much torch prefers its token to llama.cpp's.
    margins = sorted(float(last[i].max() - last[i, there[i].argmax()]) for i in other)
    p, q = (torch.from_numpy(x).log_softmax(-1) for x in (last, there))
    return {
        "max_abs_diff": float(np.abs(last - there).max()),
        "rms_diff": float(np.sqrt(np.square(last - there).mean())),
        "max_abs_diff_every_position": float(np.abs(whole - there_whole).max()),
        "other_argmax_every_position": int((whole.argmax(-1) != there_whole.argmax(-1)).sum()),
        "positions": int(np.prod(whole.shape[:2])),
        "other_next_token": len(other),
        "margins": [round(m, 4) for m in margins],
        "mean_kl_nats": float((p.exp() * (p - q)).sum(-1).mean()),
        "same_greedy_text": sum(a[: len(b)] == b for a, b in zip(said["greedy"], given, strict=True)),
    }


def check(python: str, model: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All types of file of one network."""
    prompts = prompts_of(model.tokenizer, args.prompts, args.tokens)
    texts = texts_of(Half.EVALUATION, 40, 1000)
    ours = torch_says(model, prompts, args.steps)
    expected = [model.tokenizer(one)["input_ids"] for one in texts]
    result: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "logit_std": float(ours[1].std()),
        "files": {},
    }
    for kind in TYPES:
        done = write(model, folder / "model.gguf", dtype=kind)
        row = {"bytes": done.bytes, "checked": dict(done.checked), "notes": list(done.notes)}
        for name, exact in ((kind, False), (f"{kind}-exact", True)):
            if exact and kind != "f32":
                continue
            one = {"file": str(done.path), "name": name, "exact": exact, "prompts": prompts.tolist(), "whole": WHOLE}
            there = asked(python, [one | {"greedy": [WHOLE, args.steps], "texts": texts}], folder)
            said = there["said"][name]
            result["llama_cpp_python"] = there["version"]
            result["texts_tokenized_otherwise"] = sum(a != b for a, b in zip(said["tokens"], expected, strict=True))
            result["files"][name] = row | compared(ours, name, folder, said)
            print(name, result["files"][name]["max_abs_diff"], flush=True)
        done.path.unlink()
    return result | {"texts": len(texts)}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--python", required=True, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--dense", default="smollm2-135m", help="the model before pruning")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16, help="of a prompt")
    parser.add_argument("--steps", type=int, default=24, help="tokens of greedy text")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as they are in --out")
    parser.add_argument("--out", type=Path, default=Path("recipes/results/gguf_check.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = json.loads((args.run / "run.json").read_text())["settings"]
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "gguf")},
        "run": {name: settings[name] for name in ("model", "method", "method_settings", "keep", "round_to", "seed")},
        "prompts": args.prompts,
        "tokens_of_a_prompt": args.tokens,
        "greedy": {"prompts": WHOLE, "tokens": args.steps},
    }
    for part in args.parts:
        with tempfile.TemporaryDirectory() as scratch:
            if part == "small":
                found = check_small(args.python, Path(scratch))
            elif part == "rules":
                found = check_rules(args.python, Path(scratch))
            elif part == "pruned":
                found = check(args.python, load(args.run, dtype=torch.float32), Path(scratch), args)
            else:
                dense = load_dense(args.dense, dtype=torch.float32)
                dense.model.tokenizer = dense.tokenizer
                found = check(args.python, dense.model, Path(scratch), args)
        print(json.dumps(found, indent=1), flush=True)
        result[part] = found
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
