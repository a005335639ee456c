"""Measuring networks: perplexity, choices, accuracy, speed and size, each with its error or spread."""

from regrow.evaluation.language import Paired, Perplexity, paired, perplexity

__all__ = ["Paired", "Perplexity", "paired", "perplexity"]
