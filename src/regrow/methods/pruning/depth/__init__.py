"""Depth pruning: drop whole attentions, MLPs or decoder blocks, those whose absence changes the predictions least.

Modules are dropped one after the other: each time the one without which the KL divergence from the dense network rises
least per unit of what the budget counts (weights, MACs, bytes), measured in forward passes on every source. What whole
modules leave of the budget is met by cutting MLP neurons, those of the least weighted input variance first; how many
modules are dropped is then chosen on other windows, from none to as many as the budget allows. Unlike SLEB and
BlockPruner: divergence in place of perplexity, rises are divided by what a module saves, one that cannot be the
smallest is not measured again, and the budget is exact.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from regrow.allocation import BudgetError, cost_of, uniform
from regrow.core.amounts import Measure
from regrow.core.axes import Axis, AxisGraph
from regrow.core.budget import Budget
from regrow.core.evidence import Need
from regrow.methods.pruning.depth.modules import Settings, candidates, least_cost, score_neurons
from regrow.methods.pruning.depth.search import DepthSearch
from regrow.methods.pruning.pruner import Pruner, PruningTask, Ranking, Removal, pooled_means, without_modules

__all__ = ["CITATION", "Settings", "build"]

CITATION = (
    "Song et al., SLEB, ICML 2024, arXiv:2402.09025, and Zhong et al., BlockPruner, arXiv:2406.10594; whole blocks as "
    "in Men et al., ShortGPT, arXiv:2403.03853"
)

NAMED = 12
"""The most modules that the note of a plan names."""


def build(settings: Settings) -> Pruner:
    """Return the pruner that drops whole modules."""
    return Pruner(
        needs=frozenset({Need.WEIGHTS, Need.ACTIVATIONS}),
        score=lambda task: Ranking(score_neurons(settings, task)),
        allocate=partial(uniform, minimum=settings.minimum),
        compensate=pooled_means if settings.compensate else None,
        origin={"method": "depth", "settings": asdict(settings)},
        spare=(settings.spare_first, settings.spare_last),
        runs_network=True,
        compares_classes=True,
        drop=lambda task: _choose(settings, task),
        check=partial(_check, settings),
    )


def _check(s: Settings, axes: AxisGraph, units: Sequence[Axis], budget: Budget) -> None:
    """Raise ValueError if a budget cannot be met, or counts what dropped modules have no known share of."""
    if budget.measure == Measure.TIME:
        raise ValueError("the time of whole modules is not measured; use a target in params, macs or bytes")
    if budget.regular and s.fill == "neurons":
        raise ValueError("depth with fill=neurons gives blocks different widths; leave out regular, or set fill=none")
    rest, _ = without_modules(axes, budget, candidates(s, axes, budget))
    steps, total = least_cost(s, rest, units, budget), cost_of(axes, budget).total
    if steps > budget.limit(total):
        what = str(budget.target) if budget.target else f"keep {budget.keep:g}"
        least, word = budget.least(steps, total), "target" if budget.target else "keep"
        every = "module" if s.unit == "any" else s.unit
        raise BudgetError(
            f"{what} cannot be met: without every {every} that can be dropped, {100 * steps / total:.2f} % of "
            f"{budget.measure} stays; use {word} {least:g}, or let more be cut (unit=any, fill=neurons)",
            least,
        )


def _choose(s: Settings, task: PruningTask) -> Removal:
    began = time.monotonic()
    modules = candidates(s, task.axes, task.budget)
    if not modules:
        what = "module" if s.unit == "any" else s.unit
        note = f"no {what} of this network can be dropped whole (`regrow show --branches` says why); only units are cut"
        return Removal(notes=(note,))
    search = DepthSearch(s, task, modules)
    path = search.path()
    counts = search.counts(path) if s.fill == "neurons" else {}
    best = min(counts, key=lambda number: (counts[number], number)) if counts else len(path)
    chosen = tuple(one.module for one in path[:best])
    left = path[best - 1].left if best else 1.0
    names = ", ".join(chosen[:NAMED]) + (f" and {best - NAMED} more" if best > NAMED else "")
    note = f"modules dropped whole: {best} of {len(modules)}, which leaves {100 * left:.2f} % of {task.budget.measure}"
    note += f" ({names})" if names else ""
    tables: dict[str, Any] = {
        "unit": s.unit,
        "path": [asdict(one) for one in path],
        "counts": [{"modules": number, "divergence": loss} for number, loss in counts.items()],
        "seconds": round(time.monotonic() - began, 2),
        "measured": len(search.journal.values),
    }
    search.journal.write()
    notes = [note]
    if counts and search.short:
        notes.append(
            "how many modules are dropped was judged on the windows on which removals were measured, since there are "
            f"no further ones of {', '.join(search.short)}; give more data, or set tokens lower"
        )
    return Removal(chosen, {"depth": tables}, tuple(notes))
