"""Text and images as named sources, split into disjoint halves for calibration and evaluation."""

from regrow.data.halves import Half, MissingError, SourceError
from regrow.data.text import KINDS, Text, text, windows
from regrow.data.vision import digits, images

__all__ = ["KINDS", "Half", "MissingError", "SourceError", "Text", "digits", "images", "text", "windows"]
