"""The dense network in its thread: what it hands over, and how it ends."""

import pytest
import torch
from torch import nn

from regrow.methods.recovery.paired_forward import run_in_thread


def test_each_part_of_a_run_hands_over_its_layers():
    net, x, parts = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU()), torch.randn(5, 3), []
    watched = {id(one): name for name, one in net.named_parameters() if name.endswith("weight")}

    def run(around, turns):
        value = x
        for start in (0, 2):
            parts.append(start)
            with around(0, watched):
                value = net[start + 1](net[start](value))

    with run_in_thread(run) as dense:
        assert not parts  # nothing runs before it is requested
        output, other = dense(0, "0.weight")
        assert other is None
        assert parts == [0]
        assert torch.equal(output, net[0](x))
        assert torch.equal(dense(0, "2.weight")[0], net[:3](x))
    assert parts == [0, 2]


def test_layers_that_are_not_run_have_no_output():
    with run_in_thread(lambda around, turns: None) as dense:
        assert [dense(0, "a"), dense(0, "b")] == [None, None]


def test_an_error_is_raised_where_an_output_is_requested():
    def run(around, turns):
        raise ValueError("broken")

    with run_in_thread(run) as dense:
        with pytest.raises(ValueError, match="broken"):
            dense(0, "a")
        assert dense(0, "a") is None
    assert not dense._thread.is_alive()
