"""The candidate operations of networks of cells."""

from torch import nn

from regrow.nets.errors import ModelError

OPERATIONS = ("skip", "sep3", "sep5", "dil3", "dil5", "avg", "max")
"""The candidate operations, in the order of the genotypes in MGAS's code."""


class Pointwise(nn.Sequential):
    """ReLU → 1 × 1 convolution → BatchNorm, with 2 × 2 average pooling first if the stride is 2."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        first: list[nn.Module] = [nn.ReLU()] + ([nn.AvgPool2d(2, ceil_mode=True)] if stride == 2 else [])
        super().__init__(*first, nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))


class Depthwise(nn.Sequential):
    """ReLU → depthwise convolution → 1 × 1 convolution → BatchNorm."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, dilation: int) -> None:
        pad = dilation * (kernel - 1) // 2
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(before, before, kernel, stride, pad, dilation, groups=before, bias=False),
            nn.Conv2d(before, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )


def operation(name: str, before: int, after: int, stride: int, mid: int = 0) -> nn.Module:
    """Build an operation of the search space.

    Args:
        name: One of ``OPERATIONS``.
        before: Channels in.
        after: Channels out; pools, and ``skip`` with stride 1, cannot change them.
        stride: 1 or 2.
        mid: Channels between the two halves of a ``sep``; ``before`` if 0.

    Raises:
        ModelError: If the operation cannot map ``before`` to ``after`` channels.
    """
    kernel = int(name[-1]) if name[-1].isdigit() else 3
    if name.startswith("sep"):
        mid = mid or before
        return nn.Sequential(Depthwise(before, mid, kernel, stride, 1), Depthwise(mid, after, kernel, 1, 1))
    if name.startswith("dil"):
        return Depthwise(before, after, kernel, stride, 2)
    if name == "skip" and stride == 2:
        return Pointwise(before, after, 2)
    if before != after:
        raise ModelError(f"{name} cannot lead from {before} channels to {after}; only sep and dil can")
    if name == "skip":
        return nn.Identity()
    return nn.AvgPool2d(3, stride, 1, count_include_pad=False) if name == "avg" else nn.MaxPool2d(3, stride, 1)
