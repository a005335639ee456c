"""Forward passes that begin at a block, the outputs of the blocks before it being cached, and divergences of logits."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.sources import Batch, device_of, labelled_logits, logits_in

CLASSES = 128
"""The number of most probable classes of which the dense network's predictions are kept; the others are one class."""

Outputs = tuple[Any, ...]
"""The output of every block of a stack, in one forward pass."""


@dataclass(frozen=True)
class Predictions:
    """The most probable classes of the dense network at every position; the others together are one more class.

    Args:
        classes: ``[positions, k]`` int64.
        chances: Their probabilities, ``[positions, k]``.
    """

    classes: Tensor
    chances: Tensor

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
    best, most = None, 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > most:
                best, most = path, size
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
