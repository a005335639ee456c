"""The divergence of a masked network from the dense one in forward passes that begin at the first masked block.

The outputs of the blocks before it are cached, the dense network's predictions kept in a compact form.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.axes import AxisGraph
from regrow.core.errors import RefusedError
from regrow.core.sources import Batch, device_of, labelled_logits, logits_in
from regrow.surgery.gate import gate_inputs

NOT_FINITE = "the predictions hold NaN or infinity; try float32 or bfloat16"
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
        """Return the predictions that logits are.

        Args:
            logits: ``[positions, classes]``.
        """
        chances, classes = logits.float().softmax(-1).topk(min(CLASSES, logits.shape[-1]))
        return cls(classes, chances)

    def divergence(self, logits: Tensor) -> float:
        """Return KL(these ‖ others) in nats per position, which is at most that over all classes.

        Args:
            logits: Those of the other network, ``[positions, classes]``.
        """
        logits = logits.float()
        log = logits.gather(-1, self.classes) - logits.logsumexp(-1, keepdim=True)
        loss = (self.chances * (self.chances.clamp_min(1e-30).log() - log)).sum(-1)
        if self.classes.shape[-1] < logits.shape[-1]:
            mine, theirs = ((1 - one.sum(-1)).clamp_min(1e-6) for one in (self.chances, log.exp()))
            loss = loss + mine * (mine / theirs).log()
        return float(loss.mean())


@dataclass(eq=False)
class Replay:
    """Forward passes of a masked network from its first masked block on; whole ones where that is not exact.

    Args:
        model: The dense network.
        axes: Its axes.
        memory: GiB of outputs of blocks that may be cached.
        stack: The path of the container of the blocks that can be skipped; ``None``: whole passes alone.
    """

    model: nn.Module
    axes: AxisGraph
    memory: float = 1.0
    stack: str | None = None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The blocks that can be skipped, in the order in which they run; placeholders among them, too."""
        return () if self.stack is None else tuple(self.model.get_submodule(self.stack).children())

    @classmethod
    def of(cls, model: nn.Module, axes: AxisGraph, batch: Batch, memory: float) -> "Replay":
        """Return the replay of a network, with its stack of blocks if skipping them gives the same logits.

        Args:
            model: The dense network.
            axes: Its axes.
            batch: What it is tried on.
            memory: GiB of outputs of blocks that may be cached.
        """
        path, stack = largest_stack(model)
        found = cls(model, axes, memory, path if stack else None)
        return found if found._is_exact(batch) else cls(model, axes, 0.0)

    def run(
        self,
        batch: Batch,
        gates: Mapping[str, Tensor],
        fills: Mapping[str, Tensor],
        cached: Outputs | None = None,
        first: int = 0,
    ) -> Tensor:
        """Return the logits of the masked network at labelled positions, ``[positions, classes]``.

        Args:
            batch: The batch.
            gates: Axis key → the mask of its units, ``[size]``.
            fills: Name of a weight → the values that replace its dropped inputs, ``[C]``.
            cached: The outputs of the blocks on this batch under the same masks before block ``first``.
            first: The number of the first block that runs; those before it give what is cached.
        """
        here = batch.to(device_of(self.model))
        skipped = first if cached is not None else 0
        with (
            torch.no_grad(),
            _replaced(self.blocks[:skipped], cached or ()),
            gate_inputs(self.model, self.axes, gates, fills),
        ):
            return labelled_logits(logits_in(here.run(self.model)), here.labels)

    def record(
        self,
        batches: Sequence[Batch],
        masks: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
        *,
        logits: bool = True,
    ) -> tuple[list[Tensor], list[Outputs | None]]:
        """Return the logits of the masked network on batches, and the outputs of its blocks as far as memory allows.

        Args:
            batches: The batches.
            masks: The masks of the units and the values of dropped inputs, for each batch.
            logits: Whether the logits are returned; else there are none.
        """
        room = self.memory * 2**30
        answers: list[Tensor] = []
        outputs: list[Outputs | None] = []
        for batch, (gates, fills) in zip(batches, masks, strict=True):
            with _recorded(self.blocks if room > 0 else ()) as made:
                answer = self.run(batch, gates, fills)
                answers += [answer] if logits else []
            room -= sum(one.nbytes for one in tree_leaves(made) if isinstance(one, Tensor))
            outputs.append(tuple(made) if made and room > 0 else None)
        return answers, outputs

    def _is_exact(self, batch: Batch) -> bool:
        if not self.blocks:
            return False
        (logits,), (cached,) = self.record([batch], [({}, {})])
        if cached is None or len(cached) != len(self.blocks):
            return False
        middle = len(self.blocks) // 2
        try:
            return all(torch.equal(self.run(batch, {}, {}, cached, at), logits) for at in (len(cached), middle, middle))
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return False


def largest_stack(model: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """Return the path and the modules of the container of numbered modules with the most parameters; or none.

    Args:
        model: The network.

    >>> largest_stack(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))[1][1]
    Linear(in_features=2, out_features=2, bias=True)
    """
    best: tuple[int, str, Sequence[nn.Module]] = (0, "", ())
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1:
            size = sum(one.numel() for one in module.parameters())
            if size > best[0]:
                best = (size, path, tuple(module))
    return best[1], best[2]


def choose_lowest(losses: Mapping[str, float]) -> str:
    """Return the name with the lowest loss; NaN and infinity are never chosen.

    Args:
        losses: Name → loss.

    Raises:
        RefusedError: If none is finite.

    >>> choose_lowest({"base": float("nan"), "inner": 2.0, "uniform": 3.0})
    'inner'
    """
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        raise RefusedError(NOT_FINITE)
    return min(finite, key=lambda name: finite[name])


@contextmanager
def _replaced(blocks: Sequence[nn.Module], outputs: Outputs) -> Iterator[None]:
    """Context manager in which blocks return given outputs instead of running."""

    def instead(output: object) -> Callable[..., object]:
        return lambda *args, **kwargs: output

    own = [vars(block).get("forward") for block in blocks]
    try:
        for block, output in zip(blocks, outputs, strict=False):
            block.forward = instead(output)
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if before is not None:
                block.forward = before


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Context manager that yields a list of the outputs of blocks that run, in order."""
    made: list[Any] = []
    hooks = [block.register_forward_hook(lambda _, given, output: made.append(output)) for block in blocks]
    try:
        yield made
    finally:
        for hook in hooks:
            hook.remove()
