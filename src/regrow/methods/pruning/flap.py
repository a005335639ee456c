"""FLAP: cut the units whose inputs fluctuate least, in one ranking of the whole network; means go into biases.

Like the original: WIFV scores, z-scored within each weight and averaged over a head's channels, one global threshold,
bias compensation, all layers measured in the dense network. Unlike it: the budget is met on exact parameter counts
(the original counts a head as 512/3 neurons whatever the model), grouped-query heads go as whole groups, attention
scores are not squared before they are standardised, and no sequence is skipped.
"""

from dataclasses import dataclass, replace
from typing import Annotated

from regrow.methods.pruning.measured import compare_allocations
from regrow.methods.pruning.pruner import Pruner, baseline_pruner
from regrow.settings.constraints import CheckedSettings, OneOf

CITATION = (
    "An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, AAAI 2024, arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``flap``: allocation and compensation.

    Args:
        allocation: ``ranked``: one ranking of standardised scores (original, "AL-AM"); ``uniform``: the same fraction
            of each axis; ``measured`` (ours): of this ranking and the same fraction of each axis, with and without the
            first and last blocks (hidden neurons of MLPs alone if there are any), the one with the lowest loss of the
            masked network on 512 labels of each source.
        compensate: Whether the mean of dropped inputs is added to biases of layers that read them (original: on).
    """

    allocation: Annotated[str, OneOf("uniform", "ranked", "measured")] = "ranked"
    compensate: bool = True


def build(settings: Settings) -> Pruner:
    """Return the FLAP pruner: weighted input variance (WIFV), one global ranking, bias compensation."""
    if settings.allocation != "measured":
        return baseline_pruner("flap", settings)
    uniform, ranked = (baseline_pruner("flap", replace(settings, allocation=name)) for name in ("uniform", "ranked"))
    return compare_allocations(uniform, lambda task: uniform.score(task).scores, lambda task: ranked.score(task).scores)
