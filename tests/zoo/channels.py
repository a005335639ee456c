"""Operations that treat each channel alone, split the channels, or lay them out anew."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.facts import Fact, Frozen, Has, NotNeutral, SameCount
from zoo.networks import Net, conv, images, network

STEM = ("stem.weight:0", "norm.weight:0", "norm.running_mean:0")


def along_channels(
    name: str,
    wire: Callable[..., Tensor],
    *expect: Fact,
    width: int = 8,
    after: int = 0,
    size: tuple[int, int] = (5, 4),
    **more: Any,
) -> Net:
    """Convolution and BatchNorm, the operation to test on their channels, then a convolution and a head."""
    parts = more.pop("parts", dict)
    whole = more.pop("wire_whole", lambda m, x: m.head(m.last(wire(m, m.norm(m.stem(x)))).relu().mean((2, 3))))
    return network(
        name,
        whole,
        lambda: {
            "stem": conv(3, width, bias=False),
            "norm": nn.BatchNorm2d(width),
            "last": conv(after or width, 6),
            "head": nn.Linear(6, 5),
            **parts(),
        },
        images(3, *size),
        Has(6, ("last.weight:0", "last.bias:0", "head.weight:1"), alone=True),
        *expect,
        **more,
    )


def _shuffle(m: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 3, channels // 3, height, width).transpose(1, 2).flatten(1, 2)


def _halves(m: Any, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return m.one(x[:, :half]).relu() + m.two(x[:, half:]).tanh()


def _chunks(m: Any, x: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=1)
    return m.one(one).relu() + m.two(two).tanh()


def _gated(m: Any, x: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=1)
    return one * two.sigmoid()


def _standardised(m: Any, x: Tensor) -> Tensor:
    weight = m.mid.weight
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 0.1)
    return F.conv2d(x, weight, m.mid.bias, padding=1)


CHANNELS = (
    along_channels("sigmoid_after_norm", lambda m, x: x.sigmoid(), Has(8, (*STEM, "last.weight:1"))),
    along_channels("exp_shift", lambda m, x: (x + 3).exp(), Has(8, (*STEM, "last.weight:1"))),
    along_channels("softmax_over_space", lambda m, x: x.softmax(-1), Has(8, (*STEM, "last.weight:1"))),
    along_channels("mean_over_space", lambda m, x: x - x.mean((2, 3), keepdim=True), Has(8, (*STEM, "last.weight:1"))),
    along_channels(
        "instance_norm",
        lambda m, x: m.each(x).relu(),
        Has(8, (*STEM, "each.weight:0", "last.weight:1")),
        parts=lambda: {"each": nn.InstanceNorm2d(8, affine=True)},
    ),
    along_channels("flip_space", lambda m, x: x.flip(2).roll(1, 3), Has(8, (*STEM, "last.weight:1"))),
    along_channels("glu", lambda m, x: F.glu(x, 1), Has(5, (*STEM, "last.weight:1")), width=10, after=5),
    along_channels("chunk_gate", _gated, Has(5, (*STEM, "last.weight:1")), width=10, after=5),
    along_channels(
        "chunk_apart",
        _chunks,
        Has(5, (*STEM, "one.weight:1")),
        Has(5, (*STEM, "two.weight:1")),
        SameCount(5, "one.weight:1", "two.weight:1"),
        width=10,
        after=7,
        parts=lambda: {"one": conv(5, 7), "two": conv(5, 7)},
    ),
    along_channels(
        "half_split",
        _halves,
        Has(5, (*STEM, "one.weight:1")),
        Has(5, (*STEM, "two.weight:1")),
        SameCount(5, "one.weight:1", "two.weight:1"),
        width=10,
        after=7,
        parts=lambda: {"one": conv(5, 7), "two": conv(5, 7)},
    ),
    along_channels(
        "pixel_shuffle", lambda m, x: F.pixel_shuffle(x, 2), Has(5, (*STEM, "last.weight:1")), width=20, after=5
    ),
    along_channels("channel_shuffle", _shuffle, Has(4, (*STEM, "last.weight:1")), width=12),
    along_channels("resize_channels", lambda m, x: F.interpolate(x.flatten(2).mT, 5).mT.unflatten(2, (5, 4)), after=5),
    along_channels("unfold", lambda m, x: F.unfold(x, 1).unflatten(2, (5, 4))),
    along_channels(
        "buffer_of_size",
        lambda m, x: x * m.scale,
        Has(8, STEM),
        parts=lambda: {"scale": nn.Buffer(torch.tensor(8**-0.5))},
    ),
    along_channels("constant_of_size", lambda m, x: x * x.new_full(x.shape[1:], 0.3), Has(8, STEM)),
    along_channels("written_over", lambda m, x: x + torch.zeros_like(x).copy_(x.sigmoid()), Has(8, STEM)),
    along_channels(
        "einsum",
        lambda m, x: torch.einsum("bchw,oc->bohw", x, m.mix),
        Has(8, (*STEM, "mix:1")),
        Has(7, ("mix:0", "last.weight:1")),
        after=7,
        parts=lambda: {"mix": nn.Parameter(torch.zeros(7, 8))},
    ),
    along_channels(
        "einsum_entrywise",
        lambda m, x: torch.einsum("b...,...b->b...", x, x.sigmoid().movedim(0, -1)),
        Has(8, STEM),
    ),
    along_channels(
        "einsum_inner",
        lambda m, x: x * torch.einsum("bchw,bchw->bhw", x, x.sigmoid())[:, None],
        Has(8, STEM),
        zeros="producers",
    ),
    along_channels(
        "weight_norm",
        lambda m, x: m.normed(x),
        Frozen(STEM),
        Has(7, ("normed.parametrizations.weight.original1:0", "normed.bias:0", "last.weight:1")),
        after=7,
        parts=lambda: {"normed": nn.utils.parametrizations.weight_norm(conv(8, 7))},
    ),
    along_channels(
        "weight_norm_relu",
        lambda m, x: m.mid(x).relu(),
        after=7,
        parts=lambda: {"mid": nn.utils.parametrizations.weight_norm(conv(8, 7))},
    ),
    along_channels(
        "standardised_weight",
        _standardised,
        NotNeutral(STEM),
        after=7,
        parts=lambda: {"mid": conv(8, 7)},
    ),
)
