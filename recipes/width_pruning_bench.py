"""Prune and evaluate one point of the width-pruning tables, with the functions of the commands."""

import copy
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import corpora
import torch
from harness import Row
from torch import nn
from width_pruning_points import FOLDS, Point

from regrow import apply, trace
from regrow.allocation.ranked import BudgetError
from regrow.core.budget import Budget
from regrow.core.names import GENERATED
from regrow.core.plan import Plan
from regrow.core.process_memory import return_memory
from regrow.core.scores import Evidence, Need
from regrow.core.sources import Source
from regrow.data import Half, windows
from regrow.evaluation import perplexity
from regrow.jobs import pruning as prune
from regrow.jobs.inputs import SourceSpecs, fill_generated, read_sources
from regrow.jobs.recovering import reconstruct
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import Pruner, plan_cut
from regrow.methods.recovery import RecoveryTask
from regrow.nets import load
from regrow.nets.devices import autocasting

SEQ_LEN, BATCH = 256, 8
LEFT_OUT_SEED = 1000
"""The seed of the windows of a left-out domain that a point is judged on; samples are seeds from 0."""


@dataclass(frozen=True)
class Cut:
    """A pruned network before it is distilled, which points that are distilled at different rates share.

    Args:
        key: The point without its distillation.
        network: The network.
        plan: What was cut.
        row: What a row says about it.
        seconds: Stage → what it took.
    """

    key: str
    network: nn.Module
    plan: Plan
    row: Row
    seconds: Mapping[str, float]


