"""Measure unit importance: one forward (and backward) pass per source → statistics → scores per unit.

Every metric is called with (weights, axes, statistics, *, units) and gives its score from weights alone for
``statistics=None``, so that a method can wrap any of them.
"""

from regrow.scoring.activations import energy, wanda_sp, wifv
from regrow.scoring.base import BASES, Base
from regrow.scoring.collect import collect
from regrow.scoring.combine import normalise, percentile
from regrow.scoring.compensate import constant_inputs, means, uncompensated, weights_without_bias
from regrow.scoring.fisher import fisher
from regrow.scoring.gradients import taylor
from regrow.scoring.massive import Massive, massive
from regrow.scoring.metrics import METRICS, Metric
from regrow.scoring.paths import peak_to_peak
from regrow.scoring.weights import CachedColumns, magnitude, random, readers, scorable, weights_of

__all__ = [
    "BASES",
    "METRICS",
    "Base",
    "CachedColumns",
    "Massive",
    "Metric",
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
