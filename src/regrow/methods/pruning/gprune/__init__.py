"""GPrune-LLM: rank units only within modules of similar cross-domain behaviour, and learn each module's pruning ratio.

Reconstructed from the abstracts: the paper's formulas could not be obtained, every formula and default here is ours.
A wrapper around a base metric: (1) measure how far a unit's rank moves between sources; (2) form modules of units with
similar sensitivity and score; (3) the more sensitive and weak a module is, the more it is ordered by a metric without
activations; (4) learn the pruning ratio of each module under the exact budget: the order in a module is fixed, masks
are straight-through, the loss is the divergence from the dense network, and the best allocation on held-out text is
kept, the base method's own and that of unpruned first and last blocks among them. On unseen text partition and
learning gain nothing over that last allocation, the switch a little: see docs/reproductions/gprune.md.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import torch

from regrow.allocation.ranked import module_costs, rank, ratios
from regrow.core.axes import Axis, AxisGraph, Mark
from regrow.core.budget import Budget
from regrow.core.scores import Need
from regrow.methods.pruning.gprune.modules import Settings
from regrow.methods.pruning.gprune.shares import score_units
from regrow.methods.pruning.pruner import Pruner, pooled_means
from regrow.scoring.metrics import BASES, METRICS
from regrow.scoring.weights import scorable

__all__ = ["CITATION", "Settings", "build"]

CITATION = "Liu et al., GPrune-LLM, 2026, arXiv:2603.13418 (reconstructed from the abstracts; no code was published)"


def build(settings: Settings) -> Pruner:
    """Return the GPrune-LLM pruner."""
    runs = settings.steps > 0 or settings.start == "best"
    return Pruner(
        needs=frozenset({Need.WEIGHTS, Need.ACTIVATIONS, METRICS[BASES[settings.base].metric][1]}),
        score=partial(score_units, s=settings),
        allocate=partial(rank, minimum=settings.minimum),
        compensate=pooled_means if settings.compensate else None,
        origin={"method": "gprune", "settings": asdict(settings)},
        shards=settings.shards,
        sources=3,
        runs_network=runs,
        compares_classes=runs,
        check=partial(_check, settings),
    )


def _check(settings: Settings, axes: AxisGraph, units: Sequence[Axis], budget: Budget) -> None:
    units = scorable(axes, units)
    if other := next((axis for axis in units if axis.mark is not Mark.NEUTRAL), None):
        raise ValueError(f"gprune masks units by 0 or their mean; {other.key!r} is {other.mark}: leave --mark neutral")
    one = {axis.key: torch.zeros(axis.size, dtype=torch.int64) for axis in units}
    costs, removed = module_costs(axes, one, 1, budget)
    ratios(torch.zeros(1, dtype=torch.float64), costs, removed, most=settings.most)
