"""The Kronecker gate: preconditions each layer's steps with Kronecker factors (K-FAC) of the earlier tasks."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from regrow.core.axes import axes_in
from regrow.core.axis_tensor import AxisTensor
from regrow.methods.continual.sparsegrow.settings import SparseGrowState
from regrow.scoring.factors import Factors, Gate, factors, join_bias, layers, part
from regrow.training.learner import Context


def add_factors(state: SparseGrowState, context: Context, samples: int) -> SparseGrowState:
    """Add the current task's Kronecker factors of every layer to the sums over earlier tasks; return the new state."""
    read, bias, used = dict(state.read), dict(state.bias), dict(state.used)
    train = context.task.train
    order = torch.randperm(len(train), generator=context.generator(4))[:samples]
    some = train.take(order)
    for name, one in factors(context.model, some.batches(250), context.generator(5), context.classes).items():
        made, *inputs = context.axes.shapes[name]
        shape = context.parameters()[name].shape[1:]
        square = one.inputs[:-1, :-1].reshape(*shape, *shape)
        _add(read, name, square, (*inputs, *inputs))
        _add(bias, name, one.inputs[:-1, -1].reshape(shape), tuple(inputs))
        _add(used, name, one.outputs, (made, made))
    return replace(state, read=read, bias=bias, used=used)


def _add(sums: dict[str, AxisTensor], name: str, values: Tensor, dims: tuple) -> None:
    before = sums.get(name)
    sums[name] = AxisTensor(values if before is None else before.values + values, dims)


def weigh_new_units(state: SparseGrowState, context: Context, share: float) -> None:
    """Give new units the mean output importance of the others, so that the gate also protects their weights.

    Hidden units that were inactive in all earlier tasks get it too: trained freely, they would become active on earlier
    inputs. Network outputs do not: a class that no task has had is free. Behind a norm that rescales groups of units
    (GroupNorm), new units are active on earlier inputs, however small their outputs: inputs from them count there.
    """
    rescaled = _rescaled_axes(context)
    for name in gated_weights(state, context):
        diagonal = state.used[name].values.diagonal()
        new = diagonal == 0
        if name not in context.head:
            diagonal[new] = diagonal[~new].mean() if not bool(new.all()) else 1.0
        if rescaled & set(axes_in(context.axes.shapes[name][1])):
            many = state.bias[name].values.numel()
            read = state.read[name].values.view(many, many).diagonal()
            if bool(read.any()):
                read[read == 0] = share * read[read != 0].mean()


def _rescaled_axes(context: Context) -> set[str]:
    """Return the keys of the axes whose units a norm rescales on each input, alone or in small groups."""
    modules = dict(context.model.named_modules())
    norms = {path for path, one in modules.items() if isinstance(one, nn.GroupNorm | _InstanceNorm)}
    axes = context.axes.units()
    return {axis.key for axis in axes if any(slot.name.rpartition(".")[0] in norms for slot in axis.slots)}


def build_gates(state: SparseGrowState, context: Context, strength: float, damping: float) -> dict[str, Gate]:
    """Return the gate of every layer that has Kronecker factors, by name of its weight."""
    gates = {}
    for name in gated_weights(state, context):
        read, bias, used = (sums[name].values for sums in (state.read, state.bias, state.used))
        n = bias.numel()
        inputs = read.new_empty(n + 1, n + 1)
        inputs[:-1, :-1], inputs[-1, :-1], inputs[:-1, -1] = read.reshape(n, n), bias.flatten(), bias.flatten()
        inputs[-1, -1] = context.number
        if layers(context.model)[name].bias is None:  # no step changes it: it must not count for the weights
            inputs[-1], inputs[:, -1] = 0.0, 0.0
        least = 0.0 if name in context.head else damping
        gates[name] = Gate.of(Factors(inputs, used / context.number + least * torch.eye(len(used)).to(used)), strength)
    return gates


def gated_weights(state: SparseGrowState, context: Context) -> tuple[str, ...]:
    """Return the names of the weights whose layers have Kronecker factors."""
    return tuple(name for name in layers(context.model) if name in state.read)


def apply_gates(state: SparseGrowState, context: Context) -> None:
    """Precondition the change of each gated layer's parameters since the gates were last applied; in place."""
    for name, gate in state.gates.items():
        before = state.last[name]
        _write(context, name, before + gate.through(join_bias(context.model, name) - before))
        state.last[name] = join_bias(context.model, name)


def silence_new_units(context: Context, gates: Mapping[str, Gate], old: Mapping[str, Tensor]) -> None:
    """Project the input weights of new units away from the inputs that earlier tasks fed their layers; in place."""
    for name in gates.keys() & old.keys():
        whole, new = join_bias(context.model, name), ~old[name]
        whole[new] = gates[name].away(whole[new])
        _write(context, name, whole)


@torch.no_grad()
def _write(context: Context, name: str, rows: Tensor) -> None:
    """Set the parameters of a layer, in place."""
    for which, value in part(context.model, name, rows).items():
        context.model.get_parameter(which).copy_(value)
