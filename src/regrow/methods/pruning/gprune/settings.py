"""Settings of GPrune-LLM."""

from dataclasses import dataclass
from typing import Annotated

from regrow.scoring.metrics import BASES
from regrow.scoring.modules import PARTITIONS, SWITCHES
from regrow.settings.constraints import OneOf, Range, check_constraints

STARTS = ("base", "inner", "uniform")
"""The allocations from which learning may start."""
INSTEAD = ("peaks", "weights")
"""The metrics that order switched modules."""


@dataclass(frozen=True)
class Settings:
    """Settings of ``gprune``: base metric, partition into modules, learning of the pruning ratios, compensation.

    Args:
        base: The base method, whose metric and allocation are used: ``flap`` (WIFV), ``wanda_sp``, ``llm_pruner``
            (Taylor), ``magnitude`` or ``fisher``.
        shards: The number of parts into which each source is split, so that the report can tell how far ranks vary
            between sources from sampling noise.
        partition: How units are grouped into modules: ``thresholds``, ``random`` or ``layer``; see
            :mod:`regrow.scoring.modules`.
        switch: Which modules are ordered without activations: ``blend``, ``even``, ``unreliable``, ``never``,
            ``always`` or ``reversed``; see :mod:`regrow.scoring.modules`.
        switch_most: The largest fraction of units that ``unreliable`` and ``reversed`` may switch.
        instead: The metric that orders switched modules: ``peaks`` (peak to peak of a unit's rows) or ``weights`` (the
            weight-only part of the base metric).
        scores_from: ``pooled``: units are scored on all sources together; the name of a source: on that one alone (on
            the next one, where that one is left out), while sensitivity and the means of dropped inputs are of all.
        cross: Whether each source is trained and judged with the order and the means of the other sources alone, as if
            it were a text domain that calibration never saw.
        start: Where learning starts: ``base`` (the base method's own allocation), ``inner`` (the same fraction of every
            axis outside the first and last blocks; axes of few units are not pruned), ``uniform`` (the same fraction of
            every axis), or the ``best`` of these three on held-out text.
        steps: Steps of learning; 0 keeps the start.
        windows: Calibration windows per step.
        every: The number of steps between two evaluations of the allocation on held-out text.
        held_out: The fraction of each source's windows that is used for evaluation only.
        lr: Learning rate of the modules' logits.
        width: The range of relative ranks in a module, around the pruning ratio, that has a gradient.
        width_few: As ``width``, for modules of several small axes that are pooled.
        most: The largest fraction of a module that may be cut while learning.
        memory: GiB of the dense network's predictions that may be cached instead of computed again.
        compensate: Whether the mean of dropped inputs is added to biases; the masked network in learning does the same.
        minimum: The smallest number of units that stay in an axis.
        seed: Seed of random partitions and of the order of windows.
    """

    base: Annotated[str, OneOf(*BASES)] = "flap"
    shards: Annotated[int, Range(1)] = 4
    partition: Annotated[str, OneOf(*PARTITIONS)] = "thresholds"
    switch: Annotated[str, OneOf(*SWITCHES)] = "blend"
    switch_most: Annotated[float, Range(0, 1)] = 0.25
    instead: Annotated[str, OneOf(*INSTEAD)] = "peaks"
    scores_from: str = "pooled"
    cross: bool = True
    start: Annotated[str, OneOf(*STARTS, "best")] = "best"
    steps: Annotated[int, Range(0)] = 40
    windows: Annotated[int, Range(1)] = 2
    every: Annotated[int, Range(1)] = 10
    held_out: Annotated[float, Range(0, 1, above=True, below=True)] = 0.25
    lr: Annotated[float, Range(0, above=True)] = 0.1
    width: Annotated[float, Range(0, above=True)] = 0.05
    width_few: Annotated[float, Range(0, above=True)] = 0.1
    most: Annotated[float, Range(0, 1, above=True, below=True)] = 0.95
    memory: Annotated[float, Range(0)] = 3.0
    compensate: bool = True
    minimum: Annotated[int, Range(1)] = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_constraints(self)
