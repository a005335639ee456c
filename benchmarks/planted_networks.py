"""Small networks in which the premise of GPrune-LLM holds by construction: what each of its stages is worth there.

    python benchmarks/planted_networks.py                  # seeds 0 to 11; a few minutes on one thread; resumes
    python benchmarks/planted_networks.py --seeds 2 --out rows.jsonl
    python benchmarks/planted_networks.py --show           # the tables of the rows that are there

Four residual MLP blocks read a stream of a part that is active in every domain and of one part per domain. Domains 0 to
3 calibrate; 4 to 7 are unseen. The hidden units of each block are

* robust units, which read the part that is active in every domain;
* domain units, which read the part of one domain: on all other domains they hardly respond (``LEAK``), so their rank
  depends on the source, and those of unseen domains are weak on every calibration source;
* cancelling pairs: strong units of domains 0 and 1, two by two with opposite outgoing weights, so that no output
  depends on them (``decoys`` in the rows).

How much a unit contributes has a wide log-normal distribution in its outgoing weights, so that a metric without
activations knows something. A selection is right if it cuts these pairs, then units that contribute little, whatever
domain they belong to. Each network is cut to ``KEEP`` of its hidden units, with biases that make up for the means of
dropped inputs, and judged by the KL divergence from its dense outputs on seen and on unseen domains.

Arms: "flap" is the base of all others (its score, uniform in every block). GPrune's modules ("partition") × the order
in them ("switch") × their pruning ratios ("shares": the same in all modules, ``equal``; those that the base's own
selection has, ``base``; learned by gradients). OBS at two ridges, and with ``GENERIC`` inputs, of
which every part is active; least squares (``reconstruct``) on the calibration domains after some of them.

One row per seed and arm goes to benchmarks/results/planted_networks.jsonl. Differences are paired over seeds.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from regrow import apply, trace
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.scores import Scores
from regrow.core.sources import Batch, Source
from regrow.jobs.pruning_inputs import build_pruner, collect_evidence
from regrow.jobs.recovery_steps import reconstruct
from regrow.methods.pruning.gprune import Settings, form_modules, order_modules, score_views
from regrow.methods.pruning.gprune.modules import compute_reliability
from regrow.methods.pruning.pruner import PruningTask, Ranking, plan_cut
from regrow.methods.recovery import RecoveryTask
from regrow.scoring.spaces import make_ranking_spaces
from regrow.scoring.weights import scorable_axes
from regrow.store.run_record import versions

OUT = Path(__file__).parent / "results" / "planted_networks.jsonl"
DOMAINS, SEEN, PART, SHARED, CLASSES, BLOCKS = 8, 4, 8, 16, 32, 4
WIDTH = DOMAINS * PART + SHARED
ROBUST, PER_DOMAIN, CANCELLING = 96, 20, 48
KINDS = {"robust": ROBUST, "seen": SEEN * PER_DOMAIN, "unseen": (DOMAINS - SEEN) * PER_DOMAIN, "decoys": CANCELLING}
SPREAD, LEAK, STRONG = 0.7, 0.05, 2.5
KEEP, GENERIC, BATCH, BATCHES, TEST = 0.6, 0.3, 64, 16, 1000


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, units), nn.Linear(units, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with the output of the MLP added."""
        return x + self.down(torch.relu(self.up(x)))


class PlantedNetwork(nn.Module):
    """Blocks whose hidden units are planted, in the order of ``KINDS``, and a linear head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=generator)
        units = sum(KINDS.values())
        self.blocks = nn.ModuleList(Block(units) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)
        parts = [*[DOMAINS] * ROBUST, *torch.arange(DOMAINS).repeat_interleave(PER_DOMAIN).tolist()]
        with torch.no_grad():
            for block in self.blocks:
                rows = torch.zeros(units, WIDTH)
                out = 0.06 * normal(WIDTH, units) * torch.exp(SPREAD * normal(units))
                for unit, part in enumerate(parts):
                    where = slice(part * PART, WIDTH if part == DOMAINS else (part + 1) * PART)
                    size = where.stop - where.start
                    rows[unit, where] = normal(size) / size**0.5
                first = torch.arange(units - CANCELLING, units, 2)
                for number, unit in enumerate(first.tolist()):
                    part = number % 2
                    rows[unit, part * PART : (part + 1) * PART] = STRONG * normal(PART) / PART**0.5
                rows[first + 1], out[:, first + 1] = rows[first], -out[:, first]
                block.up.weight.copy_(rows)
                block.down.weight.copy_(out)
                block.up.bias.zero_()
                block.down.bias.zero_()
            self.head.weight.copy_(0.25 * normal(CLASSES, WIDTH))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, ``[n, CLASSES]``."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def inputs(domain: int, n: int, generator: torch.Generator) -> Tensor:
    """Return inputs of a domain, ``[n, WIDTH]``; of domain ``DOMAINS``: generic ones, of which every part is active."""
    scale = torch.full((WIDTH,), 1.0 if domain == DOMAINS else LEAK)
    scale[DOMAINS * PART :] = 1
    scale[domain * PART : (domain + 1) * PART] = 1
    return torch.randn(n, WIDTH, generator=generator) * scale


@dataclass(frozen=True)
class Arm:
    """A method with its settings.

    Args:
        name: The name in tables.
        method: The pruning method.
        settings: Its settings.
        equal: Whether all modules of gprune have the same pruning ratio.
        single: Whether units are scored on the first source alone.
        generic: Whether a part of the calibration data are generic inputs.
        fit: Whether least squares follow the cut.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    equal: bool = False
    single: bool = False
    generic: bool = False
    fit: bool = False


