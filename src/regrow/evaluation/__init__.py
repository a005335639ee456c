"""Measure networks: perplexity, multiple choice, accuracy, speed, memory and size, each with its error."""

from regrow.evaluation.choice import Choices, choices, items_in
from regrow.evaluation.generation import generate_source
from regrow.evaluation.measure import dense, macs, size, speed
from regrow.evaluation.quality import Accuracy, Perplexity, accuracy, mean_and_error, paired_difference, perplexity

__all__ = [
    "Accuracy",
    "Choices",
    "Perplexity",
    "accuracy",
    "choices",
    "dense",
    "generate_source",
    "items_in",
    "macs",
    "mean_and_error",
    "paired_difference",
    "perplexity",
    "size",
    "speed",
]
