"""LLM-Pruner: cut the units whose removal changes the loss least, by a first-order Taylor estimate.

Like the original: the same fraction of every block but the first eighth and the last sixteenth, left unpruned (4 and
2 of 32; a regular plan spares none). Unlike it: the gradient is that of all sources together (there: 10 × 64 tokens),
dropped inputs are replaced by their mean unless switched off, and fine-tuning (there: LoRA) is a step of its own.
"""

from dataclasses import dataclass
from typing import Annotated

from regrow.methods.pruning.pruner import Pruner, baseline_pruner
from regrow.settings.constraints import CheckedSettings, OneOf

CITATION = "Ma et al., LLM-Pruner: On the Structural Pruning of Large Language Models, NeurIPS 2023, arXiv:2305.11627"


@dataclass(frozen=True)
class Settings(CheckedSettings):
    """Settings of ``llm_pruner``: allocation, unpruned blocks and compensation.

    Args:
        allocation: ``uniform``: the same fraction of each axis (original); ``ranked``: one ranking of z-scores.
        compensate: Whether the mean of dropped inputs is added to biases of layers that read them (original: off).
        prune_outer: Whether the first eighth and the last sixteenth of the blocks are pruned, too (original: not).
    """

    allocation: Annotated[str, OneOf("uniform", "ranked")] = "uniform"
    compensate: bool = True
    prune_outer: bool = False


def build(settings: Settings) -> Pruner:
    """Return the LLM-Pruner: Taylor scores, the same fraction of all but the outer blocks, bias compensation."""
    return baseline_pruner("llm_pruner", settings, settings.prune_outer)
