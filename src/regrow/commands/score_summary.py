"""Summary of a run's importance scores: quantiles, where the cut lies, and units with massive activations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regrow.axes import AxisGraph
from regrow.commands.recording import Record
from regrow.evidence import Evidence
from regrow.plan import Plan
from regrow.scores import Scores
from regrow.scoring import energy, massive
from regrow.scoring.weights import readers


def write_scores(
    folder: Record, weights: Mapping[str, Tensor], axes: AxisGraph, plan: Plan, scores: Scores, evidence: Evidence
) -> None:
    """Write a summary of the scores from which a plan was made into a run folder.

    Args:
        folder: The run folder.
        weights: The parameters of the model by name.
        axes: Its axes.
        plan: The plan.
        scores: The scores of the units.
        evidence: The measured activations.
    """
    entries: dict[str, dict[str, Any]] = {}
    for key, values in scores.values.items():
        steps = torch.quantile(values.double(), torch.linspace(0, 1, 21, dtype=torch.float64)).tolist()
        keep = list(plan.changes[key].keep) if key in plan.changes else list(range(len(values)))
        dropped = list(plan.changes[key].dropped) if key in plan.changes else []
        entries[key] = {
            "quantiles": steps,
            "kept_min": float(values[keep].min()),
            "dropped_max": float(values[dropped].max()) if dropped else None,
            "massive": [],
        }
    if evidence.statistics and (measured := evidence.pooled(gradients=False)).moments:
        some = [axes[key] for key in scores.values if key in axes.axes]
        some = [one for one in some if all(read.weight in measured.moments for read in readers(axes, [one]))]
        units = massive(axes, energy(weights, axes, measured, units=some))
        for one in units:
            if one.axis in entries:
                entries[one.axis]["massive"].append({"unit": one.unit, "ratio": one.ratio, "share": one.share})
    folder.write_scores(scores.metric, entries)
