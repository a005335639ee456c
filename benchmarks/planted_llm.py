"""Planted units: SmolLM2-135M widened by a quarter without a change of its outputs, and pruned back to its size.

    python benchmarks/planted_llm.py                       # all arms; about 20 minutes when idle; resumes
    python benchmarks/planted_llm.py --only flap           # the arms whose name contains "flap"
    python benchmarks/planted_llm.py --show                # the table of the rows that are there

`regrow grow` gives every MLP a quarter more neurons. Their weights are then replaced, a third each, by

* duplicates: a copy of an old neuron. Its outgoing weights are split between the two at a random ratio, 0.3 to 0.7; to
  remove one of them, and not both, is right.
* cancelling pairs: two equal neurons with opposite outgoing weights, which respond to the calibration domains (their
  rows follow what these domains have in common in the input of the MLP): strong in every activation statistic.
* inactive units: a neuron whose activation is always 0 (no weights in ``up_proj``), with large outgoing weights.

The outputs stay (the row of the arm "widened" shows by how much they differ). The neurons that a pruner must keep are
the old ones that are active in the unseen domain alone: per MLP the 16 with the largest ratio of mean squares, unseen ÷
calibration domains, among those above the median in the unseen domain. A perfect pruner removes a unit of every
planted kind for each that was added, and restores the dense perplexity.

Calibration: news, manual and talk. Unseen: code (a different language, so that such neurons exist). Perplexity is
measured on the evaluation halves. All methods may cut MLP neurons alone, and keep as many weights as SmolLM2 has.
One row per arm and seed goes to benchmarks/results/planted_llm.jsonl.
"""

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import regrow
from regrow import apply, trace
from regrow.budget import Budget
from regrow.commands.pruning import build_pruner, collect_evidence
from regrow.data import Half, text, windows
from regrow.evaluation import paired_difference, perplexity
from regrow.methods.pruning.pruner import plan_cut
from regrow.nets import load
from regrow.sources import Batch, Source
from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "planted_llm.jsonl"
SEEN, UNSEEN = ("news", "manual", "talk"), ("code",)
SEQ, KEPT, LARGE = 256, 16, 3.0
OUTER = {"base": "flap", "partition": "layer", "switch": "never", "steps": 0}


@dataclass(frozen=True)
class Arm:
    """A method with its settings."""

    name: str
    method: str
    settings: Mapping[str, Any]


ARMS = (
    Arm("random", "random", {}),
    Arm("magnitude", "magnitude", {"compensate": True}),
    Arm("FLAP", "flap", {}),
    Arm("FLAP, uniform", "flap", {"allocation": "uniform"}),
    Arm("Wanda-sp", "wanda_sp", {"compensate": True}),
    Arm("LLM-Pruner", "llm_pruner", {"compensate": True}),
    Arm("OBS, ridge 0.1", "obs", {}),
    Arm("OBS, ridge 0.01", "obs", {"ridge": 0.01}),
    Arm("FLAP, outer blocks unpruned", "gprune", {**OUTER, "start": "inner"}),
    Arm("GPrune, not learned, uniform", "gprune", {"steps": 0, "start": "uniform"}),
)


@dataclass(frozen=True)
class Planted:
    """What was planted in one MLP, as positions of its units.

    Args:
        duplicates: (old unit, its copy), ``[n, 2]``.
        pairs: The two units that cancel, ``[n, 2]``.
        inactive: Units whose activation is 0, ``[n]``.
        keep: Old units that are active in the unseen domain alone, ``[KEPT]``.
    """

    duplicates: Tensor
    pairs: Tensor
    inactive: Tensor
    keep: Tensor


