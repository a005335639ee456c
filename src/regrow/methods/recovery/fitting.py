"""Training of a cut network, evaluated on held-out text; the parameters of the best evaluation are restored."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from math import fsum
from typing import Any, Protocol

from torch import Tensor, nn

from regrow.core.sources import Batch, device_of, drawn
from regrow.distributed.parallel import everywhere
from regrow.methods.recovery.task import RecoveryTask
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
    loss: Callable[[RecoveryTask, Batch], Tensor],
    settings: FittingSettings,
) -> dict[str, Any]:
    """Train parameters of a cut network in place, and restore the values that were best on held-out batches.

    Args:
        task: The networks and the text; training resumes from its checkpoint.
        parameters: Name in the network → the parameter to train.
        loss: (the task, whose networks may be sharded among several ranks; a batch on the network's device) → a scalar
            with a gradient, mean per position.
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
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with _shard(task, _read(task)) as (task, state):
        learner = with_early_stopping(
            Learner[Tensors]({}, loss=lambda state, context, step: Loss(loss(task, step.batch)), boundary=_keep_modes),
            lambda state, context: fsum(task.parallel.values(lambda batch: float(loss(task, batch)), held)) / len(held),
        )

        def write(state: TrainState[EarlyStopping], context: Context) -> None:
            leads = task.parallel.ranks.leads
            if task.checkpoint is not None and (leads or task.parallel.fsdp):
                more: dict[str, Any] = {"trained_only": True, "header": task.header(), "writes": leads}
                write_checkpoint(task.checkpoint, task.model, state, **more)

        more: dict[str, Any] = {"seconds": SECONDS, "progress": task.progress, "parallel": task.parallel}
        fitted = fit(task.model, NO_AXES, [phase], learner, schedule, state=state, checkpoint=write, **more)
        state = fitted.state.learner
        restore_best(task.model, state)
    return {"steps": steps, "best": state.best_check.step, "history": [asdict(check) for check in state.history]}


@contextmanager
def _shard(
    task: RecoveryTask, state: TrainState[EarlyStopping] | None
) -> Iterator[tuple[RecoveryTask, TrainState[EarlyStopping] | None]]:
    """Shard the networks and the training state among all ranks inside the ``with`` block, if the task asks for it."""
    if not task.parallel.fsdp:
        yield task, state
        return
    from regrow.distributed.fsdp import shard_like, sharded

    recording = task.axes.recording
    blocks = [block.path for block in recording.blocks if block.path] if recording else []
    with sharded([task.model, task.dense], blocks) as (model, dense):
        if state:
            own = dict(model.named_parameters())
            best = {
                name: replace(one, values=shard_like(one.values, own[name])) for name, one in state.learner.best.items()
            }
            moments = {
                name: {
                    what: shard_like(value, own[name]) if isinstance(value, Tensor) else value
                    for what, value in memory.items()
                }
                for name, memory in state.moments.items()
            }
            state = replace(state, learner=replace(state.learner, best=best), moments=moments)
        yield replace(task, model=model, dense=dense), state


def _read(task: RecoveryTask) -> TrainState[EarlyStopping] | None:
    """Return the training state from the checkpoint; ``None`` if there is no checkpoint, or it cannot be used.

    Raises:
        StoreError: If some ranks can read it, and others cannot.
    """
    state, ranks = _read_own(task), task.parallel.ranks
    if not (everywhere(ranks, state is not None) or everywhere(ranks, state is None)):
        raise StoreError(
            f"{task.checkpoint} cannot be read by all processes; make room in their folders for temporary files "
            "(TMPDIR), and give the same command again"
        )
    return state


def _read_own(task: RecoveryTask) -> TrainState[EarlyStopping] | None:
    if task.checkpoint is None or not task.checkpoint.is_file():
        return None
    try:
        return read_checkpoint(task.checkpoint, task.model, NO_AXES, EarlyStopping(), trained_only=True)[2]
    except StoreError:
        return None


def _keep_modes(state: Tensors, context: Context, boundary: Boundary) -> Tensors:
    return state
