"""Measuring networks: perplexity, choices, accuracy, speed, memory and size, each with its error or spread."""

from regrow.evaluation.choice import Choices, choices, items_in
from regrow.evaluation.harness import Harnessed, harness
from regrow.evaluation.language import Paired, Perplexity, paired, perplexity
from regrow.evaluation.latency import Latency, latency
from regrow.evaluation.memory import Live, Memory, UnpredictableError, measured, predicted, training
from regrow.evaluation.prefixes import prefix_peaks
from regrow.evaluation.size import Size, dense, size
from regrow.evaluation.speed import Speed, speed
from regrow.evaluation.timing import fastest_pass, lengthened, timing
from regrow.evaluation.vision import Accuracy, accuracy
from regrow.work import macs

__all__ = [
    "Accuracy",
    "Choices",
    "Harnessed",
    "Latency",
    "Live",
    "Memory",
    "Paired",
    "Perplexity",
    "Size",
    "Speed",
    "UnpredictableError",
    "accuracy",
    "choices",
    "dense",
    "fastest_pass",
    "harness",
    "items_in",
    "latency",
    "lengthened",
    "macs",
    "measured",
    "paired",
    "perplexity",
    "predicted",
    "prefix_peaks",
    "size",
    "speed",
    "timing",
    "training",
]
