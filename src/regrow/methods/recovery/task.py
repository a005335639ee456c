"""The input of a recovery: the networks before and after a cut, text to train on, and a file for its progress."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.objectives import Objective, choose_objective
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source
from regrow.distributed.parallel import ALONE, Parallel
from regrow.methods.recovery.streamed import StreamedPair
from regrow.store import schemas
from regrow.store.convert import convert
from regrow.store.errors import StoreError
from regrow.store.tensors import read_tensors, write_tensors

FORMAT = "regrow-recovery/1"


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
        checkpoint: The file from which an interrupted call resumes; ``None``: it starts again.
        header: Returns JSON data for the header of that file.
        progress: Called with (steps done, steps in all, what is being done).
        objective: What the network is trained for; ``None``: what fits the labels.
        parallel: The processes that train together; all of them have the same task, and rank 0 writes the file.
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
    streamed: StreamedPair | None = None

    def loss_of(self, output: object, batch: Batch) -> Tensor:
        """Return the loss of a batch by its labels, a scalar.

        Args:
            output: What the network returned for the batch.
            batch: The batch.
        """
        objective = self.objective or choose_objective(None, batch)
        return objective.compute_loss(output, batch)

    def parts(self, share: float) -> tuple[list[list[Batch]], list[Batch]]:
        """Return the training batches of each source, and the held-out batches of all sources; no batch is both.

        Args:
            share: The fraction of each source that is held out, above 0 and below 1.

        Raises:
            ValueError: If there is no source, one has a single batch, or ``share`` is out of range.
        """
        if not self.sources:
            raise ValueError("recovery learns from text or images; give at least one source, like --source news")
        if few := next((source for source in self.sources if len(source) < 2), None):
            raise ValueError(
                f"source {few.name!r} has {len(few)} batches; one is held out, so give at least two (more tokens)"
            )
        if not 0 < share < 1:
            raise ValueError(f"held_out is the share that judges, above 0 and below 1; got {share:g}")
        halves = [source.held_out(share) for source in self.sources]
        return [fit for fit, _ in halves], [batch for _, held in halves for batch in held]

    def write(self, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, object]) -> None:
        """Write the progress of a closed-form recovery to the checkpoint, if the task has one.

        Args:
            step: The number of sources or layers that are done.
            tensors: The results so far, by name.
            values: Further state, as JSON data.

        Raises:
            StoreError: If the disk is full or the file cannot be written.
        """
        if self.checkpoint is not None:
            write_tensors(self.checkpoint, tensors, {**self.header(), "step": step, "values": dict(values)}, FORMAT)

    def read(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Return the step, tensors and values of the checkpoint; ``None`` if there is none, or it cannot be used."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return None
        try:
            header, tensors = read_tensors(self.checkpoint, FORMAT)
            record = convert(header, schemas.RecoveryHeader)
        except (StoreError, ValueError):
            return None
        return record.step, tensors, record.values


Recovery = Callable[[RecoveryTask], dict[str, object]]
"""Changes a task's network in place, and returns a summary as JSON data."""


@contextmanager
def precise(model: nn.Module) -> Iterator[None]:
    """Convert a half-precision network to float32 inside the ``with`` block; its own precision returns after it.

    Args:
        model: The network; changed in place.
    """
    half = (torch.float16, torch.bfloat16)
    parameters = [(p, p.dtype) for p in model.parameters() if p.dtype in half]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dtype in half
    ]
    for parameter, _ in parameters:
        parameter.data = parameter.data.float()
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.float()
    try:
        yield
    finally:
        for parameter, dtype in parameters:
            parameter.data = parameter.data.to(dtype)
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
