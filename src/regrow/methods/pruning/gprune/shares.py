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
from regrow.training.hooks import AxisTensors, EarlyStopping, with_early_stopping
from regrow.training.learner import Learner, Loss
from regrow.training.schedule import NO_AXES, Schedule, source_phase
from regrow.training.state import FORMAT, TrainState, read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from regrow.methods.pruning.gprune import Settings

SECONDS = 120.0  # the longest time between two checkpoints, in seconds; one is also written after every evaluation


@dataclass(frozen=True)
class ViewBatch:
    """A batch of text, and the index of the view whose ranking masks the network on it (:class:`.modules.Masks`)."""

    batch: Batch
    view: int

    def to(self, device: torch.device) -> "ViewBatch":
        """Return the batch unmoved: :meth:`ModuleShares.compare` moves it, since its cache has the ``id`` as key."""
        return self


@dataclass(frozen=True, eq=False)
class ModuleShares:
    """The pruning ratio of each module (the fraction that is cut) from trained logits, and the loss at these ratios.

    The loss is KL(dense ‖ masked) in nats per position.
    """

    settings: "Settings"
    task: PruningTask
    masks: Masks
    costs: Tensor  # of all units of each module, in the budget's measure, [views, modules]
    removed: float  # the cost that must be removed, in the same measure
    space_indices: Tensor  # the index of the ranking space of each module, [modules] int64
    # ``id`` of a batch → the batch (so that the id stays its own), the dense network's probabilities, and their mean
    # entropy in nats.
    cache: dict[int, tuple[Batch, Tensor, float]] = field(default_factory=dict, repr=False)

    def initial_tensors(self, ratios: Tensor) -> AxisTensors:
        """Return tensors to train from which :meth:`shares` computes the pruning ratios ``ratios``, ``[modules]``.

        There is one logit per module, and one more for what the modules of a ranking space have in common. Ratios
        are clamped to 2 and 98 % of the setting ``most``.
        """
        logits, lr = torch.logit((ratios / self.settings.most).clamp(0.02, 0.98)), self.settings.lr
        shared = logits.new_zeros(int(self.space_indices.max()) + 1)
        return {"logits": as_axis_tensor(logits, lr), "shared": as_axis_tensor(shared, lr)}

    def shares(self, tensors: AxisTensors, view: int = 0) -> Tensor:
        """Return the pruning ratios, ``[modules]``, that meet the exact budget in a view, with a gradient."""
        logits = tensors["logits"].values + tensors["shared"].values.index_select(0, self.space_indices)
        return removal_ratios(logits, self.costs[view], self.removed, most=self.settings.most)

    def compare(self, batch: Batch, gates: Mapping[str, Tensor], view: int) -> Tensor:
        """Return KL(dense ‖ masked) on a batch in nats per position, a scalar with a gradient to the gates.

        ``gates``: axis key → 1 for units that stay, 0 for those that are cut; ``view``: whose means replace cut units.
        """
        moved = batch.to(device_of(self.task.model))
        probabilities, entropy = self._predict_dense(batch, moved)
        fills = {name: fill[view] for name, fill in self.masks.fills.items()}
        with gate_inputs(self.task.model, self.task.axes, gates, fills):
            logits = logits_in(moved.run(self.task.model))
        # KL(p ‖ q) = H(p, q) − H(p), and the first is one fused operation: half the time of ``kl_div`` on text.
        return F.cross_entropy(labelled_logits(logits, moved.labels).float(), probabilities) - entropy

    @torch.no_grad()
    def _predict_dense(self, batch: Batch, moved: Batch) -> tuple[Tensor, float]:
        """Return the dense network's probabilities, ``[positions, classes]``, and their mean entropy in nats.

        ``batch`` is the key of the cache, and ``moved`` is on the network's device.
        """
        if id(batch) in self.cache:
            return self.cache[id(batch)][1:]
        logits = logits_in(moved.run(self.task.model))
        probabilities = labelled_logits(logits, moved.labels).float().softmax(-1)
        entropy = float(torch.special.entr(probabilities).sum(-1).mean())
        if sum(row[1].nbytes for row in self.cache.values()) + probabilities.nbytes <= self.settings.memory * 2**30:
            self.cache[id(batch)] = (batch, probabilities, entropy)
        return probabilities, entropy

    def held_out_loss(self, ratios: Tensor) -> float:
        """Return the loss on held-out windows at pruning ratios ``[modules]``, mean over sources, cut to the budget."""
        s, task = self.settings, self.task
        losses: list[float] = []
        for view, source in enumerate(task.evidence.data.values(), start=1):  # view 0 is that of all sources
            _, batches = source.held_out(s.held_out)
            kept = rank(task.axes, self.masks.margins(ratios, view), task.budget)
            gates = make_gates(task.axes, {key: kept[key] for key in self.masks.ranks})
            with torch.no_grad():
                batch_losses = [self.compare(batch, gates, view) for batch in batches]
            losses.append(float(torch.stack(batch_losses).mean()))
        return sum(losses) / len(losses)

    def draw_batches(self, step: int) -> list[ViewBatch]:
        """Return the batches of training step ``step``: ``windows`` of them, from the sources' training parts in turn.

        Each comes with the view (scores and ranks without one source; the first: of all) that leaves out its source.
        """
        s = self.settings
        sources = [source.held_out(s.held_out)[0] for source in self.task.evidence.data.values()]
        return [ViewBatch(batch, i + 1) for i, batch in draw_batches(sources, s.windows, step, s.seed)]

    def _compute_loss(self, tensors: AxisTensors, step_batch: ViewBatch) -> Loss:
        """Return the loss of a batch under its view's masks, with a gradient to the trained tensors."""
        gates = self.masks.gates(self.shares(tensors, step_batch.view), step_batch.view)
        return Loss(self.compare(step_batch.batch, gates, step_batch.view))

    def learn(self, state: TrainState[EarlyStopping], starts: Mapping[str, float]) -> TrainState[EarlyStopping]:
        """Train the logits from a state on, and return the last one; the network's own parameters are unchanged.

        ``starts``: name of a start → its held-out loss, for the header of the checkpoint that is written.
        """
        s, task = self.settings, self.task
        every = min(s.every, s.steps)
        full, rest = divmod(s.steps, every)
        epochs = [every] * full + ([rest] if rest else [])  # an evaluation ends each
        learner = with_early_stopping(
            Learner[AxisTensors](
                state.learner.tensors,
                loss=lambda tensors, context, step: self._compute_loss(tensors, step.batch),
                boundary=lambda tensors, context, boundary: tensors,
                scheduled=True,
            ),
            evaluate=lambda tensors, context: self.held_out_loss(self.shares(tensors)),
            snapshot=lambda tensors, context: {"share": as_axis_tensor(self.shares(tensors))},
        )

        def write(current: TrainState[EarlyStopping]) -> None:
            if task.context.checkpoint is not None:
                header = {**task.context.checkpoint_header(), "starts": dict(starts)}
                write_checkpoint(task.context.checkpoint, task.model, current, trained_only=True, header=header)

        if not (state.epoch or state.step or state.number):
            write(state)
        return fit(
            task.model,
            task.axes,
            [source_phase("learning", epochs, self.draw_batches)],
            learner,
            Schedule("adamw", s.lr, decay="cosine", seed=s.seed),
            state=state,
            options=FitOptions(checkpoint=lambda now, _: write(now), seconds=SECONDS, progress=task.context.progress),
        ).state


def read_learning(task: PruningTask) -> tuple[dict[str, float], TrainState[EarlyStopping] | None]:
    """Return the starts' losses and the training state from the checkpoint; ``({}, None)`` if it cannot be read."""
    path = task.context.checkpoint
    if path is None or not path.is_file():
        return {}, None
    try:
        losses = dict(read_header(path, FORMAT)["starts"])
        _, _, state = read_checkpoint(path, task.model, NO_AXES, EarlyStopping(), trained_only=True)
    except (StoreError, KeyError, TypeError):
        return {}, None
    return losses, state


def as_axis_tensor(values: Tensor, lr: float | None = None) -> AxisTensor:
    """Return a vector as a tensor of a learner's state, along no axis; ``lr``: its learning rate, or none."""
    return AxisTensor(values.detach(), (len(values),), lr)
