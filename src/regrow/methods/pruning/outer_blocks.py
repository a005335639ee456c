"""Whether the first and last blocks are pruned: the losses of both masked networks are compared."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from regrow.allocation import BudgetError
from regrow.axes import Axis, Mark
from regrow.methods.pruning.pruner import Kept, PruningTask
from regrow.objectives import choose_objective
from regrow.scoring import constant_inputs
from regrow.scoring.spaces import inner
from regrow.sources import device_of
from regrow.surgery.gate import gate_inputs, gates_of

BATCHES = 2
"""How many batches of each source the losses are measured on."""
ALL, INNER = "all blocks pruned", "first and last blocks unpruned"


def choose_blocks(
    task: PruningTask,
    values: Mapping[str, Tensor],
    spare: tuple[float, float],
    allocate: Callable[[Mapping[str, Tensor]], Kept],
    *,
    compensate: bool,
) -> tuple[Sequence[Axis], dict[str, float]]:
    """Return the axes to prune: all of them, or those outside the first and last blocks, whichever has the lower loss.

    Where the losses cannot be compared (units at whose mark masking is not cutting, no labelled batch, a budget that
    the inner blocks alone cannot meet), the first and last blocks stay unpruned as far as the budget allows.

    Args:
        task: The network, the axes that may be cut, and the data.
        values: Axis key → the importance of its units, ``[size]``.
        spare: The fractions of the numbered blocks, at the beginning and at the end, that may stay unpruned.
        allocate: The importance of the units of the axes to prune → the units that stay within the budget.
        compensate: Whether the mean of dropped inputs takes their place.

    Returns:
        The axes, and name of an allocation → its mean loss on the data before any refit; empty if none was compared.

    Source: ours; leaving outer blocks unpruned is from LLM-Pruner (arXiv 2305.11627).
    """
    some = inner(task.units, *spare)
    if task.budget.regular or len(some) == len(task.units):  # every block gives alike; or none would stay whole
        return task.units, {}
    masks: dict[str, dict[str, Tensor]] = {}
    for name, axes in ((INNER, some), (ALL, task.units)):
        own = {axis.key: values[axis.key] for axis in axes if axis.key in values}
        try:
            masks[name] = gates_of(task.axes, allocate(own))
        except BudgetError:
            if name == ALL:
                raise
            return task.units, {}
    exact = all(axis.mark is Mark.NEUTRAL for axis in task.units)
    losses = _compare(task, masks, compensate) if exact else {}
    return (task.units if losses and losses[ALL] < losses[INNER] else some), losses


def _compare(task: PruningTask, masks: Mapping[str, Mapping[str, Tensor]], compensate: bool) -> dict[str, float]:
    """Return the mean loss under each mask over the batches on which one of them is finite; empty if there is none."""
    fills = constant_inputs(task.model, task.evidence.pooled(gradients=False).moments) if compensate else {}
    batches = [batch for source in task.evidence.data.values() for batch in source.batches[:BATCHES]]
    rows: list[dict[str, float]] = []
    for number, batch in enumerate(batches):
        task.progress(number, len(batches), "comparing whether the first and last blocks stay")
        objective, here = task.objective or choose_objective(None, batch), batch.to(device_of(task.model))
        row = {}
        for name, gates in masks.items():
            with torch.no_grad(), gate_inputs(task.model, task.axes, gates, fills):
                loss = float(objective.compute_loss(task.model(*here.args, **here.kwargs), here))
            row[name] = loss if math.isfinite(loss) else math.inf
        rows += [row] if min(row.values()) < math.inf else []
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in masks} if rows else {}
