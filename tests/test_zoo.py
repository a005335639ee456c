"""What tracing must find in every network of the zoo, and what it must refuse to call an axis."""

from typing import Any

import pytest
import torch
from torch import nn

from regrow.core.axes import Role, size_of
from regrow.tracing import TraceError, trace
from zoo import NETS, ZOO, Fact, Hoped, Wired, trace_zoo


def facts(hoped: bool) -> list[Any]:
    """Every fact of the zoo of one kind, with the network it is about."""
    return [
        pytest.param(name, fact, id=f"{name}-{number}")
        for name, net in ZOO.items()
        for number, fact in enumerate(net.expect)
        if isinstance(fact, Hoped) == hoped
    ]


def test_every_network_has_a_name_of_its_own() -> None:
    """Of two networks of one name, the zoo would hold the second alone."""
    assert len(ZOO) == len(NETS)


@pytest.mark.parametrize(("name", "fact"), facts(hoped=False))
def test_tracing_finds_what_it_must(name: str, fact: Fact) -> None:
    """Widths, marks, ties, reasons and notes are what the network's structure says."""
    assert not fact.missed(trace_zoo(name)[1])


@pytest.mark.parametrize(("name", "fact"), facts(hoped=True))
@pytest.mark.xfail(reason="promised by the design, frozen for now", strict=True)
def test_tracing_finds_what_the_design_promises(name: str, fact: Fact) -> None:
    """The day one of these is found, its ``Hoped`` goes."""
    assert not fact.missed(trace_zoo(name)[1])


def test_a_network_that_cannot_be_recorded_says_so() -> None:
    """A network that does not run on its example has no axes: an error in words, not a wrong axis."""
    model = Wired(lambda m, x: m.one(x).two)
    model.one = nn.Linear(4, 6)
    with pytest.raises(TraceError, match=r"refuses Wired: .*no attribute 'two'.*Check that the example"):
        trace(model, torch.ones(2, 4))


@pytest.mark.parametrize("name", ZOO)
def test_axes_agree_with_the_tensors(name: str) -> None:
    """Shapes multiply out, slots stay inside their tensors and do not overlap, and frozen axes say why."""
    model, axes = trace_zoo(name)
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    sizes = axes.sizes()
    for tensor, dims in axes.shapes.items():
        assert tuple(state[tensor].shape) == tuple(size_of(dim, sizes) for dim in dims), tensor
    for axis in axes:
        assert bool(axis.reason) or axis.free, f"{axis.key} is frozen and does not say why"
        for slot in axis.slots:
            positions = slot.positions(axis.size).flatten()
            assert len(set(positions.tolist())) == len(positions), (axis.key, slot)
            assert 0 <= int(positions.min()) <= int(positions.max()) < state[slot.name].shape[slot.dim], (
                axis.key,
                slot,
            )
        if axis.free:
            roles = {slot.role for slot in axis.slots}
            assert Role.PRODUCES in roles, f"nothing makes the units of {axis.key}"
