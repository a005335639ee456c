"""Whether the first and last blocks are pruned: both allocations are compared with the dense network."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from regrow.allocation import BudgetError
from regrow.axes import Axis
from regrow.methods.pruning.pruner import Kept, PruningTask
from regrow.methods.pruning.replay import Predictions, Replay
from regrow.scoring import takes_constant
from regrow.scoring.spaces import inner

WINDOWS = 2
"""How many batches of each source the divergence is measured on."""
ALL, INNER = "all blocks pruned", "first and last blocks unpruned"


def choose_blocks(
    task: PruningTask,
    values: Mapping[str, Tensor],
    spare: tuple[float, float],
    allocate: Callable[[Mapping[str, Tensor]], Kept],
    *,
    compensate: bool,
) -> tuple[Sequence[Axis], dict[str, float]]:
    """Return the axes to prune: all of them, or those outside the first and last blocks, whichever diverges less.

    Args:
        task: The network, the axes that may be cut, and the measurements.
        values: Axis key → the importance of its units, ``[size]``.
        spare: The fractions of the numbered blocks, at the beginning and at the end, that may stay unpruned.
        allocate: The importance of the units of the axes to prune → the units that stay within the budget.
        compensate: Whether the mean of dropped inputs takes their place.

    Returns:
        The axes, and name of an allocation → its mean divergence from the dense network in nats per position; empty if
        there is only one that meets the budget.

    Source: ours; leaving outer blocks unpruned is from LLM-Pruner (arXiv 2305.11627).
    """
    within = {ALL: task.units, INNER: inner(task.units, *spare)}
    masks: dict[str, dict[str, Tensor]] = {}
    for name, axes in within.items():
        own = {axis.key: values[axis.key] for axis in axes if axis.key in values}
        if name == INNER and (task.budget.regular or not own or len(axes) == len(task.units)):
            continue
        try:
            kept = allocate(own)
        except BudgetError:  # what would be spared has to give, too
            continue
        masks[name] = {key: _mask(len(own[key]), units) for key, units in kept.items()}
    if len(masks) < 2:
        return within[next(iter(masks), ALL)], {}
    moments = task.evidence.pooled().moments if compensate else {}
    fills = {name: one.mean for name, one in moments.items() if takes_constant(task.model, name)}
    replay, losses = Replay(task.model, task.axes), dict.fromkeys(masks, 0.0)
    batches = [batch for source in task.evidence.data.values() for batch in source.batches[:WINDOWS]]
    for number, batch in enumerate(batches):
        task.progress(number, len(batches), "comparing whether the first and last blocks stay")
        dense = Predictions.of(replay.run(batch, {}, {}))
        for name, gates in masks.items():
            losses[name] += dense.divergence(replay.run(batch, gates, fills)) / len(batches)
    return within[min(losses, key=losses.__getitem__)], losses


def _mask(size: int, kept: Sequence[int]) -> Tensor:
    mask = torch.zeros(size)
    mask[list(kept)] = 1.0
    return mask
