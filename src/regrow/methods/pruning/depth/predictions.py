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
    """The most probable classes of the dense network at every position; the others together are one more class."""

    classes: Tensor  # [positions, k] int64
    chances: Tensor  # their probabilities, [positions, k]

    @classmethod
    def of(cls, logits: Tensor) -> "Predictions":
        """Return the predictions that logits are."""
        chances, classes = logits.float().softmax(-1).topk(min(CLASSES, logits.shape[-1]))
        return cls(classes, chances)

    def divergence(self, logits: Tensor) -> float:
        """Return KL(these ‖ others) in nats per position, which is at most that over all classes."""
        logits = logits.float()
        log = logits.gather(-1, self.classes) - logits.logsumexp(-1, keepdim=True)
        loss = (self.chances * (self.chances.clamp_min(1e-30).log() - log)).sum(-1)
        if self.classes.shape[-1] < logits.shape[-1]:
            mine, theirs = ((1 - chances.sum(-1)).clamp_min(1e-6) for chances in (self.chances, log.exp()))
            loss = loss + mine * (mine / theirs).log()
        return float(loss.mean())


Window = tuple[Batch, Predictions]  # a batch, and what the dense network predicts on it


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of a network at the labelled positions of a batch."""
    here = batch.to(device_of(model))
    return labelled_logits(logits_in(here.run(model)), here.labels)


def divergence(model: nn.Module, windows: Sequence[Window]) -> float:
    """Return the divergence of a network's predictions from the dense ones, in nats per label."""
    total = sum(batch.size * dense.divergence(predict(model, batch)) for batch, dense in windows)
    return total / sum(batch.size for batch, _ in windows)


@contextmanager
def without(model: nn.Module, dropped: Iterable[Branch]) -> Iterator[None]:
    """Context manager in which placeholders are in the place of modules."""
    placeholders = {path: module for branch in dropped for path, module in branch.placeholders.items()}
    modules = insert_placeholders(model, placeholders)
    try:
        yield
    finally:
        set_modules(model, modules)


@dataclass(eq=False)
class DivergenceJournal:
    """Divergences by what was dropped, in the checkpoint: an interrupted search reads them again."""

    task: PruningTask
    values: dict[str, float] = field(default_factory=dict)
    written: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        path = self.task.context.checkpoint
        if path is not None and path.is_file():
            try:
                divergences = read_header(path, FORMAT)["divergences"]
                self.values = {str(key): float(value) for key, value in divergences.items()}
            except (StoreError, KeyError, TypeError, ValueError, AttributeError):
                self.values = {}

    def take(self, key: str, measure: Callable[[], float]) -> float:
        """Return the recorded divergence, or else a new one; infinite if it is NaN."""
        if key not in self.values:
            try:
                value = measure()
            except KeyboardInterrupt:
                self.write()
                raise
            self.values[key] = value if isfinite(value) else inf
            if time.monotonic() - self.written > SECONDS:
                self.write()
        return self.values[key]

    def write(self) -> None:
        """Write the divergences to the checkpoint."""
        run = self.task.context
        if run.checkpoint is not None:
            write_tensors(run.checkpoint, {}, {**run.header(), "divergences": self.values}, FORMAT)
        self.written = time.monotonic()


def first_batches(source: Source, tokens: int) -> tuple[list[Batch], list[Batch]]:
    """Return the first batches of a source, with at most some tokens, and the next ones, with at most twice as many.

    Each part has at least one batch, as far as there are any; the source is not read further than that.

    >>> first, others = first_batches(Source("news", [Batch((torch.zeros(3, 1),)) for _ in range(9)]), 7)
    >>> len(first), len(others)
    (2, 4)
    """
    first: list[Batch] = []
    others: list[Batch] = []
    part, left = first, tokens
    for batch in source:
        if part and batch.size > left:
            if part is others:
                break
            part, left = others, 2 * tokens
        part.append(batch)
        left -= batch.size
    return first, others
