"""Settings of GPrune."""

from dataclasses import dataclass

from regrow.scoring import PATHS
from regrow.scoring.base import BASES
from regrow.scoring.partition import PARTITIONS
from regrow.scoring.reliability import SWITCHES
from regrow.scoring.sensitivity import SCALES

STARTS = ("base", "inner", "uniform")
"""The allocations that learning may start with."""
INSTEAD = ("weights", *PATHS, "mean_rank")


@dataclass(frozen=True)
class Settings:
    """Settings of ``gprune``.

    Args:
        base: The metric and start: ``flap`` (WIFV), ``wanda_sp``, ``llm_pruner`` (Taylor) or ``magnitude``.
        shards: Into how many parts each source is split, to tell sensitivity from sampling noise.
        rank: ``raw``: sensitivity of percentile ranks; ``probit``: of their normal quantiles.
        denoise: Take the noise within sources out of the sensitivity.
        partition: ``thresholds``, ``grid``, ``quantiles``, ``profiles``, ``random`` or ``layer``: see there.
        bins: How many modules ``quantiles`` and ``profiles`` make of each layer.
        switch: ``blend``, ``even``, ``unreliable``, ``halves``, ``never``, ``always`` or ``reversed``.
        switch_most: The largest share of units that ``unreliable`` and ``reversed`` may switch.
        instead: What orders switched modules: ``peaks`` (peak to peak of a unit's rows), ``norms`` (their norms, as a
            product), ``weights`` (weight-only factor of the base), ``mean_rank``.
        cross: Teach and judge each source with the order and the means of the others alone, as if it were a kind that
            calibration never saw.
        start: Where learning starts: ``base`` (the base method's own allocation), ``inner`` (the same share of every
            axis outside the first and last blocks; axes of few units stay whole), ``uniform`` (the same share of every
            axis), or the ``best`` of these three on held-out text.
        steps: Steps of learning; 0 keeps the start.
        windows: Calibration windows per step.
        every: After how many steps an allocation is evaluated on held-out text.
        held_out: What share of each source's windows judges and does not teach.
        lr: Learning rate of the modules' logits.
        width: Over what range of places in a module the gradient is felt; ``width_few``: where small axes are pooled.
        width_few: As ``width``, for modules of pooled axes.
        most: The largest share any module may give up while learning.
        loss: ``kl``: divergence of the dense network's answers from the pruned one's; ``cross_entropy``: of the text.
        memory: GiB of the dense network's answers that may be kept instead of computed again.
        compensate: Let the mean of dropped inputs stand in for them; the learner sees it.
        minimum: How many units every axis keeps at least.
        seed: Of random partitions, k-means and the order of windows.
    """

    base: str = "flap"
    shards: int = 4
    rank: str = "raw"
    denoise: bool = False
    partition: str = "thresholds"
    bins: int = 4
    switch: str = "blend"
    switch_most: float = 0.25
    instead: str = "peaks"
    cross: bool = True
    start: str = "best"
    steps: int = 40
    windows: int = 2
    every: int = 10
    held_out: float = 0.25
    lr: float = 0.1
    width: float = 0.05
    width_few: float = 0.1
    most: float = 0.95
    loss: str = "kl"
    memory: float = 3.0
    compensate: bool = True
    minimum: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        known = {"base": BASES, "rank": SCALES, "partition": PARTITIONS, "switch": SWITCHES, "instead": INSTEAD}
        for name, values in {**known, "start": (*STARTS, "best"), "loss": ("kl", "cross_entropy")}.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"gprune: {name} is one of {', '.join(values)}; got {value!r}")
        if min(self.shards, self.windows, self.every) < 1 or self.steps < 0:
            raise ValueError("gprune: shards, windows and every are at least 1, steps at least 0")
        if self.shards < 2 and (self.denoise or self.switch == "halves"):
            raise ValueError("gprune: telling noise from sensitivity takes shards=2 or more")
        if not (0 < self.most < 1 and 0 < self.held_out < 1 and min(self.width, self.width_few) > 0):
            raise ValueError("gprune: most and held_out lie between 0 and 1, width and width_few above 0")
