"""Bias compensation: the mean contribution of dropped inputs is added to the bias of the layer that read them.

b′ = b + Σ over dropped j of W_j · E[x_j], the means taken in the dense network: what FLAP (arXiv 2312.11983) does as a
part of its plan. A plan that carries means has done it already.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from regrow.core.plan import Plan
from regrow.core.scores import Moments, Need, Statistics
from regrow.methods.recovery.streamed import StreamedPair
from regrow.methods.recovery.task import Recovery, RecoveryTask
from regrow.scoring.collect import collect
from regrow.scoring.compensate import means, uncompensated
from regrow.surgery.compensate import bias_of, offsets
from regrow.surgery.layout import plan_layouts

CITATION = (
    "An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024, arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings:
    """``bias`` has no settings."""


def build(settings: Settings) -> Recovery:
    """Return the recovery that compensates biases.

    Args:
        settings: Without effect.
    """
    return partial(bias, settings=settings)


def bias(task: RecoveryTask, settings: Settings) -> dict[str, object]:
    """Add the mean contribution of dropped inputs to biases, where that is exact; layers without a bias get one.

    Args:
        task: The two networks, the cut and the text.
        settings: Without effect.

    Returns:
        ``biases``: how many were changed; ``note``: why none were, if the plan had done it already, or which could not.

    Raises:
        ValueError: If a source has fewer batches than needed, or its activations are not finite.
    """
    if task.plan.means:
        return {"biases": 0, "note": "the plan carries the means of what it dropped; they are in the biases already"}
    kept = {key: change.keep for key, change in task.plan.changes.items() if not change.idle}
    dropped_means = means(task.dense, task.axes, kept, _measured(task))
    plan = replace(task.plan, means=dropped_means)
    if task.streamed is None:
        now = dict(task.model.named_parameters(remove_duplicate=False))
        made = offsets(task.dense, task.axes, plan, plan_layouts(task.axes, plan), now)
    else:
        made = _streamed_offsets(task, task.streamed, plan)
    for name, value in made.items():
        set_bias(task.model, name, value)
    notes = uncompensated(task.dense, task.axes, kept)
    return {"biases": len(made), **({"note": "; ".join(notes)} if notes else {})}


def _streamed_offsets(task: RecoveryTask, pair: StreamedPair, plan: Plan) -> dict[str, Tensor]:
    """Compute the new biases layer by layer, keep them in files, and return them without numbers."""
    layouts, result, cut = plan_layouts(task.axes, plan), dict[str, Tensor](), pair.model.weights.parameters()
    for name, dropped in plan.means.items():
        bias = bias_of(name)
        if bias not in pair.changed:
            values = {bias: cut[bias]} if bias in cut else {}
            with pair.dense.resident([name]):
                made = offsets(task.dense, task.axes, replace(plan, means={name: dropped}), layouts, values)
            pair.changed.write(made, {})
        result[bias] = task.model.get_parameter(name).new_empty(pair.changed[bias].shape)
    return result


def set_bias(model: nn.Module, name: str, value: Tensor) -> None:
    """Set the bias of a layer, in place; a layer that has none gets one.

    Args:
        model: The network.
        name: The name of the bias, such as ``fc.bias``.
        value: Its values, ``[outputs]``.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters.get(leaf)
    if old is None:
        trains = next(model.parameters()).requires_grad
        setattr(module, leaf, nn.Parameter(value.clone(), requires_grad=trains))
    else:
        with torch.no_grad():
            old.copy_(value)


def _measured(task: RecoveryTask) -> Statistics:
    """Return the moments of the inputs of every weight in the dense network, pooled over all sources."""
    sums: dict[str, Moments] = {}
    first = 0
    if (done := task.read()) is not None:
        first, totals, stored = done
        for name, total in totals.items():
            blank = torch.zeros_like(total)
            sums[name] = Moments(stored["counts"][name], total, blank, 0, blank, blank)
    for i, source in enumerate(task.sources):
        if i < first:
            continue
        report = lambda name, done, total: task.progress(done, total, f"measuring {name}")  # noqa: E731
        visits = task.streamed.dense if task.streamed else None
        measured = collect(task.dense, task.axes, [source], {Need.ACTIVATIONS}, visits=visits, progress=report)
        (one,) = measured[source.name]
        sums = {name: sums[name] + moments if name in sums else moments for name, moments in one.moments.items()}
        counts = {name: moments.count for name, moments in sums.items()}
        task.write(i + 1, {name: moments.total for name, moments in sums.items()}, {"counts": counts})
    return Statistics("+".join(source.name for source in task.sources), 0, sums)
