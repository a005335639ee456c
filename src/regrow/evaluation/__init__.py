"""Measuring networks: perplexity, choices, accuracy, speed and size, each with its error or spread."""

from regrow.evaluation.choice import Choices, choices, items_in
from regrow.evaluation.language import Paired, Perplexity, paired, perplexity
from regrow.evaluation.size import Size, macs, size
from regrow.evaluation.speed import Speed, speed
from regrow.evaluation.vision import Accuracy, accuracy

__all__ = [
    "Accuracy",
    "Choices",
    "Paired",
    "Perplexity",
    "Size",
    "Speed",
    "accuracy",
    "choices",
    "items_in",
    "macs",
    "paired",
    "perplexity",
    "size",
    "speed",
]
