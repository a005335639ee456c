"""What a run left: its rows of measurements, and its network beside another."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import regrow


def rows(folder: Any, what: str) -> list[dict[str, Any]]:
    """The rows of one kind, in order."""
    return [row for row in folder.metrics() if row["what"] == what]


def same_parameters(one: nn.Module | Path, other: nn.Module | Path) -> bool:
    """Whether two networks, or those saved in two folders, have the same parameters, bit for bit."""
    nets = [net if isinstance(net, nn.Module) else regrow.load(net) for net in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))
