"""Networks of convolutions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.facts import Frozen, Has, Widths
from zoo.networks import conv, images, network, vectors


def _excited(m: Any, x: Tensor) -> Tensor:
    return x * m.up(F.silu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid()


CONVOLUTION = (
    network(
        "conv_residual",
        lambda m, x: m.head(F.relu(m.block(h := m.stem(x)) + h).mean((2, 3))),
        lambda: {
            "stem": nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            "block": nn.Sequential(
                conv(8, 12, bias=False), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 8, bias=False), nn.BatchNorm2d(8)
            ),
            "head": nn.Linear(8, 5),
        },
        images(3, 9, 7),
        Widths((8, 12)),
        Has(8, ("stem.0.weight:0", "stem.1.running_var:0", "block.0.weight:1", "block.3.weight:0", "head.weight:1")),
        Has(12, ("block.0.weight:0", "block.1.running_mean:0", "block.1.bias:0", "block.3.weight:1")),
        Frozen(("stem.0.weight:1", "head.weight:0")),
    ),
    network(
        "depthwise",
        lambda m, x: m.head(m.point(F.relu6(m.norm(m.depth(m.stem(x))))).amax((2, 3))),
        lambda: {
            "stem": conv(3, 9),
            "depth": conv(9, 9, groups=9, stride=2),
            "norm": nn.BatchNorm2d(9),
            "point": conv(9, 7, 1),
            "head": nn.Linear(7, 5),
        },
        images(3, 8),
        Widths((9, 7)),
        Has(9, ("stem.weight:0", "depth.weight:0", "depth.bias:0", "norm.weight:0", "point.weight:1")),
    ),
    network(
        "depth_multiplier",
        lambda m, x: m.head(m.depth(m.stem(x)).relu().mean((2, 3))),
        lambda: {"stem": conv(3, 5), "depth": conv(5, 15, groups=5), "head": nn.Linear(15, 4)},
        images(3, 6),
        Has(5, ("stem.weight:0", "depth.weight:0", "depth.bias:0", "head.weight:1")),
    ),
    network(
        "concat",
        lambda m, x: m.head(m.join(torch.cat([m.one(x).relu(), m.two(x).sigmoid()], 1)).relu().mean((2, 3))),
        lambda: {"one": conv(3, 5), "two": conv(3, 7), "join": conv(12, 6), "head": nn.Linear(6, 4)},
        images(3, 8),
        Widths((5, 7, 6)),
        Has(5, ("one.weight:0", "one.bias:0", "join.weight:1"), alone=True),
        Has(7, ("two.weight:0", "two.bias:0", "join.weight:1"), alone=True),
    ),
    network(
        "concat_flatten",
        lambda m, x: m.head(torch.cat([m.one(x), m.two(x)], 1).tanh().flatten(1)),
        lambda: {"one": conv(3, 5), "two": conv(3, 7), "head": nn.Linear(12 * 6, 4)},
        images(3, 3, 2),
        Widths((5, 7)),
        Has(5, ("one.weight:0", "head.weight:1")),
        Has(7, ("two.weight:0", "head.weight:1")),
    ),
    network(
        "flatten",
        lambda m, x: m.fc2(m.fc1(m.norm(m.stem(x)).relu().flatten(1)).tanh()),
        lambda: {"stem": conv(3, 5), "norm": nn.BatchNorm2d(5), "fc1": nn.Linear(60, 11), "fc2": nn.Linear(11, 4)},
        images(3, 4, 3),
        Widths((5, 11)),
        Has(5, ("stem.weight:0", "norm.bias:0", "fc1.weight:1")),
    ),
    network(
        "grouped",
        lambda m, x: m.head(m.last(m.group(m.stem(x).relu()).relu()).mean((2, 3))),
        lambda: {
            "stem": conv(3, 12),
            "group": conv(12, 18, groups=3),
            "last": conv(18, 7),
            "head": nn.Linear(7, 5),
        },
        images(3, 6),
        Has(3, ("stem.weight:0", "group.weight:0", "group.bias:0", "last.weight:1")),
        Has(4, ("stem.weight:0", "stem.bias:0", "group.weight:1")),
        Has(6, ("group.weight:0", "group.bias:0", "last.weight:1")),
        Has(7, ("last.weight:0", "head.weight:1")),
    ),
    network(
        "transposed",
        lambda m, x: m.head(m.up(m.stem(x).relu()).relu().mean((2, 3))),
        lambda: {"stem": conv(3, 6), "up": nn.ConvTranspose2d(6, 9, 2, stride=2), "head": nn.Linear(9, 4)},
        images(3, 5),
        Widths((6, 9)),
        Has(6, ("stem.weight:0", "up.weight:0")),
        Has(9, ("up.weight:1", "up.bias:0", "head.weight:1")),
    ),
    network(
        "conv1d",
        lambda m, x: m.head(m.act(m.two(F.silu(m.one(x)))).transpose(1, 2)),
        lambda: {
            "one": nn.Conv1d(3, 6, 3),
            "two": nn.Conv1d(6, 8, 3, stride=2),
            "act": nn.PReLU(8),
            "head": nn.Linear(8, 4),
        },
        vectors(2, 3, 13),
        Widths((6, 8)),
        Has(8, ("two.weight:0", "act.weight:0", "head.weight:1")),
    ),
    network(
        "circular",
        lambda m, x: m.head(m.two(m.one(x).sigmoid()).sigmoid().mean((2, 3))),
        lambda: {
            "one": conv(3, 5, padding_mode="circular"),
            "two": conv(5, 7, padding_mode="reflect"),
            "head": nn.Linear(7, 4),
        },
        images(3, 6),
        Widths((5, 7)),
    ),
    network(
        "squeeze_excite",
        lambda m, x: m.head(_excited(m, m.stem(x).relu()).mean((2, 3))),
        lambda: {"stem": conv(3, 9), "down": conv(9, 4, 1), "up": conv(4, 9, 1), "head": nn.Linear(9, 5)},
        images(3, 6),
        Widths((9, 4)),
        Has(9, ("stem.weight:0", "down.weight:1", "up.weight:0", "head.weight:1")),
    ),
    network(
        "coincidence",
        lambda m, x: m.head((m.point(m.depth(m.stem(x)).relu()) + x).mean(3).flatten(1)),
        lambda: {
            "stem": conv(4, 4),
            "depth": conv(4, 4, groups=4),
            "point": conv(4, 4, 1),
            "head": nn.Linear(16, 4),
        },
        images(4, 4, batch=4),
        Widths((4,)),
        Has(4, ("stem.weight:0", "depth.weight:0", "depth.bias:0", "point.weight:1"), alone=False),
        Frozen(("stem.weight:1", "point.weight:0", "head.weight:1")),
    ),
)
