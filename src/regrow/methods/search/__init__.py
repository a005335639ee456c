"""Architecture search: one file per paper, and here what all share: masks, hooks of the training loop, log rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from regrow.allocation.gates import GateMasks
from regrow.allocation.levels import GRANULARITIES
from regrow.core.amounts import format_short
from regrow.core.axes.axis import AxisTensor
from regrow.core.candidates import Staged, candidate_paths
from regrow.core.plan import Plan
from regrow.core.sources import device_of
from regrow.core.tasks import Examples
from regrow.data.vision import is_images, shift_and_flip
from regrow.evaluation.continual import mean_score
from regrow.methods.search.space import (
    Savings,
    SearchSpace,
    SearchState,
    build_layout,
    iterate_spans,
    measure_masked,
    measure_unmasked,
    scale_operations,
)
from regrow.surgery.gate import parametrize
from regrow.training.learner import Boundary, Context, Event, Learner, Loss, Replacements, Step, make_mask, task_loss

# Function that returns a context manager around the training of proposals
Around = Callable[[SearchState, Context], AbstractContextManager[None]]
Commit = tuple[Plan | None, SearchState]  # a plan (``None``: no change), and the state after it was made


class Search(ABC):
    """A search method with settings (a dataclass) and a space; subclasses override the hooks of :class:`Learner`."""

    needs_epochs = True  # whether the search has to be trained
    learns_masks = True  # whether importances and thresholds are trained; else masks only say what is there
    stage_share = 1.0  # the fraction of its operations that a part of the network is expected to have after its stage
    mask_bytes = 16  # bytes per weight that a step with masks needs beyond one without
    trains_thresholds = False  # whether masks pass gradients to thresholds
    second_share = 0.0  # as in Learner
    restores = False  # as in Learner

    def __init__(self, s: Any, space: SearchSpace) -> None:
        self.space = space
        self.settings: Mapping[str, Any] = asdict(s)
        self.around_trial: Around = lambda state, context: nullcontext()

    def check_epochs(self, epochs: int) -> None:
        """Raise ValueError if the search needs more than ``epochs``."""
        if epochs < 1 and self.needs_epochs:
            raise ValueError(f"{epochs} epochs: this method learns in epochs; take --epochs 1 or more")

    def note_epochs(self, epochs: int) -> str:
        """Return a line for the user where few ``epochs`` leave the search little to decide; empty: no such line."""
        return ""

    def check(self, context: Context) -> None:
        """Raise ValueError if the target cannot be reached, or the network cannot be searched."""
        self.check_epochs(context.epochs)
        self.space.check(context)

    @abstractmethod
    def finalize(self, state: SearchState, context: Context, target: float) -> Commit:
        """Return the next plan after the last epoch to meet ``target`` (a size), or ``None`` at last; and the state."""

    @cached_property
    def learner(self) -> Learner[SearchState]:
        """The method as a learner, whose hooks are the methods of these names."""
        return Learner(
            SearchState(),
            parametrize=self.parametrize,
            loss=self.loss,
            project=self.project,
            after_step=self.after_step,
            plan=self.plan,
            boundary=self.boundary,
            optimizer="adam",
            second_share=self.second_share,
            restores=self.restores,
        )

    def granularities(self, state: SearchState, context: Context) -> Sequence[str]:
        """Return the granularities whose masks are computed; masks of the others keep everything."""
        return self.space.granularities

    def masks(
        self, state: SearchState, context: Context, flat: Tensor | None = None, learning: bool = False
    ) -> GateMasks:
        """Return masks that keep what is at least as important as its threshold: σ(α), σ(κ), and |w| over its mean.

        ``flat``: all weights in one vector, ``[weights]``; ``None``: read from the network. ``learning``: whether masks
        have gradients.
        """
        layout, searched = state.layout, self.granularities(state, context)
        if flat is None and "weights" in searched:
            flat = layout.levels.flat(context.parameters())

        def values(tensor: AxisTensor, trained: bool = True) -> Tensor:
            return tensor.values if learning and trained else tensor.values.detach()

        ops, filters, weights = (values(thresholds, self.trains_thresholds) for thresholds in state.thresholds)
        kappa = [values(state.kappa[key]) for key in layout.levels.axes]
        masks = layout.masks(
            (values(state.alpha), ops) if "operations" in searched else None,
            (torch.cat(kappa), filters) if "filters" in searched and kappa else None,
            None if flat is None or "weights" not in searched else (flat, state.zero_mask, weights),
        )
        return masks if self.learns_masks else replace(masks, op_scale=masks.ops, filter_scale=masks.filters)

    def learning_rates(self, context: Context) -> tuple[float, float]:
        """Return the learning rates of importances (α, κ) and of thresholds; 0: not trained."""
        return 0.0, 0.0

    def trains(self, state: SearchState, context: Context) -> bool:
        """Whether importances and thresholds are trained in the present epoch."""
        return self.learns_masks

    def allowed_size(self, state: SearchState, context: Context, target: float) -> float:
        """Return the size that the trained part may have now, at the end ``target``; commits stop removing there."""
        return target

    def kept_fractions(self, state: SearchState, masks: GateMasks) -> dict[str, float]:
        """Return granularity → the fraction (0 to 1) that masks keep in the trained part, to log each epoch."""
        runs, weights = state.layout.runs, masks.weights
        return {
            "operations": float(masks.ops[runs].mean()) if bool(runs.any()) else 1.0,
            "filters": float(masks.filters.mean()) if state.layout.levels.filters else 1.0,
            "weights": 1.0 if weights is None else float(weights.mean()),
        }

    def parametrize(self, state: SearchState, context: Context) -> Replacements:
        """Hook ``parametrize``: parameters under masks; ``aux``: the masks, with gradients in epochs that train."""
        parameters, levels = context.parameters(), state.layout.levels
        with nullcontext() if context.training else torch.no_grad():  # weights get gradients without masks, too
            entrywise = levels.entrywise or "weights" in self.space.granularities
            flat = levels.flat(parameters) if entrywise else None
            masks = self.masks(state, context, flat, context.training and self.trains(state, context))
            values = levels.replace_weights(parameters, flat, masks.filter_scale, masks.over)
            return Replacements(scale_operations(context, state, values, masks.op_scale), masks)

    def loss(self, state: SearchState, context: Context, step: Step) -> Loss:
        """Hook ``loss``: the loss of a batch; with the setting ``augment``, of randomly shifted and mirrored images."""
        return Loss(self.compute_loss(context, step.batch))

    def project(self, state: SearchState, context: Context, step: Step) -> SearchState:
        """Hook ``project``: clip the norm of the network's gradients, in place, to the setting ``clip``."""
        clip = self.settings.get("clip")
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(context.parameters().values(), clip)
        return state

    def after_step(self, state: SearchState, context: Context, step: Step) -> SearchState:
        """Hook ``after_step``: return the state as it is."""
        return state

    def plan(self, state: SearchState, context: Context) -> Commit:
        """Hook ``plan``: here no plan before the last epoch is over, then those of :meth:`finalize`."""
        if context.epoch < context.epochs:
            return None, state
        return self.finalize(state, context, self.space.target)

    def boundary(self, state: SearchState, context: Context, boundary: Boundary) -> SearchState:
        """Hook ``boundary``: start, resume, log epochs and the result, and account for an applied plan."""
        match boundary.event:
            case Event.TASK_START:
                state = self._start(context)
                self.log_status(state, context)
            case Event.RESUME:
                state = self.update_layout(state, context)
                self.log_status(state, context)
            case Event.EPOCH_START:
                context.model.train()
            case Event.EPOCH_END:
                state = self._log_epoch(state, context)
            case Event.FINISH:
                self._log_result(state, context)
        return self._account_plan(state, context, boundary.plan) if boundary.plan else state

    def _start(self, context: Context) -> SearchState:
        """Return the initial state: importances and thresholds are 0, so that everything is kept."""
        operations = sum(map(len, candidate_paths(context.model).values())) + len(self.space.blocks)
        axes = tuple(axis.key for axis in context.axes.units())
        importance, threshold = self.learning_rates(context)

        def zeros(size: int, lr: float) -> AxisTensor:
            return AxisTensor(torch.zeros(size, device=device_of(context.model)), (size,), lr)

        state = SearchState(
            alpha=zeros(operations, importance),
            operation_thresholds=zeros(operations, threshold),
            filter_thresholds=zeros(len(axes), threshold),
            weight_thresholds=zeros(operations + 1, threshold),
            axes=axes,
            whole=measure_unmasked(self.space, axes, context),
        )
        return self.update_layout(state, context)

    def update_layout(self, state: SearchState, context: Context) -> SearchState:
        """Return the state for the network's present shape; let the network run up to the stage's last part, in place.

        κ and masks of what was removed with an operation are discarded; restored filters and weights get new ones.
        """
        part = self.space.part(state.stage)
        if self.space.ends:
            cast(Staged, context.model).active = part
        layout = build_layout(self.space, state.axes, context, part)
        kappa = {key: tensor for key, tensor in state.kappa.items() if key in context.axes.axes}
        for key, (_, size, _) in iterate_spans(layout):
            if key not in kappa:
                values = layout.alive.new_zeros(size, dtype=torch.float32)
                kappa[key] = AxisTensor(values, (key,), self.learning_rates(context)[0])
        zeros = {name: flags for name, flags in state.zeros.items() if name in context.axes.shapes}
        for name in layout.levels.weights:
            if name not in zeros:
                zeros[name] = make_mask(context, name)
        mask = torch.cat([zeros[name].values.reshape(-1) for name in layout.levels.weights])
        return replace(state, kappa=kappa, zeros=zeros, layout=layout, zero_mask=mask)

    def _account_plan(self, state: SearchState, context: Context, plan: Plan) -> SearchState:
        """Return the state after an applied plan: its new layout, and the savings of operations and filters so far."""
        before, now = state.whole, measure_unmasked(self.space, state.axes, context)
        if plan.back:  # operations come back, and filters with them
            operations = before - now
        else:
            operations, state = state.pending, replace(state, pending=0.0)
        filters = before - now - operations
        saved = Savings(state.saved.operations + operations, state.saved.filters + filters, state.saved.weights)
        return self.update_layout(replace(state, whole=now, saved=saved), context)

    def size(self, state: SearchState, context: Context) -> float:
        """Return the size of the trained part under its current masks, in the search's measure."""
        with torch.no_grad():
            return float(measure_masked(state, self.masks(state, context)))

    def compute_loss(self, context: Context, batch: Examples) -> Tensor:
        """Return the loss of the context's objective on a batch, a scalar; images may be augmented (``augment``)."""
        if self.settings.get("augment") and is_images(batch.inputs):
            batch = Examples(shift_and_flip(batch.inputs), batch.labels)
        return task_loss(None, context, Step(0, batch)).value

    def summary(self, state: SearchState) -> dict[str, float]:
        """Return name → value to log at the end, besides sizes and kept fractions; here none."""
        return {}

    def log_status(self, state: SearchState, context: Context) -> None:
        """Log the text beside the progress: stage, size, validation accuracy and kept fractions of the last epoch."""
        words = [context.task.name]
        if len(self.space.ends) > 1:
            words.append(f"stage {state.stage + 1}")
        for row in state.history:
            if row["stage"] == state.stage:
                limit = f" of {format_short(row['allowed'])}" if row["allowed"] else ""
                words += [f"{format_short(row['size'])}{limit} {self.space.measure}"]
                words += [f"validation {row['accuracy']:.2f}"]
                words += [f"{name} {row[name]:.0%}" for name in GRANULARITIES if name in self.space.granularities]
        context.log("status", text=", ".join(words))

    def _log_epoch(self, state: SearchState, context: Context) -> SearchState:
        """Log validation score, current and allowed size, and kept fractions; return the state with this row."""
        masks = self.masks(state, context)
        with parametrize(context.model, self.parametrize(state, replace(context, eval_task=context.number)).values):
            accuracy = mean_score(context.model, context.task.test, context.objective)
        row: dict[str, int | float] = {"epoch": context.epoch + 1, "stage": state.stage, "accuracy": accuracy}
        with torch.no_grad():
            row["size"] = float(measure_masked(state, masks))
        row |= {"allowed": self.allowed_size(state, context, self.space.target), "mu": state.multiplier}
        row |= self.kept_fractions(state, masks)
        context.log("epoch", **row)
        state = replace(state, history=(row,))
        self.log_status(state, context)
        return state

    def _log_result(self, state: SearchState, context: Context) -> None:
        """Log what each granularity saved and the size that remains, as a row ``levels``."""
        context.log(
            "levels",
            saved=asdict(state.saved),
            kept=self.kept_fractions(state, self.masks(state, context)),
            measure=str(self.space.measure),
            asked=self.space.target,
            size=self.size(state, context),
            **self.summary(state),
        )
