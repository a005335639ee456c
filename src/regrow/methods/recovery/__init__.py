"""Recovery of what pruning lost: its input (the networks before and after a cut, text, a file), and its training."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import fsum
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError
from regrow.core.objectives import Objective, choose_objective
from regrow.core.plan import Plan
from regrow.core.process_memory import keep_memory
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source, device_of, draw_batches
from regrow.distributed.parallel import ALONE, Parallel, everywhere
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.tensors import read_header, read_tensors, write_tensors
from regrow.streaming.network import StreamedNetwork
from regrow.training.fit import FitOptions, fit
from regrow.training.hooks import AxisTensors, EarlyStopping, restore_best, with_early_stopping
from regrow.training.learner import Context, Learner, Loss
from regrow.training.schedule import NO_AXES, Schedule, source_phase
from regrow.training.state import TrainState, read_checkpoint, write_checkpoint

FORMAT = "regrow-changed/1"
FIELDS = {"weight", "ridge"}  # what a resumed refit reads of the record of a layer


class ChangedTensors:
    """Name → tensor that a recovery has changed, in files of a folder, one per step; each look-up reads a file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, ""  # the folder is made when the first file is written
        self.records: list[dict[str, Any]] = []  # one per step
        self.places: dict[str, Path] = {}  # name of a tensor → the file of its step

    def open(self, key: str) -> None:
        """Take over the steps that an interrupted recovery with this key left; delete other and damaged files."""
        self.key, self.records, self.places = key, [], {}
        for i, path in enumerate(sorted(self.folder.glob("*.safetensors"))):
            try:
                header = read_header(path, FORMAT)
            except StoreError:
                header = {}
            names, record = header.get("names"), header.get("record")
            expected = header.get("key") == key and path == self._step_path(i) and len(self.records) == i
            if expected and isinstance(names, list) and isinstance(record, dict) and record.keys() >= FIELDS:
                self._add(path, names, record)
            else:
                path.unlink()

    def write(self, tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
        """Write the tensors that the next step has changed, and its record, which is JSON data."""
        path = self._step_path(len(self.records))
        with explain_os_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"key": self.key, "record": dict(record)}, FORMAT)
        self._add(path, [*tensors], dict(record))

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> Tensor:
        """Return the new value of a tensor, read from its file."""
        _, tensors = read_tensors(self.places[name], FORMAT)
        return tensors[name]

    def _step_path(self, step: int) -> Path:
        """Return the path of the file of a step, numbered from 0."""
        return self.folder / f"{step:06}.safetensors"

    def _add(self, path: Path, names: list[str], record: dict[str, Any]) -> None:
        """Note the next step: its file, the names of the tensors in it, and its record."""
        self.records.append(record)
        self.places |= dict.fromkeys(names, path)


@dataclass(frozen=True, eq=False)
class StreamedPair:
    """The two networks of a recovery, each with one block in memory at a time."""

    dense: StreamedNetwork  # the network before the cut
    model: StreamedNetwork  # the network after the cut, as it was before the recovery
    changed: ChangedTensors  # what the recovery has made of its tensors


@dataclass(frozen=True)
class RecoveryTask:
    """A cut network to recover, with the dense network, the cut, and the data to learn from.

    Args:
        model: The network after the cut; it is changed in place.
        dense: The network before the cut.
        axes: The axes of the network before the cut.
        plan: The plan of the cut.
        sources: Text or images; the last part of each source is held out for evaluation.
        seed: Seed of all random choices.
        checkpoint: The file from which an interrupted call resumes (or, without its suffix, the folder); ``None``: it
            starts again.
        header: Returns JSON data for the header of that file.
        progress: Called with (steps done, steps in all, what is being done).
        objective: What the network is trained for; ``None``: what fits the labels.
        parallel: The processes that train together; all of them have the same task, and rank 0 writes the file.
        precision: Of forward passes, ``"float32"`` (that of the weights) or ``"bfloat16"``.
        streamed: The two networks one block at a time, where they are larger than memory: ``model`` and ``dense`` have
            no numbers then, and ``model`` is not changed, but for biases that it gets.
    """

    model: nn.Module
    dense: nn.Module
    axes: AxisGraph
    plan: Plan
    sources: Sequence[Source]
    seed: int = 0
    checkpoint: Path | None = None
    header: Callable[[], Mapping[str, object]] = dict
    progress: Progress = silent
    objective: Objective | None = None
    parallel: Parallel = ALONE
    precision: str = "float32"
    streamed: StreamedPair | None = None

    def compute_loss(self, output: object, batch: Batch) -> Tensor:
        """Return the loss of a network's output on a batch, by its labels, a scalar."""
        objective = self.objective or choose_objective(None, batch)
        return objective.compute_loss(output, batch)

    def split_sources(self, share: float) -> tuple[list[list[Batch]], list[Batch]]:
        """Return (the training batches of each source, the held-out batches of all); ``share``: the fraction held out.

        Raise InputError as :func:`check_divisible` does.
        """
        check_divisible(self.sources)
        halves = [source.held_out(share) for source in self.sources]
        return [fit for fit, _ in halves], [batch for _, held in halves for batch in held]


