"""Laws of one-shot pruning methods, and of methods that recover what pruning lost, on a small network in float64."""

import contextlib
import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from regrow.allocation.cost import Cost
from regrow.core.axes import AxisGraph, Example
from regrow.core.budget import Budget
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source
from regrow.jobs.pruning_inputs import collect_evidence
from regrow.methods.pruning.pruner import PlannedCut, Pruner, plan_cut
from regrow.methods.recovery import RecoveryTask
from regrow.store.ledger import read_plan
from regrow.surgery import apply, verify
from regrow.testing.continual import Law, StoppedError, Subject, assert_equal_tensors
from regrow.tracing import trace

INPUTS, CLASSES, WIDTHS = 6, 4, (24, 16)
KEEPS = (0.8, 0.5)
DOMAINS = 3


def make_network(order: Sequence[int] | None = None, *, tied: bool = False) -> tuple[nn.Module, AxisGraph]:
    """Return a small classifier in float64 with fixed random weights, and its axes; torch's random seed is set.

    ``order``: a permutation of the first layer's units; ``tied``: with two layers more, which share a weight.
    """
    torch.manual_seed(0)
    first, second = WIDTHS
    model = nn.Sequential(
        nn.Linear(INPUTS, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, CLASSES)
    ).double()
    if tied:
        shared = [nn.Linear(second, second).double() for _ in range(2)]
        shared[1].weight = shared[0].weight
        layers = [*model.children()]
        model = nn.Sequential(*layers[:4], shared[0], nn.ReLU(), shared[1], nn.ReLU(), layers[4])
    if order is not None:
        with torch.no_grad():
            for name, dim in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
                parameter = model.get_parameter(name)
                parameter.copy_(parameter.index_select(dim, torch.tensor(order)))
    return model.eval(), trace(model, torch.ones(2, INPUTS, dtype=torch.float64))


def make_sources() -> list[Source]:
    """Return labelled random inputs from several distributions, one source each."""
    sources = []
    for domain in range(DOMAINS):
        generator = torch.Generator().manual_seed(domain)
        scale = 0.2 + torch.rand(INPUTS, generator=generator, dtype=torch.float64)
        batches = []
        for _ in range(4):
            inputs = scale * torch.randn(16, INPUTS, generator=generator, dtype=torch.float64)
            batches.append(Batch((inputs,), labels=torch.randint(CLASSES, (16,), generator=generator)))
        sources.append(Source(f"domain-{domain + 1}", batches))
    return sources


def _plan(subject: Subject, model: nn.Module, axes: AxisGraph, keep: float = 0.5) -> PlannedCut:
    """Return what the method would cut to keep the fraction ``keep`` of the weights; the network stays unchanged."""
    pruner: Pruner = subject.build()
    return plan_cut(pruner, model, axes, Budget(keep), collect_evidence(model, axes, pruner, make_sources()))


def check_record(subject: Subject) -> None:
    """Law: the method is a :class:`Pruner`, and every setting is documented in the docstring of its settings."""
    pruner = subject.build()
    assert isinstance(pruner, Pruner), f"build returns a {type(pruner).__name__}, not a Pruner"
    settings = subject.entry.settings
    missing = [field.name for field in fields(settings) if f"{field.name}:" not in (settings.__doc__ or "")]
    assert not missing, f"settings without a sentence in the docstring of Settings: {', '.join(missing)}"


def check_budget(subject: Subject) -> None:
    """Law: a budget is met within one unit, and never exceeded."""
    model, axes = make_network()
    cost, sizes = Cost(axes), axes.sizes()
    unit = max(cost.total - cost({**sizes, axis.key: axis.size - 1}) for axis in axes.units()) / cost.total
    for keep in KEEPS:
        share = cost(_plan(subject, model, axes, keep).plan.sizes(axes)) / cost.total
        assert share <= keep, f"keep {keep:g}: {share:.4f} stays"
        assert share > keep - unit, f"keep {keep:g}: only {share:.4f} stays, and a unit costs {unit:.4f} at most"


def check_seed(subject: Subject) -> None:
    """Law: the same seed gives the same plan, the plan survives JSON, and planning does not change the network."""
    model, axes = make_network()
    before = copy.deepcopy(model.state_dict())
    first, second = (_plan(subject, model, axes).plan for _ in range(2))
    assert first == second, "two plans with the same seed differ"
    assert read_plan(json.loads(first.to_json())) == first, "the plan does not survive JSON"
    assert_equal_tensors(model.state_dict(), before, "planning changed the network")


def check_cut(subject: Subject) -> None:
    """Law: the plan is valid, the cut network computes what the masked one does, and its outputs are finite."""
    model, axes = make_network()
    inputs = torch.randn(5, INPUTS, dtype=torch.float64)
    for keep in KEEPS:
        plan = _plan(subject, model, axes, keep).plan
        plan.check(axes)
        result = verify(model, axes, plan, Example((inputs,)))
        assert result.ok, f"keep {keep:g}: {result}"
        small, _ = apply(copy.deepcopy(model), axes, plan)
        assert bool(small(inputs).isfinite().all()), f"keep {keep:g}: the cut network gives numbers that are not finite"


