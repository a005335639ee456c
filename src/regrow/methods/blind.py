"""Controls of a search: operations drawn at random, or the same share of every width; nothing is learned.

What any search must beat at the same size, trained the same way (Li and Talwalkar, arXiv 1902.07638; ours).
"""

from dataclasses import dataclass, field, replace

import torch

from regrow.learner import Stand
from regrow.method import Measure
from regrow.searcher import Searcher

CITATION = "controls; Li, Talwalkar, Random Search and Reproducibility for NAS (arXiv 1902.07638)"


@dataclass(frozen=True)
class Settings:
    """Which control.

    Args:
        target: What the network may cost.
        measure: ``params``, ``macs``, ``bytes`` or ``ms``.
        what: ``operations``: they go in a drawn order until the target is met; ``filters``: every axis loses the same
            share of them.
        stages: The last part of the network; set by the run.
        seed: Of the order.
    """

    target: float = 0.0
    measure: str = "params"
    what: str = "operations"
    stages: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.what not in ("operations", "filters"):
            raise ValueError(f"what is operations or filters; got {self.what!r}")
        Measure(self.measure)


def build(settings: Settings) -> "Blind":
    """The learner."""
    return Blind(settings=settings)


@dataclass
class Blind(Searcher):
    """See the module."""

    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        s = self.settings
        self.searched, self.ends, self.most, self.measure = (s.what,), s.stages[-1:], s.target, Measure(s.measure)
        self.learns = False

    def begin(self, at: Stand) -> None:
        """Importances are drawn once, or stand for the place of a filter in its axis."""
        super().begin(at)
        order = replace(at, seed=self.settings.seed).drawn(11)
        drawn = torch.randn(len(self.tensors["alpha"].values), generator=order)
        self.tensors["alpha"].values = drawn
        self.evenly()
        self.masks(at)
