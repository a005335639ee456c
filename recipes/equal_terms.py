"""Pruning methods at equal terms: the same tokens, the same fit, the same twelve unseen domains.

    python recipes/equal_terms.py --texts FOLDER [--keep 0.8] [--fold 0] [--sample 0] [--text written] [--arm flap]
    python recipes/equal_terms.py --show

Fold 0 calibrates on news, code, manual and talk, fold 1 on a novel, licences, Wikipedia and conversations; the other
fold's domains and eight more are unseen: 16 windows of 256 tokens each, from the evaluation half of each text. Every
arm gets 112 windows of 256 tokens: ``written``, 28 of each domain of its fold; or ``generated``, 16 of each and 48 that
the dense model generates. Every cut is measured as it is, with biases that make up for the means of dropped inputs,
and after the least squares of ``--reconstruct``. ``--keep`` counts the weights of the decoder's linear layers.

Arms cut the same fraction of the MLP neurons of every block but the first eighth and last sixteenth, except: ``gprune``
and ``default`` (what ``regrow prune`` does without ``--method``, without rounding) choose among all units.
``fisher, all blocks`` prunes the first and last blocks, too, ``fisher, ranked`` ranks all units of all blocks, and
``fisher, measured`` takes the best of these by the loss on calibration data. ``blocks and neurons`` and ``modules and
neurons`` are ``--method depth``: whole blocks, or attentions and MLPs, and neurons for the rest of the budget.
``leverage`` ranks neurons by their ridge leverage scores, as MoDeGPT does for MLPs; with the fit it is Nyström's.
``gprune, …`` are its components, one by one, on MLP neurons of the same blocks, without the fit. ``sliced`` and
``sliced_normalised`` are SliceGPT at as many stored weights (``slicing.py``), which has no other fit.

Weights are float32, passes bfloat16 where the processor computes in it. ``--texts`` is the folder of ``corpora.py``. A
row is written per cut; what is there is not computed again. Differences are paired by domain; ± is the standard error
over domains, since windows of one are not independent. The first arm that needs a measurement has its seconds.
"""

import copy
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import corpora
import torch
from harness import Row, add, arguments, rows, table
from slicing import slice_stream
from torch import Tensor, nn

from regrow import apply, trace
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.names import GENERATED
from regrow.core.plan import Plan
from regrow.core.process_memory import return_memory
from regrow.core.scores import Evidence, Need, Scores
from regrow.core.sources import Source
from regrow.data import Half, windows
from regrow.data.batch_streams import join_sources
from regrow.evaluation import perplexity
from regrow.jobs.inputs import SourceSpecs, fill_generated, read_sources
from regrow.jobs.pruning_inputs import build_pruner, collect_evidence
from regrow.jobs.recovery_steps import reconstruct
from regrow.methods.pruning.pruner import Pruner, PruningTask, plan_cut, simple_pruner, with_droppable_modules
from regrow.methods.recovery import RecoveryTask
from regrow.nets import load
from regrow.nets.devices import autocasting, choose_precision
from regrow.scoring.grams import Gram, linear_readers, sum_products

OUT = Path(__file__).parent / "results" / "equal_terms.jsonl"
FOLDS = (("news", "code", "manual", "talk"), ("prose", "legal", "wiki", "dialogue"))
MORE = ("nyt", "film", "problems", "fiction", "learned", "kernel", "computing", "dictionary")
SEQ_LEN, BATCH, EVALUATED = 256, 8, 16
WINDOWS = {"written": (28, 0), "generated": (16, 48)}  # text → windows of each domain, windows that are generated


@dataclass(frozen=True)
class Arm:
    """How an arm selects units."""

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ("mlp",)
    inner: bool = True  # whether the first and last blocks stay whole
    fits: bool = True  # whether it is also measured with the fit


