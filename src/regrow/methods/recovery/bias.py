"""Bias compensation: the mean contribution of dropped inputs is added to the bias of the layer that read them.

b′ = b + Σ over dropped j of W_j · E[x_j], the means taken in the dense network: what FLAP (arXiv 2312.11983) does as a
part of its plan. A plan that carries means has done it already.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regrow.core.plan import Plan
from regrow.core.scores import Moments, Need, Statistics
from regrow.methods.recovery import Recovery, RecoveryTask, StreamedPair, set_bias
from regrow.scoring.collect import CollectionRun, collect
from regrow.scoring.compensate import means, uncompensated
from regrow.surgery.compensate import PlannedTensors, bias_of

CITATION = (
    "An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024, arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings:
    """``bias`` has no settings."""


def build(settings: Settings) -> Recovery:
    """Return the recovery that compensates biases."""
    return bias


def bias(task: RecoveryTask) -> dict[str, object]:
    """Add the mean contribution of dropped inputs to biases, where that is exact; layers without a bias get one."""
    if task.plan.means:
        return {"biases": 0, "note": "the plan carries the means of what it dropped; they are in the biases already"}
    kept = {key: change.keep for key, change in task.plan.changes.items() if not change.idle}
    dropped_means = means(task.dense, task.axes, kept, _measured(task))
    plan = replace(task.plan, means=dropped_means)
    if task.streamed is None:
        now = dict(task.model.named_parameters(remove_duplicate=False))
        tensors = PlannedTensors(task.dense, task.axes, plan)
        made = {bias: tensors.compensated(weight, now.get(bias)) for bias, weight in tensors.biases.items()}
    else:
        made = _streamed_offsets(task, task.streamed, plan)
    for name, value in made.items():
        set_bias(task.model, name, value)
    notes = uncompensated(task.dense, task.axes, kept)
    return {"biases": len(made), **({"note": "; ".join(notes)} if notes else {})}


def _streamed_offsets(task: RecoveryTask, pair: StreamedPair, plan: Plan) -> dict[str, Tensor]:
    """Compute the new biases layer by layer, keep them in files, and return them without numbers."""
    result, cut = dict[str, Tensor](), pair.model.weights.parameters()
    for name, dropped in plan.means.items():
        bias = bias_of(name)
        if bias not in pair.changed:
            with pair.dense.resident([name]):
                tensors = PlannedTensors(task.dense, task.axes, replace(plan, means={name: dropped}))
                made = tensors.compensated(name, cut.get(bias))
            pair.changed.write({bias: made}, {})
        result[bias] = task.model.get_parameter(name).new_empty(pair.changed[bias].shape)
    return result


def _measured(task: RecoveryTask) -> Statistics:
    """Return the moments of the inputs of every weight in the dense network, pooled over all sources."""
    sums: dict[str, Moments] = {}
    first = 0
    if (done := task.read()) is not None:
        first, totals, stored = done
        for name, total in totals.items():
            blank = torch.zeros_like(total)
            sums[name] = Moments(stored["counts"][name], total, blank, 0, blank, blank)
    run = CollectionRun(
        visits=task.streamed.dense if task.streamed else None,
        progress=lambda name, done, total: task.progress(done, total, f"measuring {name}"),
    )
    for number, source in enumerate(task.sources[first:], first + 1):
        measured = collect(task.dense, task.axes, [source], {Need.ACTIVATIONS}, run=run)
        (shard,) = measured[source.name]
        sums = {name: sums[name] + moments if name in sums else moments for name, moments in shard.moments.items()}
        counts = {name: moments.count for name, moments in sums.items()}
        task.write(number, {name: moments.total for name, moments in sums.items()}, {"counts": counts})
    return Statistics("+".join(source.name for source in task.sources), 0, sums)