def check_divisible(sources: Sequence[Source]) -> None:
    """Raise InputError without a source, or if one has a single batch, of which no part can be held out."""
    if not sources:
        raise InputError("recovery learns from text or images; give at least one source, like --source news")
    if few := next((source for source in sources if len(source) < 2), None):
        raise InputError(
            f"source {few.name!r} has {len(few)} batches; one is held out, so give at least two (more tokens)"
        )


# Changes a task's network in place, and returns a summary as JSON data.
Recovery = Callable[[RecoveryTask], dict[str, object]]


SECONDS = 120.0  # the longest time between two checkpoints, in seconds; one is also written after every evaluation


def fit_recovery(
    task: RecoveryTask, parameters: Mapping[str, nn.Parameter], loss: Callable[[RecoveryTask, Batch], Tensor], s: Any
) -> dict[str, Any]:
    """Train parameters of a cut network in place, and restore the values that were best on held-out batches.

    ``parameters``: those to train, by name; ``loss``: (task, batch) → a scalar. ``s`` has ``lr``, ``passes``,
    ``windows``, ``checks`` and ``held_out``, as in :mod:`.distil`. Return the number of steps, the best step and the
    history of evaluations. ``s.lr`` is the peak learning rate: it rises over the first tenth of the steps, then falls
    as a half cosine. ``requires_grad`` is set.
    """
    train, held = task.split_sources(s.held_out)
    held = [batch.to(device_of(task.model)) for batch in held]
    steps = max(1, round(s.passes * sum(map(len, train)) / s.windows))
    # An epoch ends where the network is evaluated.
    ends = sorted({round(steps * (i + 1) / s.checks) for i in range(s.checks)} | {0, steps})
    epochs = [end - start for start, end in pairwise(ends)]
    phase = source_phase(
        "training", epochs, lambda step: [batch for _, batch in draw_batches(train, s.windows, step, task.seed)]
    )
    schedule = Schedule("adamw", s.lr, decay="cosine", warm_up=0.1, clip=1.0, seed=task.seed)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    learner = with_early_stopping(
        Learner[AxisTensors](
            {},
            loss=lambda state, context, step: Loss(loss(task, step.batch)),
            boundary=lambda state, context, boundary: state,
        ),
        lambda state, context: fsum(task.parallel.values(lambda batch: float(loss(task, batch)), held)) / len(held),
    )

    def write(state: TrainState[EarlyStopping], context: Context) -> None:
        if task.checkpoint is not None and task.parallel.ranks.leads:
            write_checkpoint(task.checkpoint, task.model, state, trained_only=True, header=task.header())

    options = FitOptions(checkpoint=write, seconds=SECONDS, progress=task.progress, parallel=task.parallel)
    with keep_memory():
        fitted = fit(task.model, NO_AXES, [phase], learner, schedule, state=_read_state(task), options=options)
    result = fitted.state.learner
    restore_best(task.model, result)
    return {"steps": steps, "best": result.best_check.step, "history": [asdict(check) for check in result.history]}


def _read_state(task: RecoveryTask) -> TrainState[EarlyStopping] | None:
    """Return the training state from the checkpoint, whose values the network gets; ``None`` if there is no usable one.

    Raise StoreError if only some of the processes can read it.
    """
    state, ranks = None, task.parallel.ranks
    if task.checkpoint is not None and task.checkpoint.is_file():
        with suppress(StoreError):
            _, _, state = read_checkpoint(task.checkpoint, task.model, NO_AXES, EarlyStopping(), trained_only=True)
    if not (everywhere(ranks, state is not None) or everywhere(ranks, state is None)):
        raise StoreError(
            f"{task.checkpoint} cannot be read by all processes; make room in their folders for temporary files "
            "(TMPDIR), and give the same command again"
        )
    return state
