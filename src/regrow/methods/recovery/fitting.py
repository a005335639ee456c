"""Training of a cut network, evaluated on held-out text; the parameters of the best evaluation are restored."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from math import fsum
from typing import Any, Protocol

from torch import Tensor, nn

from regrow.methods.recovery.task import RecoveryTask
from regrow.sources import Batch, device_of, drawn
from regrow.store.errors import StoreError
from regrow.training.checkpoint import read_checkpoint, write_checkpoint
from regrow.training.early_stopping import EarlyStopping, Tensors, restore_best, with_early_stopping
from regrow.training.fit import fit
from regrow.training.learner import Boundary, Context, Learner, Loss
from regrow.training.optimizers import OptimizerSettings
from regrow.training.schedule import NO_AXES, Schedule, source_phase
from regrow.training.state import TrainState

SECONDS = 120.0
"""The longest time between two checkpoints, in seconds; one is also written after every evaluation."""


class FittingSettings(Protocol):
    """The settings that :func:`fit_recovery` reads; each recovery that trains has them."""

    @property
    def lr(self) -> float:
        """The peak learning rate: it rises over the first tenth of the steps, then falls as a half cosine."""

    @property
    def passes(self) -> int:
        """The number of passes over the training batches."""

    @property
    def windows(self) -> int:
        """The number of batches per step, taken from the sources in turn."""

    @property
    def checks(self) -> int:
        """The number of evaluations on held-out batches."""

    @property
    def held_out(self) -> float:
        """The fraction of each source that is held out."""


def fit_recovery(
    task: RecoveryTask,
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[Batch], Tensor],
    settings: FittingSettings,
) -> dict[str, Any]:
    """Train parameters of a cut network in place, and restore the values that were best on held-out batches.

    Args:
        task: The networks and the text; training resumes from its checkpoint.
        parameters: Name in the network → the parameter to train.
        loss: A batch (on the network's device) → a scalar with a gradient, mean per position.
        settings: Learning rate, batches and evaluations.

    Returns:
        ``steps``, ``best`` (the step whose values were restored) and ``history`` (the held-out losses), as JSON data.

    Raises:
        ValueError: If there is no text to train on, or the loss stops being finite.
    """
    for name in ("passes", "windows", "checks"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is at least 1; got {getattr(settings, name)}")
    train, held = task.parts(settings.held_out)
    held = [batch.to(device_of(task.model)) for batch in held]
    steps = max(1, round(settings.passes * sum(map(len, train)) / settings.windows))
    ends = sorted({round(steps * (i + 1) / settings.checks) for i in range(settings.checks)} | {0, steps})
    epochs = [end - start for start, end in pairwise(ends)]
    phase = source_phase(
        "training", epochs, lambda step: [batch for _, batch in drawn(train, settings.windows, step, task.seed)]
    )
    schedule = Schedule(OptimizerSettings("adamw", settings.lr), "cosine", warm_up=0.1, clip=1.0, seed=task.seed)
    learner = with_early_stopping(
        Learner[Tensors]({}, loss=lambda state, context, step: Loss(loss(step.batch)), boundary=_keep_modes),
        lambda state, context: fsum(float(loss(batch)) for batch in held) / len(held),
    )
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def write(state: TrainState[EarlyStopping], context: Context) -> None:
        if task.checkpoint is not None:
            write_checkpoint(task.checkpoint, task.model, state, trained_only=True, header=task.header())

    fitted = fit(
        task.model,
        NO_AXES,
        [phase],
        learner,
        schedule,
        state=_read(task, learner.state),
        checkpoint=write,
        seconds=SECONDS,
        progress=task.progress,
    )
    state = fitted.state.learner
    restore_best(task.model, state)
    return {"steps": steps, "best": state.best_check.step, "history": [asdict(check) for check in state.history]}


def _read(task: RecoveryTask, learner: EarlyStopping) -> TrainState[EarlyStopping] | None:
    """Return the training state from the checkpoint; ``None`` if there is no checkpoint, or it cannot be used."""
    if task.checkpoint is None or not task.checkpoint.is_file():
        return None
    try:
        return read_checkpoint(task.checkpoint, task.model, NO_AXES, learner, trained_only=True)[2]
    except StoreError:
        return None


def _keep_modes(state: Tensors, context: Context, boundary: Boundary) -> Tensors:
    return state
