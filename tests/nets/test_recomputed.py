"""Parts that are computed anew in the backward pass: the same numbers, gradients and running statistics."""

import copy

import pytest
import torch
from torch import nn

from regrow.nets import cells, mobile
from regrow.nets.cells import Cells
from regrow.nets.mobile import Mobile
from regrow.nets.staged import run_recomputed
from regrow.surgery.gate import parametrize
from zoo import randomise

NETS = {
    "cells": lambda: Cells(cells.supernet_config((3, 16, 16), 5, width=4, cells=3, nodes=2)),
    "mobile": lambda: Mobile(mobile.supernet_config((3, 16, 16), 5, width=4, blocks=1, stride=1)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("masked", [False, True])
def test_two_steps_are_the_same_bit_for_bit(name, masked):
    plain = randomise(NETS[name]()).train()
    anew = copy.deepcopy(plain)
    anew.recomputed = True
    x = torch.randn(4, 3, 16, 16)
    for _ in range(2):
        for net in (plain, anew):
            stand = {n: p * (p.abs() > 0.05) for n, p in net.named_parameters() if masked and p.dim() > 1}
            with parametrize(net, stand):
                net(x).square().sum().backward()
    for (n, one), other in zip(plain.named_parameters(), anew.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), n
    for (n, one), other in zip(plain.named_buffers(), anew.buffers(), strict=True):
        assert torch.equal(one, other), n
    assert any(int(one) == 2 for n, one in anew.named_buffers() if n.endswith("tracked"))
    assert {m.momentum for m in anew.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_what_is_drawn_is_drawn_once():
    net, x = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 1)), torch.randn(16, 8)
    found = []
    for run in (net, lambda value: run_recomputed(net, value)):
        torch.manual_seed(3)
        net.zero_grad()
        run(x).sum().backward()
        found.append(net[0].weight.grad)
    assert torch.equal(*found) and bool(found[0].any())
