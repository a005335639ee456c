"""What tracing must find in every network of the zoo, and what it must refuse to call an axis."""

import pytest
import torch
from torch import nn

from regrow.tracing import TraceError, trace
from zoo import NETS, ZOO, Fact, Hoped, Wired, trace_zoo

HOPED = [
    pytest.param(name, fact, id=f"{name}-{number}")
    for name, net in ZOO.items()
    for number, fact in enumerate(net.expect)
    if isinstance(fact, Hoped)
]
"""Facts that the design promises, with the network that they are about."""


def test_every_network_has_a_name_of_its_own() -> None:
    """Of two networks of one name, the zoo would hold the second alone."""
    assert len(ZOO) == len(NETS)


@pytest.mark.parametrize(("name", "fact"), HOPED)
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