def modules(partition: str, switch: str, shares: str, fit: bool = False) -> Arm:
    """Return an arm of GPrune."""
    settings: dict[str, Any] = {"partition": partition, "switch": switch, "instead": "weights", "start": "uniform"}
    settings["steps"] = 100 if shares == "learned" else 0
    name = f"{partition}, {switch}, {shares}" + (", least squares" if fit else "")
    return Arm(name, "gprune", settings, equal=shares == "equal", fit=fit)


UNIFORM = {"allocation": "uniform"}
SHARES = ("equal", "base", "learned")
ARMS = (
    Arm("random", "random", UNIFORM),
    Arm("magnitude", "magnitude", UNIFORM | {"compensate": True}),
    Arm("flap, one source", "flap", UNIFORM, single=True),
    Arm("flap", "flap", UNIFORM),
    Arm("flap, least squares", "flap", UNIFORM, fit=True),
    *(modules(one, "never", shares) for one in ("thresholds", "random", "layer") for shares in SHARES),
    *(modules(one, how, shares) for one in ("thresholds", "random") for how in ("blend",) for shares in SHARES),
    *(modules("thresholds", how, shares) for how in ("always", "reversed") for shares in SHARES),
    modules("thresholds", "blend", "learned", fit=True),
    *(
        Arm(f"obs, ridge {ridge:g}{', generic inputs' * generic}{', least squares' * fit}", "obs", {"ridge": ridge},
            generic=generic, fit=fit)
        for ridge in (0.1, 0.001) for generic in (False, True) for fit in (False, True)
    ),
    Arm("flap, generic inputs, least squares", "flap", UNIFORM, generic=True, fit=True),
)  # fmt: skip


def same_ratio(task: PruningTask, settings: Settings) -> Ranking:
    """Score units by their rank relative to their module, so that every module gives the same fraction."""
    units = scorable_axes(task.axes, task.units)
    seen, among = score_views(task, settings, units), make_ranking_spaces(units, parts=4)
    groups = form_modules(settings, seen[0], among)
    values, sigma = seen[0].scores.values, seen[0].sigma
    trust = compute_reliability(settings.switch, among, groups, values, sigma, most=settings.switch_most).trust
    ranks = order_modules(task, settings, seen, groups, trust, among).ranks
    scores = Scores({key: row[0] for key, row in ranks.items()}, "rank in module", task.evidence.sources)
    return Ranking(scores)


class PlantedNetworkBench:
    """One network with its calibration and test inputs."""

    def __init__(self, seed: int) -> None:
        self.model = PlantedNetwork(seed).eval()
        self.axes: AxisGraph = trace(self.model, torch.randn(4, WIDTH))
        self.keys = [
            next(key for key, axis in self.axes.axes.items() if any(name == one.name for one in axis.consumers()))
            for name in (f"blocks.{i}.down.weight" for i in range(BLOCKS))
        ]
        generator = torch.Generator().manual_seed(1000 + seed)
        self.sources = [self.source(domain, BATCHES, generator) for domain in range(SEEN)]
        self.generic = self.source(DOMAINS, round(SEEN * BATCHES * GENERIC / (1 - GENERIC)), generator)
        self.tests = [inputs(domain, TEST, generator) for domain in range(DOMAINS)]

    def source(self, domain: int, batches: int, generator: torch.Generator) -> Source:
        """Return calibration inputs of a domain."""
        return Source(f"d{domain}", [Batch((inputs(domain, BATCH, generator),)) for _ in range(batches)])

    def run(self, arm: Arm) -> dict[str, Any]:
        """Cut the network and judge what is left."""
        start = time.process_time()
        pruner = build_pruner(arm.method, dict(arm.settings))
        if arm.equal:
            pruner = replace(pruner, score=partial(same_ratio, settings=Settings(**arm.settings)))
        sources = self.sources[:1] if arm.single else [*self.sources, *([self.generic] if arm.generic else [])]
        evidence = collect_evidence(self.model, self.axes, pruner, sources)
        plan = plan_cut(pruner, self.model, self.axes, Budget(KEEP, only=("blocks",)), evidence).plan
        model, _ = apply(copy.deepcopy(self.model), self.axes, plan)
        if arm.fit:
            task = RecoveryTask(model, self.model, self.axes, plan, sources)
            reconstruct(task, {"ridges": (1e-4, 1e-3, 1e-2, 1e-1, 1.0)})
        seconds = time.process_time() - start
        return {**self.divergence(model), "cut": self.cut(plan.changes), "cpu_seconds": round(seconds, 2)}

    def divergence(self, model: nn.Module) -> dict[str, float]:
        """Return the mean KL divergence from the dense outputs on seen and on unseen domains."""
        each = []
        with torch.no_grad():
            for x in self.tests:
                dense, own = self.model(x).log_softmax(-1), model(x).log_softmax(-1)
                each.append(float((dense.exp() * (dense - own)).sum(-1).mean()))
        return {"seen": round(fmean(each[:SEEN]), 6), "unseen": round(fmean(each[SEEN:]), 6)}

    def cut(self, changes: Mapping[str, Any]) -> dict[str, float]:
        """Return the fraction of the units of each kind that were cut, over all blocks."""
        gone = torch.ones(BLOCKS, sum(KINDS.values()), dtype=torch.bool)
        for row, key in zip(gone, self.keys, strict=True):
            row[torch.tensor(changes[key].keep) if key in changes else slice(None)] = False
        parts = gone.split(list(KINDS.values()), 1)
        return {kind: round(float(part.double().mean()), 4) for kind, part in zip(KINDS, parts, strict=True)}


