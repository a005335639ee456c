"""Which layers read units that were cut and can be refitted, and where their outputs go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from regrow.core.sources import Batch
from regrow.methods.recovery.paired_forward import CallCounter
from regrow.methods.recovery.refit_work import Layer
from regrow.methods.recovery.streamed_refit import count_calls
from regrow.methods.recovery.task import RecoveryTask
from regrow.surgery.compensate import read_dim
from regrow.surgery.layout import plan_layouts


@dataclass(frozen=True)
class LayersToRefit:
    """The layers that read cut units.

    Args:
        layers: Those that can be refitted, sorted by name.
        left_out: The name of each other → why it cannot.
        added: Whether the output of at least one of ``layers`` is added to another tensor as it is, as where a layer
            writes to a residual stream directly.
    """

    layers: Sequence[Layer]
    left_out: Mapping[str, str]
    added: bool


def find_layers(task: RecoveryTask, batch: Batch) -> LayersToRefit:
    """Find the layers that read cut units.

    Args:
        task: The two networks and the cut.
        batch: An input of the cut network, which is run once to see how often each layer runs.
    """
    axes, lays = task.axes, plan_layouts(task.axes, task.plan)
    names = {slot.name for key, c in task.plan.changes.items() if not c.idle for slot in axes[key].consumers()}
    own = dict(task.model.named_parameters())
    if task.streamed is None:
        calls = CallCounter({id(own[name]): name for name in names if name in own})
        with calls:
            batch.run(task.model)
        calls.finish()
        times, added = calls.times, calls.added
    else:
        times, added = count_calls(task.streamed, names, batch)
    layers, left_out = [], {}
    for name in sorted(names):
        dim = read_dim(axes, name)
        problem = _problem(task, name, dim, times[name])
        if problem or dim is None:
            left_out[name] = problem
            continue
        rows = [lay.source for at, lay in lays[name].items() if at != dim]
        layers.append(Layer(name, dim, lays[name][dim].source, rows[0] if rows else None))
    return LayersToRefit(layers, left_out, any(added[layer.name] for layer in layers))


def _problem(task: RecoveryTask, name: str, dim: int | None, calls: int) -> str:
    """Say why a layer cannot be refitted; empty if it can."""
    ties = task.axes.ties
    if name in ties or name in ties.values() or name not in dict(task.model.named_parameters()):
        return "its weight is shared"
    if dim is None:
        return "it reads several axes, or one in several places"
    module, weight = task.model.get_submodule(name.rpartition(".")[0]), task.model.get_parameter(name)
    if calls != 1:
        return f"its weight is seen at work {calls} times in one pass"
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and not isinstance(module.padding, str) and module.padding_mode == "zeros"
        return "" if plain else "a convolution in groups, or padded otherwise than with zeros"
    if weight.dim() != 2 or dim not in (0, 1) or isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.Embedding):
        return f"a {type(module).__name__} is neither a linear map nor a two-dimensional convolution"
    return ""
