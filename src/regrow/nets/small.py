"""Small networks for small images, by short names: multilayer perceptrons and residual networks."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.limits import check_memory
from regrow.nets.loaded import ModelError, Origin

MAX_SIZE = 2**16
GROUP = 2  # channels per group of a GroupNorm: few, since a network with GroupNorm is widened by whole groups


def small(spec: str, shape: Sequence[int], classes: int, seed: int = 0) -> tuple[nn.Module, Origin]:
    """Build a network by its short name, with random weights; also return its origin.

    ``mlp:100-100`` names widths of hidden layers, ``resnet:16-3`` the width of the first stage, and stages of one
    residual block each. ``resnet-gn:16-3`` is the same with GroupNorm, whose output depends on the input alone, while
    BatchNorm's depends on running statistics of earlier batches.

    >>> net, origin = small("mlp:8-6", (1, 4, 4), 3)
    >>> net(torch.zeros(2, 1, 4, 4)).shape, origin.config["widths"]
    (torch.Size([2, 3]), [8, 6])
    """
    kind, _, numbers = spec.partition(":")
    if kind not in BUILDERS or not re.fullmatch(r"\d{1,5}(-\d{1,5})*", numbers):
        raise ModelError(
            f"no small network {spec!r}; write mlp:100-100 (hidden widths), resnet:16-3 (width, stages) or "
            "resnet-gn:16-3 (the same with GroupNorm)"
        )
    config = {"widths": [int(n) for n in numbers.split("-")], "shape": list(map(int, shape)), "classes": classes}
    origin = Origin("small", kind, config, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_small(origin), origin


def build_small(origin: Origin) -> nn.Module:
    """Build the network of an origin, with random weights, in eval mode, after checking its sizes and memory."""
    config: Mapping[str, Any] = origin.config
    lists = [config.get("widths"), config.get("shape")]
    numbers = [config.get("classes"), *(n for part in lists if isinstance(part, list) for n in part)]
    known = all(isinstance(part, list) and 0 < len(part) <= 64 for part in lists)
    if origin.reference not in BUILDERS or not known or not all(type(n) is int and 0 < n <= MAX_SIZE for n in numbers):
        problem = f"{origin.reference!r} with {dict(config)!s:.80} is not a small network"
        raise ModelError(
            f"{problem}, whose sizes are 1 to {MAX_SIZE:,}; use other sizes, or restore the file that they come from"
        )
    build = partial(BUILDERS[origin.reference], config["widths"], config["shape"], config["classes"])
    with torch.device("meta"):
        tensors = build().state_dict().values()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    name = f"the network {origin.reference}:{'-'.join(map(str, config['widths']))}"
    check_memory(needed, name, "take a smaller network")
    return build().eval()


def mlp(widths: Sequence[int], shape: Sequence[int], classes: int) -> nn.Module:
    """Build a multilayer perceptron: linear layers with ReLUs between them, for flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise([prod(shape), *widths]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


class ResidualBlock(nn.Module):
    """A residual block: shortcut(x) + norm(conv(relu(norm(conv(x))))), followed by a ReLU.

    The shortcut is a 1 × 1 convolution if width or resolution changes.
    """

    def __init__(self, before: int, after: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), norm(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), norm(after)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, before, H, W]`` → ``[N, after, H / stride, W / stride]``."""
        hidden = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.shortcut(x) + self.bn2(self.conv2(hidden)))


def resnet(
    widths: Sequence[int], shape: Sequence[int], classes: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    """Build a small residual network: a stem, stages of one residual block each, and a linear head.

    Each stage is twice as wide as the one before, at half its resolution.
    """
    width, stages = widths[0], widths[1] if len(widths) > 1 else 3
    sizes = [width * 2**i for i in range(min(stages, 8))]
    stem = [nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), norm(width), nn.ReLU()]
    blocks = [ResidualBlock(b, a, 1 if i == 0 else 2, norm) for i, (b, a) in enumerate(pairwise([width, *sizes]))]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], classes))


def resnet_gn(widths: Sequence[int], shape: Sequence[int], classes: int) -> nn.Module:
    """Build a small residual network with GroupNorm, two channels per group."""
    if widths[0] % GROUP:
        raise ModelError(f"resnet-gn:{widths[0]} has groups of {GROUP} channels; take an even width")
    return resnet(widths, shape, classes, lambda n: nn.GroupNorm(n // GROUP, n))


BUILDERS: dict[str, Callable[[Sequence[int], Sequence[int], int], nn.Module]] = {
    "mlp": mlp,
    "resnet": resnet,
    "resnet-gn": resnet_gn,
}
