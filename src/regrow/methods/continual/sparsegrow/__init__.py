"""SparseGrow: continual learning with a network that is widened late in a task.

Zhao, Saxena, Cao, Liu, Song: SparseGrow (arXiv 2408.10566). **Reconstructed**: the paper's body was not available. Its
abstracts name the parts (data-driven sparse layer expansion late in a task, initialised on data; sparse training by
learned thresholds; freezing by gradient gating); their form follows the public code of its predecessor AdaptCL
(arXiv 2207.11005) and of Dynamic Sparse Training. What neither settles is a setting, and its default is ours. The
strongest baseline is Kronecker-factored Laplace (Ritter et al., NeurIPS 2018): see docs/reproductions/sparsegrow.md.

A task, for weights W with thresholds t and the entries M that earlier tasks own:

1. train on  loss + α Σ exp(−t), with W ∘ [|W| ≥ t or M] in the place of W; the gate preconditions every step;
2. in the last ``late`` of its epochs widen every hidden axis that is short of what is free by ``width`` of its first
   size: newborn units read a ``density`` of their inputs, turned (among these) away from what old tasks fed their layer
   and scaled to the spread of the old units on the data at hand, with the sign with which they answer it; nothing reads
   them yet; their penalty is ``young`` times as much;
3. at its end set what is below its threshold to 0, own what is left, begin t anew.

The default gate ``kronecker`` multiplies a layer's step Δ by  (1 + s A ⊗ (B + d))⁻¹,  with A the second moments of its
inputs in earlier tasks and B those of the gradients of its outputs. It is the preconditioner of Natural Continual
Learning (Kao et al., NeurIPS 2021) with the Kronecker factors of Ritter et al., but without their pull to the
parameters of earlier tasks; the damping d is ours. No examples are stored, directions that old tasks did not read stay
free, and widening adds such directions. The other gates act on single entries; ``hard`` restores protected entries
after each step. Parameters that no gate covers, as scales and shifts of norms, are frozen.
"""

from regrow.methods.continual.sparsegrow.learner import build
from regrow.methods.continual.sparsegrow.settings import Settings

__all__ = ["CITATION", "Settings", "build"]

CITATION = "Zhao et al., SparseGrow (arXiv 2408.10566); reconstructed; gate: Kao et al. (2021), Ritter et al. (2018)"
