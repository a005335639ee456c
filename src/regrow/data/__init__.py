"""Text and images as named sources, split into disjoint halves for calibration and evaluation."""

from regrow.data.errors import MissingError, SourceError
from regrow.data.halves import Half
from regrow.data.text import KINDS, Text, text
from regrow.data.vision import digits, images
from regrow.data.windows import windows

__all__ = ["KINDS", "Half", "MissingError", "SourceError", "Text", "digits", "images", "text", "windows"]
