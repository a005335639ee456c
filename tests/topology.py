"""A network of cells that share one topology: of each edge, a search keeps one operation, the same in all cells."""

import torch
from torch import Tensor, nn

from regrow.core.candidates import Candidates

EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # from node, to node


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def convolution(before: int, after: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(after))


class Cell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.edges = nn.ModuleDict(
            {f"{a}{b}": Candidates(operations(width), tied=f"{a}{b}", single=True) for a, b in EDGES}
        )

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for node in range(1, 4):
            values.append(sum(self.edges[f"{a}{node}"](values[a]) for a in range(node)))
        return values[-1]


def operations(width: int) -> dict[str, nn.Module]:
    return {
        "none": Nothing(),
        "skip": nn.Identity(),
        "conv1": convolution(width, width, 1),
        "conv3": convolution(width, width, 3),
        "avg": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    }


def topology(channels: int = 1, classes: int = 10, width: int = 4) -> nn.Sequential:
    """Three cells, each twice as wide as the one before at half its resolution."""
    net = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), Cell(width))
    for wide in (2 * width, 4 * width):
        net.extend([convolution(wide // 2, wide, 3, 2), Cell(wide)])
    return net.extend([nn.BatchNorm2d(4 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]).append(
        nn.Linear(4 * width, classes)
    )
