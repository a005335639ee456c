"""What a network that keeps learning remembers of its tasks: second moments, no example."""

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from regrow.axes import axes_in
from regrow.axis_tensor import AxisTensor
from regrow.learner import Stand
from regrow.scoring.factors import Factors, Gate, factors, joined, layers, part


def remember(at: Stand, tensors: dict[str, AxisTensor], samples: int) -> None:
    """Add the factors of the present task to those of the tasks before, ``read W``, ``bias W`` and ``used W``.

    Args:
        at: Where the network stands, at the end of a task.
        tensors: What the learner remembers; changed in place.
        samples: Examples of the task that are looked at.
    """
    order = torch.randperm(len(at.task.train), generator=at.drawn(4))[:samples]
    some = type(at.task.train)(at.task.train.inputs[order], at.task.train.labels[order])
    for name, one in factors(at.model, some.batches(250), at.drawn(5), at.classes).items():
        made, *read = at.axes.shapes[name]
        shape = at.parameters()[name].shape[1:]
        square = one.inputs[:-1, :-1].reshape(*shape, *shape)
        for kind, values, dims in (
            ("read", square, (*read, *read)),
            ("bias", one.inputs[:-1, -1].reshape(shape), tuple(read)),
            ("used", one.outputs, (made, made)),
        ):
            before = tensors.get(f"{kind} {name}")
            tensors[f"{kind} {name}"] = AxisTensor(values if before is None else before.values + values, dims)


def born(at: Stand, tensors: dict[str, AxisTensor], loud: float = 0.0) -> None:
    """Newborn units count as much as the others on average: what they answer to old tasks will be read one day.

    So do hidden units that were silent in all old tasks: moved freely, they would wake on old inputs. Outputs do not:
    a class that no task has had yet is free. Behind a norm that rescales each group of units by itself, newborn units
    are heard on old inputs, however little they answer before it: there what reads them counts too.

    Args:
        at: Where the network stands, just grown.
        tensors: What the learner remembers; changed in place.
        loud: How much that counts, as a share of the mean over what was read.
    """
    rescaled = _rescaled(at)
    for name in remembered(at, tensors):
        diagonal = tensors[f"used {name}"].values.diagonal()
        new = diagonal == 0
        if name not in at.head:
            diagonal[new] = diagonal[~new].mean() if not bool(new.all()) else 1.0
        if rescaled & set(axes_in(at.axes.shapes[name][1])):
            many = tensors[f"bias {name}"].values.numel()
            read = tensors[f"read {name}"].values.view(many, many).diagonal()
            if bool(read.any()):
                read[read == 0] = loud * read[read != 0].mean()


def _rescaled(at: Stand) -> set[str]:
    """The axes whose units a norm rescales on each input, by themselves or by few."""
    modules = dict(at.model.named_modules())
    norms = {path for path, one in modules.items() if isinstance(one, nn.GroupNorm | _InstanceNorm)}
    return {axis.key for axis in at.axes.units() if any(slot.name.rpartition(".")[0] in norms for slot in axis.slots)}


def gates(
    at: Stand, tensors: dict[str, AxisTensor], strength: float, tasks: int, damping: float = 0.0
) -> dict[str, Gate]:
    """Name of a weight → the gate of what so many tasks read and used, A and B + d·I for hidden layers.

    Args:
        at: Where the network stands.
        tensors: What the learner remembers.
        strength: s of :class:`Gate`.
        tasks: Over how many tasks factors were added up.
        damping: d, beside a mean diagonal of B of 1: what a hidden unit counts for that old tasks did not use. B looks
            at the old weights alone; a unit that was silent there has none, and wakes when it moves.
    """
    found = {}
    for name in remembered(at, tensors):
        read, bias, used = (tensors[f"{kind} {name}"].values for kind in ("read", "bias", "used"))
        n = bias.numel()
        inputs = read.new_empty(n + 1, n + 1)
        inputs[:-1, :-1], inputs[-1, :-1], inputs[:-1, -1] = read.reshape(n, n), bias.flatten(), bias.flatten()
        inputs[-1, -1] = tasks
        if layers(at.model)[name].bias is None:  # no step moves it: it must not stand for what weights do
            inputs[-1], inputs[:, -1] = 0.0, 0.0
        least = 0.0 if name in at.head else damping
        found[name] = Gate.of(Factors(inputs, used / tasks + least * torch.eye(len(used)).to(used)), strength)
    return found


def remembered(at: Stand, tensors: dict[str, AxisTensor]) -> tuple[str, ...]:
    """The weights whose factors are remembered."""
    return tuple(name for name in layers(at.model) if f"read {name}" in tensors)


def turned(at: Stand, gates: dict[str, Gate], old: dict[str, Tensor]) -> None:
    """Turn what newborn units read away from what old tasks fed them, so that they are silent there at birth.

    Args:
        at: Where the network stands, just grown.
        gates: Name of a weight → its gate.
        old: Name of a weight → which of its rows are not newborn, ``[m]`` bool.
    """
    parameters = at.parameters()
    for name in gates.keys() & old.keys():
        whole, young = joined(at.model, name), ~old[name]
        whole[young] = gates[name].away(whole[young])
        with torch.no_grad():
            for which, value in part(at.model, name, whole).items():
                parameters[which].copy_(value)
