"""Controls of a search: operations drawn at random, the same share of every width, the smallest weights; none learned.

What any search must beat at the same size, trained the same way (Li and Talwalkar, arXiv 1902.07638; ours). Given the
``split`` of what a search left out, it tells whether it mattered which units that search chose, or only of what level.
"""

from dataclasses import dataclass, field, replace

import torch

from regrow.allocation.levels import check_levels
from regrow.learner import Stand
from regrow.method import Measure
from regrow.methods.search.searcher import LEVELS, Searcher
from regrow.plan import Plan

CITATION = "controls; Li, Talwalkar, Random Search and Reproducibility for NAS (arXiv 1902.07638)"


@dataclass(frozen=True)
class Settings:
    """Which control.

    Args:
        target: What the network may cost.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        what: ``operations``: they go in a drawn order until the target is met; ``filters``: every axis loses the same
            share of them; ``weights``: the smallest go, under ``nonzero`` alone. Several go in this order.
        split: Where they are several: the share of what goes that each bears; 1 in all.
        keep_bare: Whether operations that hold nothing but their scale, such as pools, go last.
        stages: The last part of the network; set by the run.
        seed: Of the order.
    """

    target: float = 0.0
    measure: str = "params"
    what: tuple[str, ...] = ("operations",)
    split: tuple[float, ...] = ()
    keep_bare: bool = False
    stages: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.what or list(self.what) != [level for level in LEVELS if level in self.what]:
            raise ValueError(f"what is of {', '.join(LEVELS)}, in this order; got {', '.join(self.what) or 'none'}")
        if len(self.what) > 1 and (
            len(self.split) != len(self.what) or min(self.split) < 0 or abs(sum(self.split) - 1) > 1e-6
        ):
            told = ", ".join(f"{share:g}" for share in self.split) or "none"
            raise ValueError(f"split has a share of what goes for each of {', '.join(self.what)}, 1 in all; got {told}")
        if self.keep_bare and ("operations" not in self.what or self.measure == Measure.TIME):
            raise ValueError("keep_bare is of operations, and of a target that some cost nothing of: not of ms")
        check_levels(self.what, Measure(self.measure))


def build(settings: Settings) -> "Blind":
    """The learner."""
    return Blind(settings=settings)


@dataclass
class Blind(Searcher):
    """See the module."""

    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        s = self.settings
        self.searched, self.ends, self.most, self.measure = s.what, s.stages[-1:], s.target, Measure(s.measure)
        self.learns = False

    def begin(self, at: Stand) -> None:
        """Importances are drawn once, or stand for the place of a filter in its axis."""
        super().begin(at)
        order = replace(at, seed=self.settings.seed).drawn(11)
        drawn = torch.randn(len(self.tensors["alpha"].values), generator=order)
        if self.settings.keep_bare:
            assert self.gates is not None
            drawn[self.gates.bare()] = 50.0
        self.tensors["alpha"].values = drawn
        self.evenly()
        self.masks(at)
        self.values |= {"turn": 0, "goes": self.values["whole"] - self.settings.target}

    def final(self, at: Stand) -> Plan | None:
        """Each level in its turn loses what it is to bear."""
        what, split = self.settings.what, self.settings.split
        for turn in range(self.values["turn"], len(what)):
            self.values["turn"], self.searched = turn, (what[turn],)
            self.most = self.settings.target + sum(split[turn + 1 :]) * self.values["goes"]
            if plan := super().final(at):
                return plan
        return None