@dataclass
class WidthPruningBench:
    """The model, the texts, and what was measured on them for the present fold and sample."""

    args: Namespace
    evidence: dict[Any, tuple[Evidence, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    last: Cut | None = None

    def __post_init__(self) -> None:
        self.loaded = load(self.args.model, dtype=getattr(torch, self.args.dtype))
        self.model = self.loaded.model
        self.axes = trace(self.model, *self.loaded.example.args, **self.loaded.example.kwargs)
        self.texts = {name: read() for name, read in corpora.texts(self.args.texts).items()}
        self.tests: dict[Any, Source] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to the seconds of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 2)

    def run(self, point: Point) -> Row:
        """Prune and evaluate; a budget that the arm cannot meet is an ``error``."""
        self.seconds = {}
        return_memory()
        try:
            network, row = (self.model, {}) if point.method == "dense" else self.pruned(point)
        except BudgetError as error:
            return {"error": str(error)}
        with self.stage("evaluate"):
            row |= self.likelihoods(network, point)
        calibration = 0 if point.method == "dense" else sum(one.tokens for one in self.sources(point))
        row["tokens"] = {"calibration": calibration, "evaluation": row.pop("evaluated")}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return {**row, "seconds": self.seconds, "date": date}

    def pruned(self, point: Point) -> tuple[nn.Module, Row]:
        """A pruned copy of the network, distilled if the point says so, and what its row says about it."""
        before = replace(point, distil={})
        if self.last is None or self.last.key != before.key:
            self.last = None
            self.last = self.cut(before)
        else:
            self.seconds |= self.last.seconds
        if not point.distil:
            return self.last.network, dict(self.last.row)
        network, sources = copy.deepcopy(self.last.network), self.sources(point)
        work = find_method(MethodKind.RECOVERY, "distil").create("distil", point.distil)
        with self.stage("distil"):
            task = RecoveryTask(network, self.model, self.axes, self.last.plan, sources)
            with autocasting(network, self.args.dtype), autocasting(self.model, self.args.dtype):
                report = work(task)
        return network, {**self.last.row, "distillation": report}

    def cut(self, point: Point) -> Cut:
        """The network after the cut and the least squares of a point."""
        pruner = prune.build_pruner(point.method, point.settings)
        if point.outer is not None:
            pruner = replace(pruner, prune_outer=point.outer)
        budget = Budget(point.keep, only=(point.only,) if point.only else ())
        sources = self.sources(point)
        prune.check_pruning(pruner, self.axes, budget, sources)
        evidence, took = self.measured(point, pruner)
        self.seconds["calibrate"] = took
        with self.stage("plan"):
            cut = plan_cut(pruner, self.model, self.axes, budget, evidence)
        with self.stage("apply"):
            network, after = apply(copy.deepcopy(self.model), self.axes, cut.plan)
        counts = [
            sum(p.numel() for name, p in one.named_parameters() if name in axes.counted)
            for one, axes in ((network, after), (self.model, self.axes))
        ]
        row: Row = {"kept": round(counts[0] / counts[1], 5), "defaults": cut.plan.origin.get("settings", {})}
        row |= {name: cut.findings[name] for name in ("starts", "history") if cut.findings.get(name)}
        if point.reconstruct:
            with self.stage("reconstruct"):
                fit = reconstruct(RecoveryTask(network, self.model, self.axes, cut.plan, sources), point.fit)
            row["reconstruction"] = {name: fit[name] for name in ("target", "note", "tokens") if name in fit}
        return Cut(point.key, network, cut.plan, row, dict(self.seconds))

    def sources(self, point: Point) -> list[Source]:
        """The calibration windows of a point: those of its fold but for the domain that is left out, and its prior."""
        own = [self.calibration(name, point.sample) for name in FOLDS[point.fold] if name != point.left_out]
        return own + self.prior(point)

    def prior(self, point: Point) -> list[Source]:
        """The text that the model itself generates for a point, which is kept beside the rows."""
        if not point.generated:
            return []
        key = GENERATED, point.generated, point.sample
        if key not in self.tests:
            tokens = point.generated * SEQ_LEN
            specs = SourceSpecs(0, SEQ_LEN, (GENERATED,), seed=point.sample, generated_tokens=tokens)
            folder = self.args.out.parent / f"generated_{self.args.model}_{point.sample}_{point.generated}"
            folder.mkdir(exist_ok=True)
            kinds = fill_generated(read_sources(specs, self.loaded), specs, self.loaded, folder)
            self.tests[key] = kinds.calibration[0]
        return [self.tests[key]]

    def calibration(self, name: str, sample: int) -> Source:
        """The calibration windows of a domain."""
        return self.windows(name, self.args.windows, sample, Half.CALIBRATION, 1)

    def windows(self, name: str, n: int, seed: int, half: Half, batch_size: int) -> Source:
        """Windows of a domain, read once."""
        key = name, n, seed, half
        if key not in self.tests:
            more = {"n": n, "seq_len": SEQ_LEN, "seed": seed, "half": half, "batch_size": batch_size}
            self.tests[key] = windows(self.texts[name], self.loaded.tokenizer, **more)
        return self.tests[key]

    def measured(self, point: Point, pruner: Pruner) -> tuple[Evidence, float]:
        """What a method needs, measured on all domains of a fold once, and the seconds that it took for all of them."""
        at = point.fold, point.sample
        self.evidence = {key: value for key, value in self.evidence.items() if key[0] == at}
        pruner = replace(pruner, needs=pruner.needs - {Need.WEIGHTS} | {Need.ACTIVATIONS})  # variants share them
        key = at, pruner.needs, pruner.shards, point.generated
        if key not in self.evidence:
            if Need.GRADIENTS in pruner.needs:  # gigabytes
                self.evidence = {one: value for one, value in self.evidence.items() if Need.GRADIENTS not in one[1]}
            start = time.perf_counter()
            every = [self.calibration(name, point.sample) for name in FOLDS[point.fold]] + self.prior(point)
            found = prune.collect_evidence(self.model, self.axes, pruner, every, batch_size=BATCH)
            self.evidence[key] = found, round(time.perf_counter() - start, 2)
        found, took = self.evidence[key]
        names = [name for name in found.sources if name != point.left_out]
        part = {name: found.statistics[name] for name in names}, {name: found.data[name] for name in names}
        return Evidence(*part, notes=found.notes), took

    def likelihoods(self, network: nn.Module, point: Point) -> Row:
        """Negative log-likelihood per token of each window, and bits per byte, of each domain that is evaluated."""
        if point.left_out:
            n = self.args.screen_windows
            tests = [self.windows(point.left_out, n, LEFT_OUT_SEED, Half.CALIBRATION, BATCH)]
        else:
            every = [name for fold in FOLDS for name in fold]
            tests = [self.windows(name, self.args.eval_windows, 0, Half.EVALUATION, BATCH) for name in every]
        if not point.left_out and point.method != "dense":
            few = -(-self.args.seen_windows // BATCH)
            tests = [replace(one, batches=one.batches[:few]) if one.name in FOLDS[point.fold] else one for one in tests]
        found = [perplexity(network, test, tokenizer=self.loaded.tokenizer) for test in tests]
        pairs = {one.source: zip(one.nll, one.tokens, strict=True) for one in found}
        nll = {name: [round(total / count, 4) for total, count in each] for name, each in pairs.items()}
        bits = {one.source: round(one.bits_per_byte or 0, 4) for one in found}
        return {"nll": nll, "bits_per_byte": bits, "evaluated": sum(sum(one.tokens) for one in found)}
