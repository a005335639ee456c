"""Text and images as named sources, split into disjoint halves for calibration and evaluation."""

from regrow.data.halves import Half, MissingError, SourceError
from regrow.data.text import TEXT_DOMAINS, Text, text, windows
from regrow.data.vision import digits, images

__all__ = ["TEXT_DOMAINS", "Half", "MissingError", "SourceError", "Text", "digits", "images", "text", "windows"]
