"""Small networks for small pictures, built from numbers: a multilayer perceptron and residual networks."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from regrow.nets.errors import ModelError
from regrow.nets.fits import check_fits
from regrow.nets.loaded import Origin

MOST = 2**16
GROUP = 2
"""Channels that a GroupNorm takes together: few, as a network with GroupNorm is widened by whole groups."""


def small(spec: str, shape: Sequence[int], classes: int, seed: int = 0) -> tuple[nn.Module, Origin]:
    """A network by its short name, with drawn weights.

    Args:
        spec: ``mlp:100-100`` (widths of hidden layers) or ``resnet:16`` (width of the first stage), ``resnet:16-3``
            (stages, one residual block each); ``resnet-gn:16-3`` is the same with GroupNorm, whose answers rest on
            the input alone, where a BatchNorm's rest on what was seen last.
        shape: Of an input, ``[C, H, W]``.
        classes: How many logits.
        seed: Of the weights.

    Raises:
        ModelError: If the name is neither.

    >>> net, origin = small("mlp:8-6", (1, 4, 4), 3)
    >>> net(torch.zeros(2, 1, 4, 4)).shape, origin.config["widths"]
    (torch.Size([2, 3]), [8, 6])
    """
    origin = origin_of_small(spec, shape, classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_small(origin), origin


def origin_of_small(spec: str, shape: Sequence[int], classes: int) -> Origin:
    """How to build a network of a short name, found to fit into memory.

    Args:
        spec: As for :func:`small`.
        shape: Of an input, ``[C, H, W]``.
        classes: How many logits.

    Raises:
        ModelError: If there is no such network.
        ResourceError: If there is not enough memory for it.
    """
    kind, _, numbers = spec.partition(":")
    if kind not in BUILDERS or not re.fullmatch(r"\d{1,5}(-\d{1,5})*", numbers):
        raise ModelError(
            f"no small network {spec!r}; write mlp:100-100 (hidden widths), resnet:16-3 (width, stages) or "
            "resnet-gn:16-3 (the same with GroupNorm)"
        )
    config = {"widths": [int(n) for n in numbers.split("-")], "shape": list(map(int, shape)), "classes": classes}
    origin = Origin("small", kind, config, spec)
    _builder(origin)
    return origin


def build_small(origin: Origin) -> nn.Module:
    """The network of an origin, with drawn weights.

    Raises:
        ModelError: If its numbers are no sizes.
    """
    return _builder(origin)().eval()


def _builder(origin: Origin) -> Callable[[], nn.Module]:
    """What builds the network of an origin; its numbers are checked, and its weights fit into memory."""
    config: Mapping[str, Any] = origin.config
    numbers = [config.get("classes"), *_list(config.get("widths")), *_list(config.get("shape"))]
    if origin.reference not in BUILDERS or not all(type(n) is int and 0 < n <= MOST for n in numbers):
        raise ModelError(
            f"{origin.reference!r} with {dict(config)!s:.80} is not a small network, whose sizes are 1 to {MOST:,}; "
            "use other sizes, or restore the file that they come from"
        )
    spelled = "-".join(map(str, config["widths"]))
    build = partial(BUILDERS[origin.reference], config["widths"], config["shape"], config["classes"])
    check_fits(build, f"the network {origin.reference}:{spelled}")
    return build


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) and 0 < len(value) <= 64 else [None]


def mlp(widths: Sequence[int], shape: Sequence[int], classes: int) -> nn.Module:
    """Linear layers with ReLUs between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise([prod(shape), *widths]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


class ResidualBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))), with a 1 × 1 shortcut where the width changes."""

    def __init__(self, before: int, after: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), norm(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), norm(after)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, before, H, W]`` → ``[N, after, H / stride, W / stride]``."""
        hidden: Tensor = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.relu(self.shortcut(x) + self.bn2(self.conv2(hidden)))
        return out


def resnet(
    widths: Sequence[int], shape: Sequence[int], classes: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    """A stem, stages of one residual block (each twice as wide and half as large as the one before), a linear head."""
    width, stages = widths[0], widths[1] if len(widths) > 1 else 3
    sizes = [width * 2**i for i in range(min(stages, 8))]
    stem = [nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), norm(width), nn.ReLU()]
    blocks = [ResidualBlock(b, a, 1 if i == 0 else 2, norm) for i, (b, a) in enumerate(pairwise([width, *sizes]))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], classes))


def resnet_gn(widths: Sequence[int], shape: Sequence[int], classes: int) -> nn.Module:
    """The residual network with GroupNorm, two channels in a group.

    Raises:
        ModelError: If the width is odd.
    """
    if widths[0] % GROUP:
        raise ModelError(f"resnet-gn:{widths[0]} has groups of {GROUP} channels; take an even width")
    return resnet(widths, shape, classes, lambda n: nn.GroupNorm(n // GROUP, n))


BUILDERS: dict[str, Callable[[Sequence[int], Sequence[int], int], nn.Module]] = {
    "mlp": mlp,
    "resnet": resnet,
    "resnet-gn": resnet_gn,
}
