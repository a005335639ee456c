"""Measure networks: perplexity, multiple choice, accuracy, speed, memory and size, each with its error."""

from regrow.evaluation.choice import (
    CHOICE_TOKENS,
    Choices,
    PairedChoices,
    choices,
    count_choice_tokens,
    items_in,
    paired_choices,
)
from regrow.evaluation.generation import generate_source
from regrow.evaluation.harness import Harnessed, harness
from regrow.evaluation.language import Paired, Perplexity, mean_and_error, paired_difference, perplexity
from regrow.evaluation.measure import Size, Speed, dense, macs, size, speed
from regrow.evaluation.memory import Live, Memory, UnpredictableError, predict_memory, prefix_peaks, training
from regrow.evaluation.objective import Accuracy, accuracy
from regrow.evaluation.timing import Latency, fastest_pass, latency, lengthen, timing

__all__ = [
    "CHOICE_TOKENS",
    "Accuracy",
    "Choices",
    "Harnessed",
    "Latency",
    "Live",
    "Memory",
    "Paired",
    "PairedChoices",
    "Perplexity",
    "Size",
    "Speed",
    "UnpredictableError",
    "accuracy",
    "choices",
    "count_choice_tokens",
    "dense",
    "fastest_pass",
    "generate_source",
    "harness",
    "items_in",
    "latency",
    "lengthen",
    "macs",
    "mean_and_error",
    "paired_choices",
    "paired_difference",
    "perplexity",
    "predict_memory",
    "prefix_peaks",
    "size",
    "speed",
    "timing",
    "training",
]