UNIFORM = {"allocation": "uniform"}
ARMS = {
    "random": Arm("random", UNIFORM),
    "flap": Arm("flap", UNIFORM),
    "llm_pruner": Arm("llm_pruner", UNIFORM),
    "fisher": Arm("fisher", UNIFORM),
    "obs": Arm("obs", UNIFORM),
    "leverage": Arm("leverage"),
    "sliced": Arm("sliced"),
    "sliced_normalised": Arm("sliced", {"normalised": True}),
    "default": Arm("flap", {"allocation": "measured"}, (), False),
    "gprune": Arm("gprune", {}, (), False),
    "blocks and neurons": Arm("depth", {"unit": "block"}, (), False),
    "modules and neurons": Arm("depth", {"unit": "any"}, (), False),
    "fisher, all blocks": Arm("fisher", UNIFORM, inner=False),
    "fisher, measured": Arm("fisher", {"allocation": "measured"}, (), False),
    "fisher, ranked": Arm("fisher", {"allocation": "ranked"}, (), False),
}
UNLEARNED = {"steps": 0, "start": "inner"}
STAGES = {
    "gprune, no stage": {**UNLEARNED, "partition": "layer", "switch": "never"},
    "gprune, modules": {**UNLEARNED, "switch": "never"},
    "gprune, modules, switch": {**UNLEARNED, "switch": "unreliable"},
    "gprune, random modules, switch": {**UNLEARNED, "partition": "random", "switch": "unreliable"},
    "gprune, whole layers, switch": {**UNLEARNED, "partition": "layer", "switch": "unreliable"},
    "gprune, modules, always": {**UNLEARNED, "switch": "always"},
    "gprune, modules, reversed": {**UNLEARNED, "switch": "reversed"},
    "gprune, modules, blend": {**UNLEARNED, "switch": "blend"},
    "gprune, random modules, blend": {**UNLEARNED, "partition": "random", "switch": "blend"},
    "gprune, even blend": {**UNLEARNED, "switch": "even"},
    "gprune, learned, switch": {"start": "inner", "switch": "unreliable"},
}
ARMS |= {name: Arm("gprune", settings, inner=False, fits=False) for name, settings in STAGES.items()}


@dataclass(frozen=True)
class LeverageSettings:
    """Settings of :func:`score_leverage`: the ridge, as a fraction of the mean square of the inputs."""

    ridge: float = 0.01
    allocation: str = "uniform"
    compensate: bool = True


def score_leverage(task: PruningTask, settings: LeverageSettings) -> Scores:
    """Return the ridge leverage scores of neurons, diag(C (C + λ I)⁻¹), C being the products of a layer's inputs."""
    readers, found = linear_readers(task.axes, task.units), dict[str, Tensor]()

    def score(name: str, gram: Gram) -> None:
        products = gram.mean_products(centre=settings.compensate).double()
        ridge = settings.ridge * products.diagonal().mean()
        inverse = torch.linalg.inv(products + ridge * torch.eye(len(products), dtype=torch.float64))
        leverage = 1 - ridge * inverse.diagonal()
        found[readers[name].axis] = leverage[readers[name].positions(readers[name].width)].sum(1)

    widths = {name: reader.width for name, reader in readers.items()}
    sum_products(task.model, widths, join_sources(task.evidence.data.values(), 8), score)
    return Scores(found, "leverage", task.evidence.sources, task.evidence.pooled().tokens)


def make_pruner(arm: Arm, sample: int) -> Pruner:
    """Return the pruner of an arm."""
    if arm.method == "leverage":
        own, needs = LeverageSettings(), {Need.WEIGHTS, Need.ACTIVATIONS}
        pruner = simple_pruner("leverage", own, needs, partial(score_leverage, settings=own))
        pruner = replace(pruner, products=True)
    else:
        seed = {"seed": sample} if arm.method in ("random", "gprune") else {}
        pruner = build_pruner(arm.method, {**arm.settings, **seed})
    return replace(pruner, prune_outer=False) if arm.inner else pruner


