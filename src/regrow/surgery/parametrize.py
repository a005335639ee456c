"""Replace parameters by computed tensors in the forward pass, and let tensors along axes follow a plan."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from regrow.core.axes import AxisGraph
from regrow.core.axis_tensor import AxisTensor
from regrow.core.plan import Plan
from regrow.surgery.layout import lay_out, units_after
from regrow.surgery.widen import resize_moment


@contextmanager
def parametrize(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager in which modules use given tensors in place of parameters; gradients flow to their inputs.

    It must last until the backward pass is over, since activation checkpointing runs modules again.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> with parametrize(net, {"weight": net.weight * 0}):
    ...     net(net.weight.new_ones(1, 2)).item()
    0.0
    """
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            parameter = module._parameters[leaf]
            assert parameter is not None, f"{name} is no parameter"
            held.append((module, leaf, parameter))
            # Modules look up parameters by name only where they have no attribute of that name.
            module.__dict__[leaf] = value
        yield
    finally:
        for module, leaf, _ in held:
            module.__dict__.pop(leaf, None)


def resize_axis_tensor(one: AxisTensor, axes: AxisGraph, plan: Plan) -> AxisTensor:
    """Return a tensor along axes after a plan: kept entries keep their values, new ones are 0 (``False``)."""
    sizes = axes.sizes()
    units = {key: units_after(change, axes[key]) for key, change in plan.changes.items() if not change.idle}
    lays = {i: lay_out(dim, sizes, units) for i, dim in enumerate(one.dims) if not isinstance(dim, int)}
    return AxisTensor(resize_moment(one.values.detach(), lays, mean=False), one.dims, one.lr)