def check_scores(subject: Subject) -> None:
    """Law: every axis that may be cut is scored, one finite number per unit, also where two layers share a weight."""
    for tied in (False, True):
        model, axes = make_network(tied=tied)
        values = _plan(subject, model, axes).scores.values
        for axis in axes.units():
            assert axis.key in values, f"the axis {axis.key} has no scores"
            scores = values[axis.key]
            assert isinstance(scores, Tensor) and scores.shape == (axis.size,), f"{axis.key}: not one number per unit"
            assert bool(scores.isfinite().all()), f"{axis.key}: scores are not finite"


def check_compensation(subject: Subject) -> None:
    """Law: compensation, if there is any, moves the network's mean outputs closer to those of the dense network."""
    model, axes = make_network()
    plan = _plan(subject, model, axes).plan
    if not plan.means:
        return
    inputs = torch.cat([batch.args[0] for source in make_sources() for batch in source])
    plain, compensated = copy.deepcopy(model), copy.deepcopy(model)
    apply(plain, axes, replace(plan, means={}))
    apply(compensated, axes, plan)
    with torch.no_grad():
        dense = model(inputs).mean(0)
        before, after = ((other(inputs).mean(0) - dense).norm() for other in (plain, compensated))
    assert after < before, f"compensation moves the mean output from {before:.3g} to {after:.3g} of the dense one"


def check_permutation(subject: Subject) -> None:
    """Law: permuting the units of a network permutes the plan."""
    order = torch.randperm(WIDTHS[0], generator=torch.Generator().manual_seed(1)).tolist()
    plans = [_plan(subject, *make_network(units)).plan for units in (None, order)]
    key = "0.weight:0"
    kept, permuted = ([*plan.changes[key].keep] if key in plan.changes else [*range(WIDTHS[0])] for plan in plans)
    assert sorted(order[unit] for unit in permuted) == sorted(kept), "other units are kept of a permuted network"


LAWS: Mapping[str, Law] = {
    "a pruner is a record of functions": check_record,
    "a budget is met within one unit": check_budget,
    "every axis is scored": check_scores,
    "the same seed gives the same plan": check_seed,
    "masked = shrunk": check_cut,
    "compensation brings the mean output closer": check_compensation,
    "permuted units give the permuted plan": check_permutation,
}


def make_task(checkpoint: Path | None = None, progress: Progress = silent) -> RecoveryTask:
    """Return a small classifier of which a third of the units was cut, and inputs with the dense one's classes.

    ``checkpoint``: a file in which the method stores its progress; ``progress`` is called as it goes on.
    """
    model, axes = make_network()
    keep = {axis.key: [*range(axis.size * 2 // 3)] for axis in axes.units()}
    plan, dense = Plan.keeping(axes, keep), copy.deepcopy(model)
    apply(model, axes, plan)
    with torch.no_grad():
        sources = [
            Source(source.name, [replace(batch, labels=dense(*batch.args).argmax(-1)) for batch in source])
            for source in make_sources()
        ]
    return RecoveryTask(model, dense, axes, plan, sources, checkpoint=checkpoint, progress=progress)


def _recover(subject: Subject, task: RecoveryTask) -> dict[str, Tensor]:
    """Recover a task's network in place and return its state dict."""
    subject.build()(task)
    return task.model.state_dict()


def check_recovered_network(subject: Subject) -> None:
    """Law: the network keeps its shapes (biases may be added) and finite numbers, and the dense one stays as it is."""
    task = make_task()
    before, dense_before = (copy.deepcopy(network.state_dict()) for network in (task.model, task.dense))
    after = _recover(subject, task)
    changed = [name for name, value in before.items() if name not in after or after[name].shape != value.shape]
    assert not changed, f"shapes changed: {', '.join(changed)}"
    added = [name for name in after if name not in before and not name.endswith("bias")]
    assert not added, f"parameters were added: {', '.join(added)}"
    broken = [name for name, value in after.items() if not bool(value.isfinite().all())]
    assert not broken, f"numbers are not finite: {', '.join(broken)}"
    assert_equal_tensors(dense_before, task.dense.state_dict(), "the dense network was changed")


def check_recovery_seed(subject: Subject) -> None:
    """Law: the same seed gives the same weights, bit for bit, and a cut network is changed."""
    first, second = (_recover(subject, make_task()) for _ in range(2))
    assert_equal_tensors(first, second, "two runs with the same seed differ")
    cut = make_task().model.state_dict()
    assert any(name not in cut or not first[name].equal(cut[name]) for name in first), "nothing was recovered"


def check_recovery_resume(subject: Subject) -> None:
    """Law: a recovery that is stopped in the middle and resumed from its checkpoint ends with the same bits."""

    def stop(done: int, total: int, what: str) -> None:
        if 2 * done >= total:
            raise StoppedError

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        with contextlib.suppress(StoppedError):
            _recover(subject, make_task(path, stop))
        resumed = _recover(subject, make_task(path))
    assert_equal_tensors(_recover(subject, make_task()), resumed, "resumed")


RECOVERY_LAWS: Mapping[str, Law] = {
    "shapes stay, and the dense network too": check_recovered_network,
    "the same seed gives the same weights": check_recovery_seed,
    "killed and resumed gives the same bits": check_recovery_resume,
}
