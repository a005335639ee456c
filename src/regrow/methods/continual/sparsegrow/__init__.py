"""SparseGrow: continual learning with a network that is widened late in a task.

Zhao, Saxena, Cao, Liu, Song: SparseGrow (arXiv 2408.10566). **Reconstructed**: the paper's body was not available. Its
abstracts name the parts (data-driven sparse layer expansion late in a task, initialised on data; sparse training by
learned thresholds; freezing by gradient gating); their form follows the public code of its predecessor AdaptCL
(arXiv 2207.11005) and of Dynamic Sparse Training. What neither settles is a setting, and its default is ours. The
strongest baseline is Kronecker-factored Laplace (Ritter et al., NeurIPS 2018): see docs/reproductions/sparsegrow.md.

A task, for weights W with thresholds t and the entries M that earlier tasks own:

1. train on  loss + α Σ exp(−t), with W ∘ [|W| ≥ t or M] in the place of W; the gate preconditions every step;
2. when the last ``late_phase`` of its epochs begin, widen every hidden axis that is short of free capacity by
   ``width`` of its initial size: new units read a fraction ``density`` of their inputs, are projected (among these)
   away from the inputs that earlier tasks fed their layer, and are scaled to the spread of the old outputs on the
   present data; their outgoing weights are 0 at first; their penalty is ``new_unit_penalty`` times as strong;
3. at its end set entries below their threshold to 0, own the remaining ones, and reset t to 0.

The default gate ``kronecker`` multiplies a layer's step Δ by  (1 + s A ⊗ (B + d))⁻¹,  with A the second moments of its
inputs in earlier tasks and B those of the gradients of its outputs. It is the preconditioner of Natural Continual
Learning (Kao et al., NeurIPS 2021) with the Kronecker factors of Ritter et al., but without their penalty on the
distance to earlier parameters; the damping d is ours. No examples are stored, directions that earlier tasks did not use
stay free, and widening adds such directions. The gate ``hard`` restores protected entries after each step. Parameters
that no gate covers, such as scales and shifts of norms, are frozen.
"""

from regrow.methods.continual.sparsegrow.learner import build
from regrow.methods.continual.sparsegrow.settings import Settings

__all__ = ["CITATION", "Settings", "build"]

CITATION = "Zhao et al., SparseGrow (arXiv 2408.10566); reconstructed; gate: Kao et al. (2021), Ritter et al. (2018)"
