"""Settings of GPrune-LLM."""

from dataclasses import dataclass, fields
from typing import Annotated

from regrow.scoring.base import BASES
from regrow.scoring.partition import PARTITIONS
from regrow.scoring.reliability import SWITCHES
from regrow.settings.constraints import OneOf, Range, check_constraints

STARTS = ("base", "inner", "uniform")
"""The allocations from which learning may start."""
INSTEAD = ("peaks", "weights")
"""The metrics that order switched modules."""
MEASURED = ("levels", "level_windows", "level_tokens", "risk", "exchanges", "exchange_windows")
"""The settings that only a measured allocation uses."""
LEARNING = ("steps", "windows", "every", "exact_start", "lr", "width", "width_few")
"""The settings that a measured allocation does not use."""


@dataclass(frozen=True)
class Settings:
    """Settings of ``gprune``: base metric, partition into modules, learning of the pruning ratios, compensation.

    Args:
        base: The base method, whose metric and allocation are used: ``flap`` (WIFV), ``wanda_sp``, ``llm_pruner``
            (Taylor), ``magnitude`` or ``fisher``.
        shards: The number of parts into which each source is split, so that the report can tell how far ranks vary
            between sources from sampling noise.
        partition: How units are grouped into modules: ``thresholds``, ``random`` or ``layer``; see
            :mod:`regrow.scoring.partition`.
        switch: Which modules are ordered without activations: ``blend``, ``even``, ``unreliable``, ``never``,
            ``always`` or ``reversed``; see :mod:`regrow.scoring.reliability`.
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
        allocation: How the pruning ratios are chosen: ``learned`` from the start by gradients, per module; or
            ``measured``, per axis, by forward passes alone; the start is returned if it is better on held-out text.
        levels: ``measured``: the number of pruning ratios at which each axis alone is measured.
        level_windows: ``measured``: the number of windows of each source on which axes are measured.
        level_tokens: ``measured``: how many tokens of each of these windows are used; 0: all.
        risk: ``measured``: the divergence of an axis alone that counts: ``worst``: on the source where it is largest;
            ``mean``: over the sources. Last blocks may matter on few kinds of text, and much there.
        exchanges: ``measured``: the largest number of rounds in which cost is exchanged between axes.
        exchange_windows: ``measured``: the number of windows of each source on which an exchange is judged.
        steps: ``learned``: steps of learning; 0 keeps the start.
        windows: Calibration windows per step.
        every: The number of steps between two evaluations of the allocation on held-out text.
        held_out: The fraction of each source's windows that is used for evaluation only.
        exact_start: Whether learning starts exactly at the start, ratios of 0 and 1 too; otherwise these are moved to
            2 % and 98 % of ``most``.
        margin: By how many paired standard errors over held-out windows a learned or measured allocation must be better
            than the start; otherwise the start is returned. The step of learning is chosen on the same windows, which
            favours a learned allocation; the exchanges of a measured one are chosen on others.
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
    allocation: Annotated[str, OneOf("learned", "measured")] = "learned"
    levels: Annotated[int, Range(1)] = 2
    level_windows: Annotated[int, Range(1)] = 1
    level_tokens: Annotated[int, Range(0)] = 128
    risk: Annotated[str, OneOf("worst", "mean")] = "worst"
    exchanges: Annotated[int, Range(0)] = 2
    exchange_windows: Annotated[int, Range(1)] = 2
    steps: Annotated[int, Range(0)] = 40
    windows: Annotated[int, Range(1)] = 2
    every: Annotated[int, Range(1)] = 10
    held_out: Annotated[float, Range(0, 1, above=True, below=True)] = 0.25
    exact_start: bool = False
    margin: Annotated[float, Range(0)] = 0.0
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
        measured = self.allocation == "measured"
        ignored = LEARNING if measured else MEASURED
        for one in fields(self):
            if one.name in ignored and getattr(self, one.name) != one.default:
                other = "learned" if measured else "measured"
                raise ValueError(
                    f"gprune: allocation={self.allocation} does not use {one.name}, got {getattr(self, one.name)!r}; "
                    f"leave {one.name} out, or give allocation={other}"
                )