def record_inputs(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return the inputs of the projections of every MLP, one row per position, by name of the module."""
    rows: dict[str, list[Tensor]] = {}
    names = [name for name, _ in model.named_modules() if name.endswith(("mlp.gate_proj", "mlp.down_proj"))]

    def add(name: str, value: Tensor) -> None:
        rows.setdefault(name, []).append(value.flatten(0, -2))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(*batch.args, **batch.kwargs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(each) for name, each in rows.items()}


def plant(model: nn.Module, old: int, seen: Sequence[Batch], unseen: Sequence[Batch], seed: int) -> list[Planted]:
    """Replace the weights of the new units of every MLP; the outputs of the network stay."""
    generator = torch.Generator().manual_seed(seed)
    mlps = [layer.mlp for layer in model.model.layers]
    here, away = record_inputs(model, seen), record_inputs(model, unseen)
    result = []
    with torch.no_grad():
        for number, mlp in enumerate(mlps):
            entry, inside = f"model.layers.{number}.mlp.gate_proj", f"model.layers.{number}.mlp.down_proj"
            rows = here[entry].double()
            active, foreign = (one[inside][:, :old].double().square().mean(0) for one in (here, away))
            gate, up, down = (one.weight for one in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
            n = (gate.shape[0] - old) // 3 // 2 * 2
            new = torch.arange(old, gate.shape[0])
            twins, pairs, inactive = new[:n], new[n : 2 * n].view(-1, 2), new[2 * n :]
            sources = torch.randperm(old, generator=generator)[:n]
            ratio = 0.3 + 0.4 * torch.rand(n, generator=generator)
            gate[twins], up[twins] = gate[sources], up[sources]
            down[:, twins] = down[:, sources] * ratio
            down[:, sources] -= down[:, twins]
            direction = rows.mean(0) - away[entry].double().mean(0)
            noise = torch.randn(2, len(pairs), gate.shape[1], generator=generator, dtype=torch.float64)
            noise = noise * rows.std(0)  # as the inputs vary
            first, second = (normalise(direction) + normalise(one) for one in noise)
            values = nn.functional.silu(rows @ first.T) * (rows @ second.T)
            target = LARGE * active.median().sqrt()
            second = second * (target / values.std(0).clamp_min(1e-9))[:, None]
            size = down[:, :old].norm(dim=0).median()
            out = torch.randn(down.shape[0], len(pairs), generator=generator)
            out = size * out / out.norm(dim=0)
            for place, sign in ((0, 1), (1, -1)):
                gate[pairs[:, place]], up[pairs[:, place]] = first.to(gate), second.to(up)
                down[:, pairs[:, place]] = sign * out
            gate[inactive] = gate[torch.randint(old, inactive.shape, generator=generator)]
            up[inactive] = 0
            large = torch.randn(down.shape[0], len(inactive), generator=generator)
            down[:, inactive] = LARGE * size * large / large.norm(dim=0)
            only = torch.where(foreign > foreign.median(), foreign / active.clamp_min(1e-12), -1.0)
            only[sources] = -1.0  # either of two duplicates may be removed
            result.append(Planted(torch.stack([sources, twins], 1), pairs, inactive, only.topk(KEPT).indices))
    return result


def normalise(value: Tensor) -> Tensor:
    """Scale vectors to length 1."""
    return value / value.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def judge(planted: Sequence[Planted], kept: Sequence[Tensor]) -> dict[str, float]:
    """Return the fraction of each kind that was treated right, over all MLPs; ``kept`` are masks of the units."""
    gone = [~mask for mask in kept]
    hits = {
        "duplicates": [gone[i][one.duplicates].sum(1) == 1 for i, one in enumerate(planted)],
        "lost_duplicates": [gone[i][one.duplicates].all(1) for i, one in enumerate(planted)],
        "pairs": [gone[i][one.pairs].flatten() for i, one in enumerate(planted)],
        "broken_pairs": [gone[i][one.pairs].sum(1) == 1 for i, one in enumerate(planted)],
        "inactive": [gone[i][one.inactive] for i, one in enumerate(planted)],
        "kept": [kept[i][one.keep] for i, one in enumerate(planted)],
    }
    rates = {name: float(torch.cat(each).double().mean()) for name, each in hits.items()}
    planned = torch.cat([torch.cat(hits[kind]) for kind in ("duplicates", "pairs", "inactive")])
    return rates | {"removed": float(planned.double().mean())}


@dataclass
class PlantedBench:
    """The widened network, the texts, and what each arm is measured on."""

    seed: int
    tokens: int
    eval_windows: int

    def __post_init__(self) -> None:
        loaded = load("smollm2-135m", dtype=torch.float32)
        self.dense: nn.Module = loaded.model
        texts = {name: text(name) for name in (*SEEN, *UNSEEN)}
        more: dict[str, Any] = {"seq_len": SEQ, "seed": self.seed, "batch_size": 4}
        n = self.tokens // SEQ
        self.calibration = [windows(texts[name], loaded.tokenizer, n=n, **more) for name in SEEN]
        other = windows(texts["code"], loaded.tokenizer, n=n, **more)
        self.tests = [
            windows(texts[name], loaded.tokenizer, n=self.eval_windows, half=Half.EVALUATION, **more) for name in texts
        ]
        self.model = copy.deepcopy(self.dense)
        old = self.dense.config.intermediate_size
        regrow.grow(self.model, mlp="+25%", example=loaded.example.args[0], seed=self.seed)
        seen = [batch for source in self.calibration for batch in source.batches[:1]]
        self.planted = plant(self.model, old, seen, list(other)[:2], self.seed)
        self.axes = trace(self.model, *loaded.example.args, **loaded.example.kwargs)
        self.keys = [
            next(key for key, axis in self.axes.axes.items() if any(name == s.name for s in axis.consumers()))
            for name in (f"model.layers.{i}.mlp.down_proj.weight" for i in range(len(self.planted)))
        ]
        linear = [m.weight.numel() for m in self.dense.model.layers.modules() if isinstance(m, nn.Linear)]
        wider = [m.weight.numel() for m in self.model.model.layers.modules() if isinstance(m, nn.Linear)]
        self.keep = sum(linear) / sum(wider)

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Measure the perplexity on every domain, and the change of the loss from the dense network's."""
        results = {source.name: perplexity(model, source) for source in self.tests}
        if model is self.dense:
            self.base = results
        pairs = {name: paired_difference(self.base[name], one) for name, one in results.items()}
        return {
            "perplexity": {name: round(one.ppl, 4) for name, one in results.items()},
            "delta_nll": {name: [round(one.mean, 5), round(one.error, 5)] for name, one in pairs.items()},
            "ratio": {
                part: round(math.exp(sum(pairs[name].mean for name in names) / len(names)), 5)
                for part, names in (("seen", SEEN), ("unseen", UNSEEN))
            },
        }

    def run(self, arm: Arm) -> dict[str, Any]:
        """Prune the widened network back by a method, and judge what went."""
        start, model = time.perf_counter(), copy.deepcopy(self.model)
        pruner = build_pruner(arm.method, dict(arm.settings))
        sources: list[Source] = self.calibration
        evidence = collect_evidence(model, self.axes, pruner, sources)
        budget = Budget(self.keep, only=("mlp",))
        plan = plan_cut(pruner, model, self.axes, budget, evidence).plan
        model, _ = apply(model, self.axes, plan)
        seconds = time.perf_counter() - start
        kept = []
        for key in self.keys:
            mask = torch.ones(self.axes[key].size, dtype=torch.bool)
            if key in plan.changes:
                mask = torch.zeros_like(mask).index_fill(0, torch.tensor(plan.changes[key].keep), True)
            kept.append(mask)
        return {**judge(self.planted, kept), **self.evaluate(model), "seconds": round(seconds, 1)}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table."""
    print(
        "| arm | seed | removed | duplicates | both removed | cancelling pairs | broken pairs | inactive | kept | "
        "perplexity ÷ dense, calibration domains | unseen | s |"
    )
    print("|" + "---|" * 12)
    for row in rows:
        rates = [f"{100 * row[name]:.1f} %" if name in row else "" for name in RATES]
        ratio = [f"{row['ratio'][part]:.4f}" for part in ("seen", "unseen")]
        print(f"| {' | '.join([row['arm'], str(row['seed']), *rates, *ratio, str(row.get('seconds', ''))])} |")


RATES = ("removed", "duplicates", "lost_duplicates", "pairs", "broken_pairs", "inactive", "kept")


def main() -> None:
    """Run the arms that have no row yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens per domain")
    parser.add_argument("--eval-windows", type=int, default=32, help="evaluation windows of 256 tokens per domain")
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--show", action="store_true", help="print the table and run nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    if args.show:
        show(done)
        return
    for seed in range(args.seeds):
        base = {"seed": seed, "tokens": args.tokens * len(SEEN), "windows": args.eval_windows}
        there = {row["arm"] for row in done if all(row[key] == value for key, value in base.items())}
        arms = [arm for arm in ARMS if arm.name not in there and args.only.lower() in arm.name.lower()]
        if not arms:
            continue
        bench = PlantedBench(seed, args.tokens, args.eval_windows)
        first = {"dense": bench.dense, "widened": bench.model}
        base |= place()
        for name, model in first.items():
            if name == "dense" or name not in there:
                result = bench.evaluate(model)
            if name not in there:
                add(args.out, {"arm": name, **base, **result})
        for arm in arms:
            add(args.out, {"arm": arm.name, "settings": dict(arm.settings), **base, **bench.run(arm)})


def place() -> dict[str, Any]:
    """Return the date, the versions and the machine of a row."""
    return {"date": date.today().isoformat(), "machine": platform.machine(), **versions()}


def add(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row and print it."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({key: row[key] for key in ("arm", *RATES, "ratio", "seconds") if key in row}), flush=True)


if __name__ == "__main__":
    main()