@dataclass
class Bench:
    """The model, the texts, and what was measured for the present fold, sample and text."""

    args: Namespace
    sources: dict[Any, Source] = field(default_factory=dict)
    evidence: dict[Any, Evidence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loaded = load(self.args.model)
        self.model = self.loaded.model
        self.precision = choose_precision(self.model)
        self.axes = trace(self.model, *self.loaded.example.args, **self.loaded.example.kwargs)
        self.texts = corpora.texts(self.args.texts)

    def read(self, name: str, n: int, half: Half, seed: int = 0, batch_size: int = 1) -> Source:
        """Return windows of a domain, read once."""
        key = name, n, half, seed
        if key not in self.sources:
            options: dict[str, Any] = {"n": n, "half": half, "seed": seed, "batch_size": batch_size}
            self.sources[key] = windows(self.texts[name](), self.loaded.tokenizer, seq_len=SEQ_LEN, **options)
        return self.sources[key]

    def calibration(self, fold: int, sample: int, text: str) -> list[Source]:
        """Return the windows that every arm calibrates and is fitted on."""
        n, generated = WINDOWS[text]
        found = [self.read(name, n, Half.CALIBRATION, sample) for name in FOLDS[fold]]
        if generated:
            specs = SourceSpecs(0, SEQ_LEN, (GENERATED,), seed=sample, generated_tokens=generated * SEQ_LEN)
            folder = self.args.out.parent / f"generated_{self.args.model}_{sample}_{generated}"
            folder.mkdir(exist_ok=True)
            found += fill_generated(read_sources(specs, self.loaded), specs, self.loaded, folder).calibration
        return found

    def measure(self, network: nn.Module, fold: int) -> dict[str, float]:
        """Return nats per token of each unseen domain."""
        unseen = (*FOLDS[1 - fold], *MORE)
        tests = [self.read(name, EVALUATED, Half.EVALUATION, batch_size=BATCH) for name in unseen]
        with autocasting(network, self.precision):
            return {test.name: round(perplexity(network, test).mean, 5) for test in tests}

    def prune(self, arm: Arm, keep: float, fold: int, sample: int, text: str) -> tuple[nn.Module, AxisGraph, Plan]:
        """Return a cut copy of the model, its axes, and the cut."""
        sources = self.calibration(fold, sample, text)
        pruner, at = make_pruner(arm, sample), (fold, sample, text)
        key = at, pruner.needs - {Need.WEIGHTS} | {Need.ACTIVATIONS}, pruner.shards
        if key not in self.evidence:
            self.evidence = {one: value for one, value in self.evidence.items() if one[0] == at}
            with autocasting(self.model, self.precision):
                needs = replace(pruner, needs=key[1])
                self.evidence[key] = collect_evidence(self.model, self.axes, needs, sources, batch_size=BATCH)
        axes = with_droppable_modules(pruner, self.model, self.axes)
        with autocasting(self.model, self.precision):
            plan = plan_cut(pruner, self.model, axes, Budget(keep, only=arm.only), self.evidence[key]).plan
        return *apply(copy.deepcopy(self.model), axes, plan), plan

    def cut(self, arm: str, keep: float, fold: int, sample: int, text: str) -> Iterator[Row]:
        """Yield the rows of an arm: as it is cut, and fitted."""
        own, sources, start = ARMS[arm], self.calibration(fold, sample, text), time.perf_counter()
        if own.method == "sliced":
            tokens = torch.cat([batch.args[0] for source in sources for batch in source]).split(BATCH)
            with autocasting(self.model, self.precision):
                network = slice_stream(self.model, tokens, keep, "normalised" in own.settings)
            seconds = round(time.perf_counter() - start, 1)
            yield {"fit": True, "kept": keep, "seconds": seconds, "nats": self.measure(network, fold)}
            return
        network, after, plan = self.prune(own, keep, fold, sample, text)
        counts = [
            sum(p.numel() for name, p in one.named_parameters() if name in axes.counted)
            for one, axes in ((network, after), (self.model, self.axes))
        ]
        row: Row = {"kept": round(counts[0] / counts[1], 5), "parameters": sum(p.numel() for p in network.parameters())}
        row |= {"dropped": [*plan.drop]} if own.method == "depth" else {}
        seconds = round(time.perf_counter() - start, 1)
        yield {"fit": False, **row, "seconds": seconds, "nats": self.measure(network, fold)}
        if not own.fits:
            return
        start = time.perf_counter()
        task = RecoveryTask(network, self.model, self.axes, plan, sources)
        reconstruct(task, precision=self.precision)
        row["seconds"] = round(seconds + time.perf_counter() - start, 1)
        yield {"fit": True, **row, "nats": self.measure(network, fold)}


def run(args: Namespace) -> None:
    """Compute the cuts that are missing."""
    names = ("model", "arm", "keep", "fold", "sample", "text")
    done = {tuple(row[name] for name in names) for row in rows(args.out)}
    bench = Bench(args)
    for fold in args.fold:
        if (args.model, "dense", 1.0, fold, 0, "") not in done:
            at = dict(zip(names, (args.model, "dense", 1.0, fold, 0, ""), strict=True))
            add(args.out, {**at, "fit": False, "kept": 1.0, "nats": bench.measure(bench.model, fold)})
    for sample, keep, fold, text in product(args.sample, args.keep, args.fold, args.text):
        for arm in args.arm:
            key = (args.model, arm, keep, fold, sample, text)
            if key in done:
                continue
            found = [*bench.cut(arm, keep, fold, sample, text)]
            for row in found:
                add(args.out, {**dict(zip(names, key, strict=True)), **row, "precision": bench.precision})
            levels = ", ".join(f"{fmean(row['nats'].values()):.3f}" for row in found)
            print(f"{arm}, keep {keep}, fold {fold}, sample {sample}, {text}: {levels} nats", flush=True)
            return_memory()


def lost(row: Row, every: Sequence[Row]) -> dict[str, float]:
    """Return domain → nats that a row loses against the dense model."""
    (dense,) = (one for one in every if (one["model"], one["fold"], one["arm"]) == (row["model"], row["fold"], "dense"))
    return {name: row["nats"][name] - value for name, value in dense["nats"].items()}


def average(found: Sequence[Mapping[str, float]], sign: str = "") -> str:
    """Return the mean and its standard error over domains, each the mean over the rows that have it."""
    domains = {name for one in found for name in one}
    values = [fmean(one[name] for one in found if name in one) for name in sorted(domains)]
    return f"{fmean(values):{sign}.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"


def show(every: Sequence[Row]) -> Iterator[str]:
    """Yield a table per model, size and text: nats lost, and the difference from ``flap`` with the same fit."""
    cut = [row for row in every if row["arm"] != "dense"]
    kinds = dict.fromkeys((row["model"], -row["keep"], row["text"]) for row in cut)
    for model, keep, text in sorted(kinds, key=lambda kind: (kind[0] != "smollm2-135m", kind[2] != "written", kind[1])):
        same = [row for row in cut if (row["model"], -row["keep"], row["text"]) == (model, keep, text)]
        lines = [
            [arm, *summarise([row for row in same if row["arm"] == arm], same, every)]
            for arm in ARMS
            if any(row["arm"] == arm for row in same)
        ]
        yield from (f"{model}, keep {-keep}, {text} text", "")
        yield from table(["arm", "runs", "lost", "to `flap`", "lost, with fit", "to `flap`"], lines)
        yield ""


def summarise(own: Sequence[Row], same: Sequence[Row], every: Sequence[Row]) -> list[str]:
    """Return the cells of an arm: the number of cuts, and without and with the fit nats lost, and those to ``flap``."""
    cells = [str(len({(row["fold"], row["sample"]) for row in own}))]
    for fit in (False, True):
        found = {(row["fold"], row["sample"]): lost(row, every) for row in own if row["fit"] is fit}
        rival = {
            (row["fold"], row["sample"]): lost(row, every) for row in same if row["arm"] == "flap" and row["fit"] is fit
        }
        pairs = [{name: found[at][name] - rival[at][name] for name in found[at]} for at in found if at in rival]
        differs = pairs and own[0]["arm"] != "flap"
        cells += [average([*found.values()]) if found else "", average(pairs, "+") if differs else ""]
    return cells


def main() -> None:
    """Compute, or print the table."""
    which: dict[str, Any] = {"keep": [0.8], "fold": [0, 1], "sample": [0], "text": tuple(WINDOWS), "arm": tuple(ARMS)}
    args = arguments(__doc__, OUT, model="smollm2-135m", texts=Path("texts"), **which)
    if args.show:
        print(*show(rows(args.out)), sep="\n")
    else:
        run(args)


if __name__ == "__main__":
    main()
