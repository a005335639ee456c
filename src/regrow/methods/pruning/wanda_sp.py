"""Wanda-sp: structured Wanda; cut the units with the smallest weights times the size of their inputs.

The original (in FLAP's repository) cuts the same fraction of every layer and compensates nothing; it measures each
layer behind the already pruned ones. Here all layers are measured in the dense network, in one pass, and dropped
inputs are replaced by their mean unless switched off.
"""

from dataclasses import dataclass
from typing import Annotated

from regrow.methods.pruning.pruner import Pruner, baseline_pruner
from regrow.settings.constraints import CheckedSettings, OneOf

CITATION = (
    "Sun et al., A Simple and Effective Pruning Approach for Large Language Models, ICLR 2024, arXiv:2306.11695; "
    "structured form of An et al., arXiv:2312.11983"
)


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``wanda_sp``: allocation and compensation.

    Args:
        allocation: ``uniform``: the same fraction of each axis (original); ``ranked``: one ranking of z-scores.
        compensate: Whether the mean of dropped inputs is added to the biases of the layers that read them (original:
            off).
    """

    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = True


def build(settings: Settings) -> Pruner:
    """Return the Wanda-sp pruner: mean abs(W) · rms(x) per unit, the same fraction of every axis, bias compensation."""
    return baseline_pruner("wanda_sp", settings)
