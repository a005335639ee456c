"""Planted units: SmolLM2-135M widened by a quarter without a change of its outputs, and pruned back to its size.

    python benchmarks/planted_llm.py                       # all arms; about an hour when idle; resumes
    python benchmarks/planted_llm.py --only flap           # arms whose name contains "flap"
    python benchmarks/planted_llm.py --show                # the table of the rows that are there

`regrow grow` gives every MLP a quarter more neurons. Their weights are then replaced, a third each, by

* duplicates: a copy of an old neuron. Its outgoing weights are split between the two at a random ratio, 0.3 to 0.7; to
  remove one of them, and not both, is right.
* cancelling pairs: two equal neurons with opposite outgoing weights, which respond to the calibration domains (their
  rows follow what these domains have in common in the input of the MLP): strong in every activation statistic.
* inactive units: a neuron whose activation is always 0 (no weights in ``up_proj``), with large outgoing weights.

The outputs stay (the row of the arm "widened" shows by how much they differ). A perfect pruner removes a unit of every
planted kind for each that was added, and restores the dense perplexity. Of the units that must stay two fractions are
reported: of all old neurons without a duplicate, and of those among them that are active in the unseen domain alone:
per MLP the 16 with the largest ratio of mean squares, unseen ÷ calibration domains, among those above the median in the
unseen domain.

Every cut is evaluated as it is (with means of dropped inputs in biases, but for "random"), and after layers that read
cut units were fitted by least squares on the calibration text: with the defaults of ``--reconstruct``, whose ridge is a
multiple of the mean of Σ x² over a layer's inputs, which few inputs dominate, so that it may be too much for a
duplicate to take over the weights of the other; and with small ridges, from 1e-5.

Calibration: news, manual and talk. Unseen: code (a different language, so that such neurons exist). Perplexity is
measured on the evaluation halves. All methods may cut MLP neurons alone, and keep as many weights as SmolLM2 has.
One row per arm and seed goes to benchmarks/results/planted_llm.jsonl.
"""

import copy
import math
import platform
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from shared import Row, add, arguments, rows, table
from torch import Tensor, nn

import regrow
from regrow import apply, trace
from regrow.core.budget import Budget
from regrow.core.plan import Plan
from regrow.core.sources import Batch
from regrow.data import Half, text, windows
from regrow.evaluation import paired_difference, perplexity
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.jobs.recovering import reconstruct
from regrow.methods.pruning.pruner import plan_cut
from regrow.methods.recovery import RecoveryTask
from regrow.nets import load
from regrow.store.run_record import versions

