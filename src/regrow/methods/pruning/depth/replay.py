"""Forward passes without some modules, which begin where the network differs, and divergences of their predictions."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.axes.operations import Branch, lies_in
from regrow.core.sources import Batch, Source, device_of, labelled_logits, logits_in
from regrow.methods.pruning.pruner import PruningTask
from regrow.store.errors import StoreError
from regrow.store.tensors import read_header, write_tensors
from regrow.tracing.branches import insert_placeholders, set_modules
from regrow.training.state import FORMAT

# The number of most probable classes of which the dense network's predictions are kept; the others are one class.
CLASSES = 128
SECONDS = 30.0  # the longest time between two checkpoints, in seconds

Outputs = tuple[Any, ...]  # the output of every block of a stack, in one forward pass


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


class Replay:
    """Forward passes of a network from some block on; whole ones if that does not give the same logits on a batch."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model = model
        self.stack = largest_stack(model)
        if not self._is_exact(batch):
            self.stack = None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that can be skipped, in the order in which they run; placeholders among them, too."""
        return () if self.stack is None else tuple(self.model.get_submodule(self.stack).children())

    @torch.no_grad()
    def run(self, batch: Batch, cached: Outputs = (), first: int = 0) -> Tensor:
        """Return the logits at labelled positions; blocks before ``first`` return what is cached."""
        here = batch.to(device_of(self.model))
        with _replaced(self.blocks[:first] if cached else (), cached):
            return labelled_logits(logits_in(here.run(self.model)), here.labels)

    def record(self, batch: Batch) -> tuple[Tensor, Outputs]:
        """Return the logits at labelled positions, and the outputs of all blocks."""
        outputs: list[Any] = []
        hooks = [block.register_forward_hook(lambda _, args, output: outputs.append(output)) for block in self.blocks]
        try:
            return self.run(batch), tuple(outputs)
        finally:
            for hook in hooks:
                hook.remove()

    def record_all(self, windows: Sequence[Window], memory: int) -> list[Outputs]:
        """Return the outputs of the blocks on each window, as far as ``memory`` (bytes) allows; empty beyond that."""
        result: list[Outputs] = []
        for batch, _ in windows:
            outputs = self.record(batch)[1] if memory > 0 and self.blocks else ()
            memory -= sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
            result.append(outputs if memory > 0 else ())
        return result

    def divergence(self, windows: Sequence[Window], cached: Sequence[Outputs] = (), first: int = 0) -> float:
        """Return the divergence per label from the dense predictions; blocks before ``first`` return what is cached."""
        total = 0.0
        for i, (batch, dense) in enumerate(windows):
            total += batch.size * dense.divergence(self.run(batch, cached[i] if cached else (), first))
        return total / sum(batch.size for batch, _ in windows)

    def block_of(self, module: str) -> int:
        """Return the number of the block of the stack in which a module lies; 0 if it lies in none."""
        inside = self.stack and lies_in(module, self.stack)
        return int(module.removeprefix(f"{self.stack}.").split(".")[0]) if inside else 0

    def _is_exact(self, batch: Batch) -> bool:
        if not self.blocks:
            return False
        logits, cached = self.record(batch)
        if len(cached) != len(self.blocks):
            return False
        middle = len(cached) // 2
        try:
            return all(torch.equal(self.run(batch, cached, first), logits) for first in (len(cached), middle, middle))
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False


def largest_stack(model: nn.Module) -> str | None:
    """Return the path of the container of numbered modules with the most parameters; ``None`` without parameters.

    >>> largest_stack(nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))}))
    'blocks'
    """
    best, largest = None, 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > largest:
                best, largest = path, size
    return best


@contextmanager
def _replaced(blocks: Sequence[nn.Module], outputs: Outputs) -> Iterator[None]:
    """Context manager in which blocks return given outputs instead of running."""

    def instead(output: object) -> Callable[..., object]:
        return lambda *args, **kwargs: output

    before = [vars(block).get("forward") for block in blocks]
    try:
        for block, output in zip(blocks, outputs, strict=False):
            block.forward = instead(output)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


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
        path = self.task.checkpoint
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
        if self.task.checkpoint is not None:
            write_tensors(self.task.checkpoint, {}, {**self.task.header(), "divergences": self.values}, FORMAT)
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
