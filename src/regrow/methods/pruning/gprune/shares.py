"""Stage 4 of GPrune: learn the pruning ratio of each module under the exact budget."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.allocation.ranked import BudgetError, allocation, module_costs, rank, ratios, uniform
from regrow.core.axes import AxisGraph
from regrow.core.axes.axis import AxisTensor
from regrow.core.errors import RefusedError
from regrow.core.scores import Scores
from regrow.core.sources import Batch, device_of, drawn, labelled_logits, logits_in
from regrow.methods.pruning.gprune.modules import (
    STARTS,
    Masks,
    Measurement,
    Settings,
    findings_of,
    form_modules,
    measure,
    order_modules,
)
from regrow.methods.pruning.pruner import NOT_FINITE, Kept, PruningTask, Ranking
from regrow.scoring.metrics import BASES
from regrow.scoring.modules import reliability
from regrow.scoring.spaces import FEW, OUTER_BLOCKS, inner, share_of, spaces, within
from regrow.store.errors import StoreError
from regrow.store.tensors import read_header
from regrow.surgery.gate import gate_inputs, gates_of
from regrow.training.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from regrow.training.fit import fit
from regrow.training.hooks import Check, EarlyStopping, Tensors, with_early_stopping
from regrow.training.learner import Learner, Loss
from regrow.training.schedule import NO_AXES, OptimizerSettings, Schedule, source_phase
from regrow.training.state import TrainState

SECONDS = 120.0
"""The longest time between two checkpoints, in seconds; one is also written after every evaluation."""


@dataclass
class Comparison:
    """KL(dense ‖ masked) in nats per position, with the dense network's probabilities cached up to a memory limit.

    Args:
        model: The dense network.
        axes: Its axes.
        memory: GiB of the dense network's probabilities that may be cached.
        cache: ``id`` of a batch → the batch, the probabilities, and their mean entropy in nats.
    """

    model: nn.Module
    axes: AxisGraph
    memory: float
    cache: dict[int, tuple[Batch, Tensor, float]] = field(default_factory=dict, repr=False)

    def __call__(self, batch: Batch, gates: Mapping[str, Tensor], fills: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of the masked network on a batch, as a scalar with a gradient to the gates."""
        here = batch.to(device_of(self.model))
        chances, entropy = self._dense(batch, here)
        with gate_inputs(self.model, self.axes, gates, fills):
            logits = logits_in(here.run(self.model))
        # KL(p ‖ q) = H(p, q) − H(p), and the first is one fused operation: half the time of ``kl_div`` on text.
        return F.cross_entropy(labelled_logits(logits, here.labels).float(), chances) - entropy

    @torch.no_grad()
    def _dense(self, batch: Batch, here: Batch) -> tuple[Tensor, float]:
        """Return the dense network's probabilities, ``[positions, classes]``, and their mean entropy in nats."""
        if id(batch) in self.cache:
            return self.cache[id(batch)][1:]
        logits = logits_in(here.run(self.model))
        chances = labelled_logits(logits, here.labels).float().softmax(-1)
        entropy = float(torch.special.entr(chances).sum(-1).mean())
        if sum(row[1].nbytes for row in self.cache.values()) + chances.nbytes <= self.memory * 2**30:
            self.cache[id(batch)] = (batch, chances, entropy)
        return chances, entropy


def allocate_start(how: str, s: Settings, task: PruningTask, measured: Measurement) -> Kept:
    """Return the units of every axis that stay at the start of learning."""
    base, scores = BASES[s.base], measured.views[0].scores.values
    allocate = allocation(base.allocation) if how == "base" else uniform
    outer = {"base": base.spare, "inner": OUTER_BLOCKS}.get(how, (0.0, 0.0))
    outer = (0.0, 0.0) if task.budget.regular else outer  # every block gives alike
    some = {axis.key for axis in inner(measured.units, *outer) if how != "inner" or axis.size >= FEW}
    try:
        chosen = {axis.key: scores[axis.key] for axis in measured.units if axis.key in some}
        kept = allocate(task.axes, chosen, task.budget, minimum=s.minimum)
    except BudgetError:  # blocks that stay whole otherwise are cut, too
        kept = allocate(task.axes, scores, task.budget, minimum=s.minimum)
    return {key: kept.get(key, tuple(range(len(row)))) for key, row in scores.items()}


