"""Measure unit importance: one forward (and backward) pass per source → statistics → scores per unit.

Every metric is called with (weights, axes, statistics, *, units) and gives its score from weights alone for
``statistics=None``, so that a method can wrap any of them.
"""

from regrow.scoring.collect import collect
from regrow.scoring.compensate import constant_inputs, means, uncompensated, weights_without_bias
from regrow.scoring.metrics import (
    METRICS,
    energy,
    fisher,
    magnitude,
    massive,
    peak_to_peak,
    random,
    taylor,
    wanda_sp,
    wifv,
)
from regrow.scoring.spaces import normalise, percentile
from regrow.scoring.weights import CachedColumns, readers, scorable, weights_of

__all__ = [
    "METRICS",
    "CachedColumns",
    "collect",
    "constant_inputs",
    "energy",
    "fisher",
    "magnitude",
    "massive",
    "means",
    "normalise",
    "peak_to_peak",
    "percentile",
    "random",
    "readers",
    "scorable",
    "taylor",
    "uncompensated",
    "wanda_sp",
    "weights_of",
    "weights_without_bias",
    "wifv",
]
