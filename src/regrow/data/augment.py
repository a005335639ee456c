"""Data augmentation of whole image batches (shifts, flips, cutout), drawn from torch's global generator."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 4
"""The largest shift in pixels, in both directions."""


def is_images(inputs: Any) -> bool:
    """Whether inputs have the form of images, ``[N, C, H, W]`` of floats."""
    return isinstance(inputs, Tensor) and inputs.dim() == 4 and inputs.is_floating_point()


def shift_and_flip(pictures: Tensor) -> Tensor:
    """Return images randomly shifted by up to 4 pixels (zero-padded) and mirrored with probability ½.

    >>> int(shift_and_flip(torch.ones(2, 1, 8, 8)).sum()) in range(32, 129)
    True
    """
    n, _, height, width = pictures.shape
    padded = F.pad(pictures, (SHIFT,) * 4)
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, n)).unbind(0)
    rows = (down[:, None] + torch.arange(height))[:, None, :, None]
    columns = (right[:, None] + torch.arange(width))[:, None, None, :]
    columns = torch.where(torch.rand(n)[:, None, None, None] < 0.5, columns.flip(-1), columns)
    which, channels = torch.arange(n)[:, None, None, None], torch.arange(pictures.shape[1])[None, :, None, None]
    return padded[tuple(index.to(pictures.device) for index in (which, channels, rows, columns))]


def cut_out(pictures: Tensor, side: int) -> Tensor:
    """Return images with a random square set to 0 (cutout); its centre may lie anywhere in the image.

    Source: DeVries and Taylor (arXiv 1708.04552).

    >>> int((cut_out(torch.ones(1, 1, 8, 8), 4) == 0).sum()) in range(4, 17)
    True
    """
    if not side:
        return pictures
    n, _, height, width = pictures.shape
    inside = []
    for size in (height, width):
        first = torch.randint(size, (n, 1)) - side // 2
        inside.append((torch.arange(size) >= first) & (torch.arange(size) < first + side))
    blank = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return pictures.masked_fill(blank.to(pictures.device), 0.0)