def score_units(task: PruningTask, s: Settings) -> Ranking:
    """Learn the pruning ratio of each module, and score units by how far their relative rank lies above it."""
    task.progress(0, 1, "forming modules")
    measured = measure(s, task)
    among, first = spaces(measured.units, parts=4), measured.views[0]
    modules = form_modules(s, first, among)
    trusted = reliability(s.switch, among, modules, first.scores.values, first.spread, most=s.switch_most)
    masks = order_modules(s, task, measured, modules, trusted.trust, among)
    labels = [{key: row[view] for key, row in masks.modules.items()} for view in range(len(measured.views))]
    priced = [module_costs(task.axes, one, len(modules), task.budget) for one in labels]
    costs, removed = torch.stack([each for each, _ in priced]), priced[0][1]
    shares = ModuleShares(
        s, task, masks, costs, removed, torch.tensor(modules.spaces), Comparison(task.model, task.axes, s.memory)
    )

    tried = STARTS if s.start == "best" else (s.start,)
    kept = {name: allocate_start(name, s, task, measured) for name in tried}
    given = {name: masks.given(units) for name, units in kept.items() if name == tried[0] or units != kept["base"]}
    base = kept.get("base") or allocate_start("base", s, task, measured)
    losses, state = _read(task) if s.steps else ({}, None)
    if state is None and (s.steps or len(tried) > 1):
        for i, (name, share) in enumerate(given.items()):
            task.progress(i, len(given), f"evaluating the start {name}")
            losses[name] = shares.held_out_loss(share)
    start = s.start
    if losses:
        finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            raise RefusedError(NOT_FINITE)
        start = min(finite, key=lambda name: finite[name])
    if state is None:
        history = (Check(0, losses[start]),) if losses else ()
        trained = shares.tensors(given[start], len(among))
        state = TrainState(EarlyStopping(trained, {"share": _tensor(given[start])}, history))
    if s.steps:
        state = _learn(shares, state, losses)
    learned = state.learner
    share, checks = learned.best["share"].values, [asdict(check) for check in learned.history]
    report = {"starts": losses, "history": checks, "best_step": learned.best_check.step if checks else 0}

    robust = within(first.spread.sigma, measured.spaces, lambda sigma: (sigma <= sigma.median()).double())
    tables = findings_of(measured, among, modules, trusted, costs[0], given[start])

    def findings(every: Kept) -> dict[str, Any]:
        last = masks.given(every)
        rows = [
            {**row, "learned": float(ratio), "given": float(end)}
            for row, ratio, end in zip(tables["modules"], share, last, strict=True)
        ]
        cut = {"base": share_of(robust, base), "gprune": share_of({key: robust[key] for key in every}, every)}
        return {**tables, "modules": rows, "robust_among_cut": cut, "notes": list(task.evidence.notes), **report}

    metric, pooled = f"gprune/{first.scores.metric}", task.evidence.pooled()
    return Ranking(Scores(masks.margins(share), metric, task.evidence.sources, pooled.tokens), findings)


