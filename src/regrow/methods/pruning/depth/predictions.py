"""Divergences of a network without some modules from the dense network, and their record in a checkpoint."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, isfinite

import torch
from torch import Tensor, nn

from regrow.core.axes.operations import Branch
from regrow.core.sources import Batch, Source, device_of, labelled_logits, logits_in
from regrow.methods.pruning.pruner import PruningTask
from regrow.store.errors import StoreError
from regrow.store.tensors import read_header, write_tensors
from regrow.tracing.branches import insert_placeholders, set_modules
from regrow.training.state import FORMAT

# The number of most probable classes of which the dense network's predictions are kept; the others are one class.
CLASSES = 128
SECONDS = 30.0  # the longest time between two checkpoints, in seconds


@dataclass(frozen=True)
class Predictions:
    """The dense network's ``CLASSES`` most probable classes per position; all others together are one more class."""

    classes: Tensor  # [positions, k] int64
    probabilities: Tensor  # those of these classes, [positions, k]

    @classmethod
    def from_logits(cls, logits: Tensor) -> "Predictions":
        """Return the predictions of a network from its logits ``[positions, classes]``."""
        probabilities, classes = logits.float().softmax(-1).topk(min(CLASSES, logits.shape[-1]))
        return cls(classes, probabilities)

    def divergence(self, logits: Tensor) -> float:
        """Return KL(dense ‖ ``logits``) in nats, mean over positions, with the others as one class: a lower bound."""
        logits = logits.float()
        log = logits.gather(-1, self.classes) - logits.logsumexp(-1, keepdim=True)
        loss = (self.probabilities * (self.probabilities.clamp_min(1e-30).log() - log)).sum(-1)
        if self.classes.shape[-1] < logits.shape[-1]:
            dense_rest = (1 - self.probabilities.sum(-1)).clamp_min(1e-6)
            rest = (1 - log.exp().sum(-1)).clamp_min(1e-6)
            loss = loss + dense_rest * (dense_rest / rest).log()
        return float(loss.mean())


ReferenceBatch = tuple[Batch, Predictions]  # a batch, and what the dense network predicts on it


@torch.no_grad()
def compute_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits at the labelled positions of a batch, ``[positions, classes]``; modules keep their mode."""
    moved = batch.to(device_of(model))
    return labelled_logits(logits_in(moved.run(model)), moved.labels)


def measure_divergence(model: nn.Module, batches: Sequence[ReferenceBatch]) -> float:
    """Return KL(dense ‖ network) of the predictions, mean over all labels, in nats."""
    total = sum(batch.size * dense.divergence(compute_logits(model, batch)) for batch, dense in batches)
    return total / sum(batch.size for batch, _ in batches)


@contextmanager
def drop_modules(model: nn.Module, dropped: Iterable[Branch]) -> Iterator[None]:
    """Context manager in which a network skips the modules of ``dropped``; placeholders stand in for them meanwhile."""
    placeholders = {path: module for branch in dropped for path, module in branch.placeholders.items()}
    modules = insert_placeholders(model, placeholders)
    try:
        yield
    finally:
        set_modules(model, modules)


@dataclass(eq=False)
class DivergenceJournal:
    """Measured divergences by key, kept in the task's checkpoint file: an interrupted search reads them again."""

    task: PruningTask
    values: dict[str, float] = field(default_factory=dict)  # key, which names the measurement → divergence in nats
    last_write: float = field(default_factory=time.monotonic)  # in seconds

    def __post_init__(self) -> None:
        path = self.task.context.checkpoint
        if path is not None and path.is_file():
            try:
                divergences = read_header(path, FORMAT)["divergences"]
                self.values = {str(key): float(value) for key, value in divergences.items()}
            except (StoreError, KeyError, TypeError, ValueError, AttributeError):
                self.values = {}

    def get_or_measure(self, key: str, measure: Callable[[], float]) -> float:
        """Return the divergence recorded under ``key``, or else measure and record it; infinite if it is NaN."""
        if key not in self.values:
            try:
                value = measure()
            except KeyboardInterrupt:
                self.write()
                raise
            self.values[key] = value if isfinite(value) else inf
            if time.monotonic() - self.last_write > SECONDS:
                self.write()
        return self.values[key]

    def write(self) -> None:
        """Write the divergences to the checkpoint file, if the task has one."""
        context = self.task.context
        if context.checkpoint is not None:
            write_tensors(context.checkpoint, {}, {**context.checkpoint_header(), "divergences": self.values}, FORMAT)
        self.last_write = time.monotonic()


def first_batches(source: Source, tokens: int) -> tuple[list[Batch], list[Batch]]:
    """Return (the first batches, of at most ``tokens`` labels together; the next ones, of at most twice as many).

    Each part has at least one batch, as far as there are any; the source is not read further than that.

    >>> first, others = first_batches(Source("news", [Batch((torch.zeros(3, 1),)) for _ in range(9)]), 7)
    >>> len(first), len(others)
    (2, 4)
    """
    first: list[Batch] = []
    others: list[Batch] = []
    part, room = first, tokens
    for batch in source:
        if part and batch.size > room:
            if part is others:
                break
            part, room = others, 2 * tokens
        part.append(batch)
        room -= batch.size
    return first, others
