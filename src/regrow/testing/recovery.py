"""Laws of methods that recover what pruning lost."""

import contextlib
import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source
from regrow.methods import MethodEntry
from regrow.methods.recovery import RecoveryTask
from regrow.surgery import apply
from regrow.testing.continual import Law, StoppedError, assert_equal_tensors
from regrow.testing.pruning import make_network, make_sources


def make_task(checkpoint: Path | None = None, progress: Progress = silent) -> RecoveryTask:
    """Return a small classifier of which a third of the units was cut, and inputs of several distributions."""
    model, axes = make_network()
    keep = {axis.key: [*range(axis.size * 2 // 3)] for axis in axes.units()}
    plan, dense = Plan.keeping(axes, keep), copy.deepcopy(model)
    apply(model, axes, plan)
    sources = [_label(source, dense) for source in make_sources()]
    return RecoveryTask(model, dense, axes, plan, sources, checkpoint=checkpoint, progress=progress)


def _label(source: Source, dense: nn.Module) -> Source:
    """The inputs of a source with the classes that the dense network predicts."""
    with torch.no_grad():
        batches = [Batch(batch.args, labels=dense(*batch.args).argmax(-1)) for batch in source]
    return Source(source.name, batches)


def _recover(method: MethodEntry, settings: Mapping[str, object], task: RecoveryTask) -> nn.Module:
    method.made("the method", settings)(task)
    return task.model


def check_shapes(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """The network keeps its shapes (biases may be added), its numbers stay finite, and the dense one stays as it is."""
    task = make_task()
    before = {name: tuple(p.shape) for name, p in task.model.named_parameters()}
    dense = copy.deepcopy(task.dense.state_dict())
    model = _recover(method, settings, task)
    after = dict(model.named_parameters())
    changed = [name for name, shape in before.items() if name not in after or tuple(after[name].shape) != shape]
    assert not changed, f"shapes changed: {', '.join(changed)}"
    added = [name for name in after if name not in before and not name.endswith("bias")]
    assert not added, f"parameters were added: {', '.join(added)}"
    broken = [name for name, p in after.items() if not bool(p.isfinite().all())]
    assert not broken, f"numbers are not finite: {', '.join(broken)}"
    assert_equal_tensors(dense, task.dense.state_dict(), "the dense network was changed")


def check_seed(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """The same seed gives the same weights, bit for bit, and a cut network is changed."""
    first, second = (_recover(method, settings, make_task()).state_dict() for _ in range(2))
    assert_equal_tensors(first, second, "two runs with the same seed differ")
    cut = make_task().model.state_dict()
    assert any(name not in cut or not first[name].equal(cut[name]) for name in first), "nothing was recovered"


def check_resume(method: MethodEntry, settings: Mapping[str, object]) -> None:
    """Stopped in the middle and resumed from its checkpoint, a recovery ends with the same bits."""
    whole = _recover(method, settings, make_task()).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"

        def stop(done: int, total: int, what: str) -> None:
            if 2 * done >= total:
                raise StoppedError

        with contextlib.suppress(StoppedError):
            _recover(method, settings, make_task(path, stop))
        resumed = _recover(method, settings, make_task(path)).state_dict()
    assert_equal_tensors(whole, resumed, "resumed")


LAWS: Mapping[str, Law] = {
    "shapes stay, and the dense network too": check_shapes,
    "the same seed gives the same weights": check_seed,
    "killed and resumed gives the same bits": check_resume,
}
"""Every law by its name."""
