"""Image files as a data set that is read while it is used."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from regrow.core.limits import check_regular
from regrow.data.vision import image_tensor, normalise_, open_image


@dataclass(frozen=True)
class PictureFiles:
    """Image files as a data set of pairs (image ``[3, H, W]``, class), read when they are asked for.

    Args:
        files: The images and their classes, in order.
        size: Height and width in pixels; if they are equal, images are scaled and cropped as by :func:`image_tensor`,
            otherwise they are scaled.
        normalised: As for :func:`image_tensor`.
    """

    files: tuple[tuple[Path, int], ...]
    size: tuple[int, int]
    normalised: bool

    def __len__(self) -> int:
        return len(self.files)

    @property
    def targets(self) -> list[int]:
        """The class of each image."""
        return [label for _, label in self.files]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its class."""
        (file, label), (height, width) = self.files[index], self.size
        if height == width:
            return image_tensor(file, height, normalised=self.normalised), label
        picture = open_image(file)
        if picture.size != (width, height):
            picture = picture.resize((width, height))
        colours = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return normalise_(colours) if self.normalised else colours, label


def image_size(file: Path) -> tuple[int, int]:
    """Return the size (width, height) of an image, from its header.

    Args:
        file: The image file.

    Raises:
        SourceError: If pillow is not installed, or the file is not an image.
    """
    try:
        from PIL import Image

        check_regular(file)
        with Image.open(file) as opened:
            return opened.size
    except Exception:  # reading the image says what is wrong with it
        size: tuple[int, int] = open_image(file).size
        return size
