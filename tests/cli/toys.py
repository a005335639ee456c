"""Models of one's own for the command line, each with its example input."""

import torch
from torch import nn


class Classifier(nn.Module):
    """A small convolutional classifier of 8 × 8 grey pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of ten classes."""
        return self.head(self.body(x))


class ResidualBlock(nn.Module):
    """A residual block of convolutions with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.second_norm = nn.Conv2d(6, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add to the input, ``[batch, width, height, width]``."""
        return x + self.second_norm(self.second(self.first_norm(self.first(x)).relu()))


class Residual(nn.Module):
    """A classifier of 8 × 8 grey pictures: a stack of residual blocks, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(8) for _ in range(2)))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of ten classes."""
        return self.head(self.pool(self.blocks(self.stem(x))))


class Spectral(nn.Module):
    """Linear layers with a Fourier transform between them, which no rule reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Four numbers."""
        return self.second(torch.fft.fft(self.first(x)).real)


class Picking(nn.Module):
    """Linear layers for those rows alone whose first number is positive: data decide how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Four numbers for each of the rows."""
        return self.second(self.first(x[x[:, 0] > 0]).relu())


class Stepping(nn.Module):
    """Linear layers, and a residual step between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(6, 4)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Four numbers."""
        x = self.first(x)
        return self.last(x + self.body(x))


def classifier() -> tuple[nn.Module, torch.Tensor]:
    """A classifier with a fixed seed."""
    torch.manual_seed(0)
    return Classifier(), torch.randn(1, 1, 8, 8)


def residual() -> tuple[nn.Module, torch.Tensor]:
    """A classifier with a stack of blocks."""
    torch.manual_seed(0)
    return Residual(), torch.randn(2, 1, 8, 8)


def stepping() -> tuple[nn.Module, torch.Tensor]:
    """A network with a branch."""
    torch.manual_seed(0)
    return Stepping(), torch.randn(2, 8)


def spectral() -> tuple[nn.Module, torch.Tensor]:
    """A network with an operation that has no rule."""
    torch.manual_seed(0)
    return Spectral(), torch.randn(1, 8)


def picking() -> tuple[nn.Module, torch.Tensor]:
    """A network that is recorded from one run."""
    torch.manual_seed(0)
    return Picking(), torch.randn(6, 8)


def broken() -> tuple[nn.Module, torch.Tensor]:
    """A classifier with a weight that is not a number."""
    model, example = classifier()
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    return model, example
