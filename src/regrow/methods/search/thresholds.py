"""How the thresholds of MGAS learn: they rise where removal saves more than it costs (ours).

    t ← t + rate · min(1, Σ s (μ c − F / 2) / Σ s μ c)

over the units that compare with t: s is DST's surrogate of a unit's margin, c its share of the allowed size, μ the
weight of the size in the loss, and F = n (∂ loss / ∂ mask)², over n examples, the Fisher information of its mask. So
one scale holds for operations, filters and weights. The first derivative alone says nothing where the network is
trained, and under Adam all thresholds would rise at the same rate, whatever they remove. F of a step is a noisy
estimate, so a fall is not bounded: what costs most is to be kept on average.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.allocation.gates import GateMasks
from regrow.allocation.levels import surrogate
from regrow.methods.search.space import SearchState, measure_masked
from regrow.training.learner import Context, Step


@dataclass(frozen=True)
class Pressure:
    """The size in the loss of a step, and what it makes of each unit."""

    excess: Tensor  # size / allowed − 1, a scalar
    unit: float  # μ / allowed, the weight of one unit of the measure
    operations: Tensor  # ∂ (μ · excess) / ∂ mask, ``[operations]``
    filters: Tensor  # the same of filters, ``[filters]``


def measure_pressure(state: SearchState, masks: GateMasks, allowed: float) -> tuple[Tensor, Pressure]:
    """Return μ (size / allowed − 1), a scalar with the masks' gradients, and its parts."""
    excess = measure_masked(state, masks) / allowed - 1
    term, found = state.multiplier * excess, list[Tensor]()
    for mask in (masks.ops, masks.filters):
        if mask.requires_grad and term.requires_grad:
            found += torch.autograd.grad(term, [mask], retain_graph=True, materialize_grads=True, allow_unused=True)
        else:
            found.append(torch.zeros_like(mask))
    return term, Pressure(excess.detach(), state.multiplier / allowed, *found)


@torch.no_grad()
def move_thresholds(state: SearchState, context: Context, step: Step, rate: float) -> None:
    """Move all thresholds, in place; gradients of α, κ and weights are those of the step's loss."""
    pressure, masks, layout, n = step.aux, step.replaced.aux, state.layout, len(step.batch)
    ops, filters, weights = (thresholds.values for thresholds in state.thresholds)
    for values in (ops, filters, weights):
        values.grad = None
    if not pressure.unit:
        return
    levels = layout.levels
    if state.alpha.values.grad is not None and len(ops):
        price = torch.zeros_like(pressure.operations).index_add(0, layout.tied, pressure.operations)
        margin = masks.margins[0]
        mask = masks.ops.index_select(0, layout.tied)
        fisher = n * _differentiate(state.alpha.values, state.alpha.values.grad, price, margin, mask).square()
        price = price * (layout.tied == torch.arange(len(ops), device=ops.device))  # of tied ones, the first decides
        _move(ops, layout.tied, margin, price, fisher * (price > 0), rate)
    kappa = [state.kappa[key].values for key in levels.axes]
    if kappa and all(values.grad is not None for values in kappa):
        joined, gradient = torch.cat(kappa), torch.cat([values.grad for values in kappa if values.grad is not None])
        derivative = _differentiate(joined, gradient, pressure.filters, masks.margins[1], masks.filters)
        _move(filters, layout.axis, masks.margins[1], pressure.filters, n * derivative.square(), rate)
    if masks.over is not None:
        parameters = context.parameters()
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
        fisher = n * (levels.flat(gradients) * levels.flat(parameters)).square()
        price = pressure.unit * levels.price[: levels.entries] * levels.active(masks.ops, masks.filters)
        _move(weights, levels.ops[: levels.entries], masks.over, price, fisher, rate)


def _differentiate(logits: Tensor, gradient: Tensor, price: Tensor, margin: Tensor, mask: Tensor) -> Tensor:
    """Return ∂ loss / ∂ mask without the size, from the gradient of importance logits x.

    x scales what it keeps by 2 σ(x) and moves its mask, by the surrogate s, so with the derivative u by the scale the
    gradient is σ′ (s (2 σ u + price) + 2 mask u); the result is 2 σ u.
    """
    share, s = logits.sigmoid(), surrogate(margin)
    slope = share * (1 - share)
    u = (gradient - s * slope * price) / (2 * slope * (share * s + mask)).clamp_min(1e-12)
    return 2 * share * u


def _move(thresholds: Tensor, index: Tensor, margin: Tensor, price: Tensor, fisher: Tensor, rate: float) -> None:
    """Move thresholds in place; the other tensors have an entry per unit, ``index`` the threshold it compares with."""
    s = surrogate(margin)
    price = price.clamp_min(0)
    zeros = torch.zeros_like(thresholds)
    gain = zeros.index_add(0, index, (s * (price - fisher / 2)).to(zeros))
    scale = zeros.index_add(0, index, (s * price).to(zeros))
    thresholds.add_(rate * torch.where(scale > 0, (gain / scale.clamp_min(1e-30)).clamp_max(1), 0.0))