QUESTIONS: Mapping[str, Sequence[tuple[str, str]]] = {
    "partition against random modules of equal size": [
        (f"thresholds, {how}, {shares}", f"random, {how}, {shares}") for how in ("never", "blend") for shares in SHARES
    ],
    "partition against one module per block": [
        (f"thresholds, never, {shares}", f"layer, never, {shares}") for shares in SHARES
    ],
    "switch against": [
        (f"thresholds, blend, {shares}", f"thresholds, {how}, {shares}")
        for shares in SHARES
        for how in ("never", "always", "reversed")
    ],
    "shares against those of the base": [
        (f"thresholds, {how}, {shares}", f"thresholds, {how}, base")
        for how in ("never", "blend")
        for shares in ("equal", "learned")
    ],
    "all stages, least squares, OBS": [
        ("flap", "flap, one source"),
        ("thresholds, blend, learned", "flap, one source"),
        ("thresholds, never, learned", "flap, one source"),
        ("thresholds, blend, learned", "flap"),
        ("thresholds, blend, learned", "magnitude"),
        ("thresholds, blend, learned, least squares", "flap, least squares"),
        ("obs, ridge 0.001", "flap"),
        ("obs, ridge 0.001, least squares", "thresholds, blend, learned, least squares"),
        ("obs, ridge 0.001, least squares", "obs, ridge 0.1, least squares"),
        ("obs, ridge 0.001, generic inputs, least squares", "flap, generic inputs, least squares"),
        ("obs, ridge 0.001, generic inputs, least squares", "obs, ridge 0.001, least squares"),
    ],
}
"""What is asked → pairs of arms, of which the first is better if the difference is negative."""


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the mean of each arm, and the differences that answer the questions."""
    arms = [name for name in dict.fromkeys(arm.name for arm in ARMS) if any(row["arm"] == name for row in rows)]
    by = {(row["arm"], row["seed"]): row for row in rows}
    print("| arm | KL, seen domains | unseen | cut: robust | seen | unseen | cancelling | CPU s |\n" + "|---" * 8 + "|")
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        figures = [summarise([row[part] for row in mine]) for part in ("seen", "unseen")]
        shares = [f"{100 * fmean(row['cut'][kind] for row in mine):.0f} %" for kind in KINDS]
        seconds = f"{fmean(row['cpu_seconds'] for row in mine):.1f}"
        print(f"| {' | '.join([arm, *figures, *shares, seconds])} |")
    for question, pairs in QUESTIONS.items():
        print(f"\n| {question} | minus | KL, seen domains | unseen | seeds |\n|---|---|---|---|---|")
        for first, second in pairs:
            seeds = [seed for arm, seed in by if arm == first and (second, seed) in by]
            parts = [
                summarise([by[first, seed][part] - by[second, seed][part] for seed in seeds], "+")
                for part in ("seen", "unseen")
            ]
            print(f"| {first} | {second} | {' | '.join(parts)} | {len(seeds)} |")


def summarise(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{fmean(values) if values else float('nan'):{sign}.4f} ± {error:.4f}"


def missing(done: Sequence[Mapping[str, Any]], seeds: int, only: str) -> Iterator[tuple[int, list[Arm]]]:
    """Return the arms of each seed that have no row yet."""
    there = {(row["arm"], row["seed"]) for row in done}
    for seed in range(seeds):
        arms = [arm for arm in ARMS if (arm.name, seed) not in there and only in arm.name]
        if arms:
            yield seed, arms


def main() -> None:
    """Run the arms that have no row yet, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--show", action="store_true", help="print the tables and run nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    if args.show:
        show(done)
        return
    torch.set_num_threads(1)
    place = {"date": date.today().isoformat(), "machine": platform.machine(), **versions()}
    for seed, arms in missing(done, args.seeds, args.only):
        bench = PlantedNetworkBench(seed)
        for arm in arms:
            row = {"arm": arm.name, "seed": seed, **bench.run(arm), **place}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(seed, arm.name, row["seen"], row["unseen"], row["cut"], row["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