@dataclass(frozen=True, eq=False)
class ModuleShares:
    """The pruning ratio of each module as a function of trained logits, and the loss at these ratios.

    Args:
        settings: The settings of GPrune.
        task: The network and the measurements.
        masks: The modules and the order in each.
        costs: The cost of all units of each module, ``[views, modules]``.
        removed: The cost that must be removed.
        home: The number of the set of axes that each module belongs to, ``[modules]`` int64.
        compare: Returns the loss of a masked network.
    """

    settings: Settings
    task: PruningTask
    masks: Masks
    costs: Tensor
    removed: float
    home: Tensor
    compare: Comparison

    def tensors(self, share: Tensor, spaces: int) -> Tensors:
        """Return the trained tensors that give the pruning ratios ``share``.

        There is one logit per module, and one more for what the modules of a set of axes have in common.
        """
        logits, lr = torch.logit((share / self.settings.most).clamp(0.02, 0.98)), self.settings.lr
        return {"logits": _tensor(logits, lr), "shared": _tensor(logits.new_zeros(spaces), lr)}

    def shares(self, tensors: Tensors, view: int = 0) -> Tensor:
        """Return the pruning ratio of each module, ``[modules]``, with a gradient to the trained tensors."""
        logits = tensors["logits"].values + tensors["shared"].values.index_select(0, self.home)
        return ratios(logits, self.costs[view], self.removed, most=self.settings.most)

    def loss(self, tensors: Tensors, batch: Batch, view: int) -> Tensor:
        """Return the loss of the network under soft masks, as a scalar with a gradient to the trained tensors."""
        return self.compare(batch, self.masks.gates(self.shares(tensors, view), view), self.masks.filled(view))

    def held_out_loss(self, share: Tensor) -> float:
        """Return the loss on held-out windows, mean over sources, of the network cut exactly to the budget."""
        s, task, masks = self.settings, self.task, self.masks
        losses: list[float] = []
        for i, source in enumerate(task.evidence.data.values()):
            view, batches = self._view(i), source.held_out(s.held_out)[1]
            kept = rank(task.axes, masks.margins(share, view), task.budget, minimum=s.minimum)
            gates = gates_of(task.axes, {key: kept[key] for key in masks.places})
            with torch.no_grad():
                each = [self.compare(batch, gates, masks.filled(view)) for batch in batches]
            losses.append(float(torch.stack(each).mean()))
        return sum(losses) / len(losses)

    def windows(self, step: int) -> list["Window"]:
        """Return the windows of text that a training step uses."""
        s = self.settings
        sources = [source.held_out(s.held_out)[0] for source in self.task.evidence.data.values()]
        return [Window(batch, self._view(i)) for i, batch in drawn(sources, s.windows, step, s.seed)]

    def _view(self, source: int) -> int:
        """Return the ranking that is used on a source's windows: the one without that source, under ``cross``."""
        return source + 1 if self.settings.cross else 0


@dataclass(frozen=True)
class Window:
    """A batch of text, and the ranking of the units under which the network is masked on it.

    Args:
        batch: The batch.
        view: The number of the ranking.
    """

    batch: Batch
    view: int

    def to(self, device: torch.device) -> "Window":
        """Return the window itself: the comparison moves batches, since it caches predictions by batch."""
        return self


def _learn(
    shares: ModuleShares, state: TrainState[EarlyStopping], starts: Mapping[str, float]
) -> TrainState[EarlyStopping]:
    """Train the logits; the network's own parameters stay as they are."""
    s, task = shares.settings, shares.task
    every = min(s.every, s.steps)
    epochs = [every] * (s.steps // every) + [s.steps % every] * bool(s.steps % every)
    learner = with_early_stopping(
        Learner[Tensors](
            state.learner.tensors,
            loss=lambda tensors, context, step: Loss(shares.loss(tensors, step.batch.batch, step.batch.view)),
            boundary=lambda tensors, context, boundary: tensors,
            scheduled=True,
        ),
        evaluate=lambda tensors, context: shares.held_out_loss(shares.shares(tensors)),
        snapshot=lambda tensors, context: {"share": _tensor(shares.shares(tensors))},
        start=state.learner,
    )

    def write(now: TrainState[EarlyStopping]) -> None:
        if task.checkpoint is not None:
            header = {**task.header(), "starts": dict(starts)}
            write_checkpoint(task.checkpoint, task.model, now, trained_only=True, header=header)

    if not (state.epoch or state.step or state.number):
        write(state)
    return fit(
        task.model,
        task.axes,
        [source_phase("learning", epochs, shares.windows)],
        learner,
        Schedule(OptimizerSettings("adamw", s.lr), "cosine", seed=s.seed),
        state=state,
        checkpoint=lambda now, context: write(now),
        seconds=SECONDS,
        progress=task.progress,
    ).state


def _read(task: PruningTask) -> tuple[dict[str, float], TrainState[EarlyStopping] | None]:
    """Return the losses of the starts and the training state from the checkpoint; ``({}, None)`` if there is none."""
    if task.checkpoint is None or not task.checkpoint.is_file():
        return {}, None
    try:
        losses = dict(read_header(task.checkpoint, FORMAT)["starts"])
        _, _, state = read_checkpoint(task.checkpoint, task.model, NO_AXES, EarlyStopping(), trained_only=True)
    except (StoreError, KeyError, TypeError):
        return {}, None
    return losses, state


def _tensor(values: Tensor, lr: float | None = None) -> AxisTensor:
    return AxisTensor(values.detach(), (len(values),), lr)
