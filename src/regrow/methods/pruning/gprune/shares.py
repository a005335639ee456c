"""Stage 4 of GPrune: learn the pruning ratio of each module under the exact budget."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.allocation.ranked import rank, removal_ratios
from regrow.core.axes.axis import AxisTensor
from regrow.core.sources import Batch, device_of, draw_batches, labelled_logits, logits_in
from regrow.methods.pruning.gprune.modules import Masks
from regrow.methods.pruning.pruner import PruningTask
from regrow.store.errors import StoreError
from regrow.store.tensors import read_header
from regrow.surgery.gate import gate_inputs, make_gates
from regrow.training.fit import FitOptions, fit
from regrow.training.hooks import EarlyStopping, Tensors, with_early_stopping
from regrow.training.learner import Learner, Loss
from regrow.training.schedule import NO_AXES, Schedule, source_phase
from regrow.training.state import FORMAT, TrainState, read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from regrow.methods.pruning.gprune import Settings

SECONDS = 120.0  # the longest time between two checkpoints, in seconds; one is also written after every evaluation


@dataclass(frozen=True)
class Window:
    """A batch of text, and the number of the ranking of the units under which the network is masked on it."""

    batch: Batch
    view: int

    def to(self, device: torch.device) -> "Window":
        """Return the window itself: the comparison moves batches, since it caches predictions by batch."""
        return self


@dataclass(frozen=True, eq=False)
class ModuleShares:
    """The pruning ratio of each module as a function of trained logits, and the loss at these ratios.

    The loss is KL(dense ‖ masked) in nats per position.
    """

    settings: "Settings"
    task: PruningTask
    masks: Masks
    costs: Tensor  # the cost of all units of each module, [views, modules]
    removed: float  # the cost that must be removed
    homes: Tensor  # the number of the ranking space of each module, [modules] int64
    # ``id`` of a batch → the batch, the dense network's probabilities, and their mean entropy in nats.
    cache: dict[int, tuple[Batch, Tensor, float]] = field(default_factory=dict, repr=False)

    def tensors(self, share: Tensor) -> Tensors:
        """Return the trained tensors that give the pruning ratios ``share``.

        There is one logit per module, and one more for what the modules of a ranking space have in common.
        """
        logits, lr = torch.logit((share / self.settings.most).clamp(0.02, 0.98)), self.settings.lr
        return {"logits": as_tensor(logits, lr), "shared": as_tensor(logits.new_zeros(int(self.homes.max()) + 1), lr)}

    def shares(self, tensors: Tensors, view: int = 0) -> Tensor:
        """Return the pruning ratio of each module, ``[modules]``, with a gradient to the trained tensors."""
        logits = tensors["logits"].values + tensors["shared"].values.index_select(0, self.homes)
        return removal_ratios(logits, self.costs[view], self.removed, most=self.settings.most)

    def compare(self, batch: Batch, gates: Mapping[str, Tensor], view: int) -> Tensor:
        """Return the loss of the masked network on a batch, as a scalar with a gradient to the gates."""
        here = batch.to(device_of(self.task.model))
        chances, entropy = self._dense(batch, here)
        fills = {name: fill[view] for name, fill in self.masks.fills.items()}
        with gate_inputs(self.task.model, self.task.axes, gates, fills):
            logits = logits_in(here.run(self.task.model))
        # KL(p ‖ q) = H(p, q) − H(p), and the first is one fused operation: half the time of ``kl_div`` on text.
        return F.cross_entropy(labelled_logits(logits, here.labels).float(), chances) - entropy

    @torch.no_grad()
    def _dense(self, batch: Batch, here: Batch) -> tuple[Tensor, float]:
        """Return the dense network's probabilities, ``[positions, classes]``, and their mean entropy in nats."""
        if id(batch) in self.cache:
            return self.cache[id(batch)][1:]
        logits = logits_in(here.run(self.task.model))
        chances = labelled_logits(logits, here.labels).float().softmax(-1)
        entropy = float(torch.special.entr(chances).sum(-1).mean())
        if sum(row[1].nbytes for row in self.cache.values()) + chances.nbytes <= self.settings.memory * 2**30:
            self.cache[id(batch)] = (batch, chances, entropy)
        return chances, entropy

    def held_out_loss(self, share: Tensor) -> float:
        """Return the loss on held-out windows, mean over sources, of the network cut exactly to the budget."""
        s, task = self.settings, self.task
        losses: list[float] = []
        for i, source in enumerate(task.evidence.data.values()):
            view, batches = i + 1, source.held_out(s.held_out)[1]
            kept = rank(task.axes, self.masks.margins(share, view), task.budget)
            gates = make_gates(task.axes, {key: kept[key] for key in self.masks.places})
            with torch.no_grad():
                each = [self.compare(batch, gates, view) for batch in batches]
            losses.append(float(torch.stack(each).mean()))
        return sum(losses) / len(losses)

    def windows(self, step: int) -> list[Window]:
        """Return the windows of text that a training step uses, each with the ranking made without its source."""
        s = self.settings
        sources = [source.held_out(s.held_out)[0] for source in self.task.evidence.data.values()]
        return [Window(batch, i + 1) for i, batch in draw_batches(sources, s.windows, step, s.seed)]

    def _loss(self, tensors: Tensors, window: Window) -> Loss:
        gates = self.masks.gates(self.shares(tensors, window.view), window.view)
        return Loss(self.compare(window.batch, gates, window.view))

    def learn(self, state: TrainState[EarlyStopping], starts: Mapping[str, float]) -> TrainState[EarlyStopping]:
        """Train the logits; the network's own parameters stay as they are."""
        s, task = self.settings, self.task
        every = min(s.every, s.steps)
        epochs = [every] * (s.steps // every) + [s.steps % every] * bool(s.steps % every)
        learner = with_early_stopping(
            Learner[Tensors](
                state.learner.tensors,
                loss=lambda tensors, context, step: self._loss(tensors, step.batch),
                boundary=lambda tensors, context, boundary: tensors,
                scheduled=True,
            ),
            evaluate=lambda tensors, context: self.held_out_loss(self.shares(tensors)),
            snapshot=lambda tensors, context: {"share": as_tensor(self.shares(tensors))},
        )

        def write(now: TrainState[EarlyStopping]) -> None:
            if task.run.checkpoint is not None:
                header = {**task.run.header(), "starts": dict(starts)}
                write_checkpoint(task.run.checkpoint, task.model, now, trained_only=True, header=header)

        if not (state.epoch or state.step or state.number):
            write(state)
        return fit(
            task.model,
            task.axes,
            [source_phase("learning", epochs, self.windows)],
            learner,
            Schedule("adamw", s.lr, decay="cosine", seed=s.seed),
            state=state,
            options=FitOptions(checkpoint=lambda now, context: write(now), seconds=SECONDS, progress=task.run.progress),
        ).state


def read_learning(task: PruningTask) -> tuple[dict[str, float], TrainState[EarlyStopping] | None]:
    """Return the losses of the starts and the training state from the checkpoint; ``({}, None)`` if there is none."""
    path = task.run.checkpoint
    if path is None or not path.is_file():
        return {}, None
    try:
        losses = dict(read_header(path, FORMAT)["starts"])
        _, _, state = read_checkpoint(path, task.model, NO_AXES, EarlyStopping(), trained_only=True)
    except (StoreError, KeyError, TypeError):
        return {}, None
    return losses, state


def as_tensor(values: Tensor, lr: float | None = None) -> AxisTensor:
    """Return a tensor of a learner's state, trained at the learning rate ``lr`` if there is one."""
    return AxisTensor(values.detach(), (len(values),), lr)