OUT = Path(__file__).parent / "results" / "planted_llm.jsonl"
SEEN, UNSEEN = ("news", "manual", "talk"), ("code",)
SEQ = 256
KEPT, LARGE = 16, 3.0


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
    Arm("Wanda-sp", "wanda_sp", {"compensate": True}),
    Arm("LLM-Pruner", "llm_pruner", {"compensate": True}),
    Arm("Fisher, all blocks", "fisher", {"prune_outer": True}),
    Arm("OBS, ridge 0.001", "obs", {"ridge": 0.001}),
)
RECONSTRUCTIONS: Mapping[str, Mapping[str, Any] | None] = {
    "": None,
    "defaults": {},
    "small ridges": {"ridges": (1e-5, 1e-3, 1e-1), "shrinkages": (1.0,)},
}
"""What follows the cut: nothing, or least squares with these settings of ``--reconstruct``."""


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

    def single(self, units: int) -> Tensor:
        """Return the old units without a duplicate, of an MLP with so many units."""
        new = torch.cat([self.duplicates.flatten(), self.pairs.flatten(), self.inactive])
        return torch.ones(units, dtype=torch.bool).index_fill(0, new, False).nonzero()[:, 0]


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
            active, foreign = (inputs[inside][:, :old].double().square().mean(0) for inputs in (here, away))
            gate, up, down = (layer.weight for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
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
            first, second = (normalise(direction) + normalise(row) for row in noise)
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
        "duplicates": [gone[i][units.duplicates].sum(1) == 1 for i, units in enumerate(planted)],
        "lost_duplicates": [gone[i][units.duplicates].all(1) for i, units in enumerate(planted)],
        "pairs": [gone[i][units.pairs].flatten() for i, units in enumerate(planted)],
        "broken_pairs": [gone[i][units.pairs].sum(1) == 1 for i, units in enumerate(planted)],
        "inactive": [gone[i][units.inactive] for i, units in enumerate(planted)],
        "old": [kept[i][units.single(len(kept[i]))] for i, units in enumerate(planted)],
        "kept": [kept[i][units.keep] for i, units in enumerate(planted)],
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
        more: Row = {"seq_len": SEQ, "seed": self.seed, "batch_size": 4}
        n = self.tokens // SEQ
        self.calibration = [windows(texts[name], loaded.tokenizer, n=n, **more) for name in SEEN]
        other = windows(texts["code"], loaded.tokenizer, n=n, **more)
        self.tests = [
            windows(texts[name], loaded.tokenizer, n=self.eval_windows, half=Half.EVALUATION, **more) for name in texts
        ]
        self.base = {source.name: perplexity(self.dense, source) for source in self.tests}
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

    def evaluate(self, model: nn.Module) -> Row:
        """Measure the perplexity on every domain, and the change of the loss from the dense network's."""
        results = {source.name: perplexity(model, source) for source in self.tests}
        pairs = {name: paired_difference(self.base[name], result) for name, result in results.items()}
        row: Row = {"perplexity": {name: round(result.ppl, 4) for name, result in results.items()}, "ratio": {}}
        row["delta_nll"] = {name: [round(mean, 5), round(error, 5)] for name, (mean, error) in pairs.items()}
        for part, names in (("seen", SEEN), ("unseen", UNSEEN)):
            row["ratio"][part] = round(math.exp(fmean(pairs[name][0] for name in names)), 5)
        return row

    def cut(self, arm: Arm) -> tuple[Plan, float]:
        """Plan the cut of the widened network back to its size; return the plan and the CPU seconds."""
        start = time.process_time()
        seed = {"seed": self.seed} if arm.method == "random" else {}
        pruner = build_pruner(arm.method, {**arm.settings, **seed})
        evidence = collect_evidence(self.model, self.axes, pruner, self.calibration, batch_size=8)
        plan = plan_cut(pruner, self.model, self.axes, Budget(self.keep, only=("mlp",)), evidence).plan
        return plan, time.process_time() - start

    def run(self, plan: Plan, name: str) -> Row:
        """Cut the widened network, reconstruct it as ``name`` says, and judge what went and what is left."""
        start, settings = time.process_time(), RECONSTRUCTIONS[name]
        kept = []
        for key in self.keys:
            mask = torch.ones(self.axes[key].size, dtype=torch.bool)
            if key in plan.changes:
                mask = torch.zeros_like(mask).index_fill(0, torch.tensor(plan.changes[key].keep), True)
            kept.append(mask)
        model, _ = apply(copy.deepcopy(self.model), self.axes, plan)
        row: Row = {"reconstruct": name, **judge(self.planted, kept)}
        if settings is not None:
            layers = reconstruct(RecoveryTask(model, self.model, self.axes, plan, self.calibration), settings)["layers"]
            row["ridges"] = [layer["ridge"] for layer in layers]
        row["cpu_seconds"] = round(time.process_time() - start, 1)
        return row | self.evaluate(model)


RATES = {
    "removed": "removed",
    "duplicates": "duplicates",
    "both removed": "lost_duplicates",
    "cancelling pairs": "pairs",
    "broken pairs": "broken_pairs",
    "inactive": "inactive",
    "old units kept": "old",
    "of the unseen domain": "kept",
}
"""Column → field of a row."""
PARTS = {"calibration domains": "seen", "unseen": "unseen"}


def shown(every: Sequence[Row]) -> Iterator[list[str]]:
    """One line per cut, with the perplexity of each reconstruction."""
    cuts: dict[tuple[Any, ...], list[Row]] = {}
    for row in every:
        cuts.setdefault((row["arm"], row["seed"], row["tokens"]), []).append(row)
    for (arm, seed, _), same in cuts.items():
        rates = [f"{100 * same[0][name]:.1f} %" if name in same[0] else "" for name in RATES.values()]
        each = {row.get("reconstruct", ""): row["ratio"] for row in same}
        ratios = [f"{each[way][part]:.4f}" if way in each else "" for way in RECONSTRUCTIONS for part in PARTS.values()]
        seconds = " + ".join(str(same[0].get(name, "")) for name in ("cut_cpu_seconds", "cpu_seconds"))
        yield [arm, str(seed), *rates, *ratios, seconds]


def run(args: Namespace, seed: int) -> None:
    """Run the arms of a seed that have no row yet."""
    base: Row = {"seed": seed, "tokens": args.tokens * len(SEEN), "windows": args.eval_windows}
    there = {(row["arm"], row.get("reconstruct", "")): row for row in rows(args.out) if base.items() <= row.items()}
    chosen = [arm for arm in ARMS if any(word.lower() in arm.name.lower() for word in args.only)]
    if all((arm.name, way) in there for arm in chosen for way in args.reconstruct):
        return
    bench = PlantedBench(seed, args.tokens, args.eval_windows)
    base |= {"machine": platform.machine(), **versions()}

    def write(arm: str, row: Row) -> None:
        done = add(args.out, {"arm": arm, **base, **row})
        print(arm, done.get("reconstruct", ""), done["ratio"], flush=True)

    for name, model in (("dense", bench.dense), ("widened", bench.model)):
        if (name, "") not in there:
            write(name, bench.evaluate(model))
    for arm in chosen:
        ways = [way for way in args.reconstruct if (arm.name, way) not in there]
        if not ways:
            continue
        plan, seconds = bench.cut(arm)
        for way in ways:
            common = {"settings": dict(arm.settings), "cut_cpu_seconds": round(seconds, 1)}
            write(arm.name, common | bench.run(plan, way))


def main() -> None:
    """Run the arms that have no row yet, or print the table."""
    sizes = {"seeds": 1, "tokens": 4096, "eval_windows": 8}
    args = arguments(__doc__, OUT, only=[""], reconstruct=(*RECONSTRUCTIONS,), **sizes)
    torch.set_num_threads(1)
    if args.show:
        after = [f", reconstructed with {way}" if way else "" for way in RECONSTRUCTIONS]
        ways = [f"perplexity ÷ dense, {part}{way}" for way in after for part in PARTS]
        print("\n".join(table(["arm", "seed", *RATES, *ways, "CPU s"], shown(rows(args.out)))))
        return
    for seed in range(args.seeds):
        run(args, seed)


if __name__ == "__main__":
    main()
