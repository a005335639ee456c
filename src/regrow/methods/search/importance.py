"""The importance of operations, filters and weights in a search, and the masks that follow from it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.allocation.edges import Edges, select_operations
from regrow.allocation.gates import GateMasks
from regrow.core.axis_tensor import AxisTensor
from regrow.core.candidates import run_whole
from regrow.core.objectives import CLASSIFICATION
from regrow.core.plan import Plan
from regrow.core.sources import device_of, move_tensors
from regrow.core.tasks import Examples
from regrow.methods.search.space import (
    Rules,
    SearchSpace,
    clear_thresholds,
    iterate_spans,
    mask_parameters,
    measure_shares,
    scale_candidates,
    update_layout,
)
from regrow.methods.search.state import SearchState
from regrow.nets.cells import Cells
from regrow.surgery import apply
from regrow.surgery.gate import parametrize
from regrow.tracing.meta_copy import clone_model
from regrow.training.learner import Context, Replacements, Step, task_loss
from regrow.training.state import axis_tensors, follow_plan, with_axis_tensors


def mask_by_thresholds(
    space: SearchSpace,
    trains_thresholds: bool,
    state: SearchState,
    context: Context,
    flat: Tensor | None,
    learning: bool,
) -> GateMasks:
    """Return masks that keep what is at least as important as its threshold: σ(α), σ(κ), and |w| over its mean.

    Args:
        space: What the search may remove.
        trains_thresholds: Whether masks have gradients for thresholds, not only for α and κ.
        state: The importances and thresholds.
        context: The network.
        flat: All weights, ``[weights]``; ``None``: they are read from the network.
        learning: Whether masks have gradients at all.
    """
    layout, searched = state.layout, space.granularities
    if flat is None and "weights" in searched:
        flat = layout.levels.flat(context.parameters())

    def values(one: AxisTensor, trained: bool = True) -> Tensor:
        return one.values if learning and trained else one.values.detach()

    ops, filters, weights = (values(one, trains_thresholds) for one in state.thresholds)
    kappa = [values(state.kappa[key]) for key in layout.levels.axes]
    return layout.masks(
        (values(state.alpha), ops) if "operations" in searched else None,
        (torch.cat(kappa), filters) if "filters" in searched and kappa else None,
        None if flat is None or "weights" not in searched else (flat, state.zero_mask, weights),
    )


def scale_by_importance(masks: GateMasks, state: SearchState, learning: bool) -> GateMasks:
    """Return masks under which operations are scaled by 2 σ(α), without gradients for thresholds.

    Args:
        masks: The masks.
        state: The state of the search.
        learning: Whether the scales have gradients for α.
    """
    alpha = state.alpha.values if learning else state.alpha.values.detach()
    share = alpha.sigmoid().index_select(0, state.layout.tied)
    return replace(masks, ops=masks.ops.detach(), op_scale=2 * share * masks.ops.detach())


def measure_relative(state: SearchState, context: Context, masks: GateMasks) -> Tensor:
    """Return |w| divided by the mean |w| of what is kept of its tensor, ``[weights]``.

    Args:
        state: The state of the search.
        context: The network.
        masks: Which operations and filters are kept.
    """
    levels = state.layout.levels
    return levels.relative(levels.flat(context.parameters()), levels.standing(masks.ops, masks.filters))


def weigh_operations(state: SearchState) -> Tensor:
    """Return the softmax weight of each operation on its edge, times the edge's weight if it has one, ``[operations]``.

    Args:
        state: The state of the search.
    """
    return state.edges.share(state.alpha.values, None if state.beta is None else state.beta.values)


def weigh_edges(state: SearchState, like: Tensor) -> list[Tensor]:
    """Return the weights of the edges into each node, one tensor per node; 1 where edges have no weights.

    Args:
        state: The state of the search.
        like: A tensor that gives device and dtype.
    """
    edges = state.edges
    weight = like.new_ones(len(edges.node)) if state.beta is None else edges.between(state.beta.values)
    return [*weight.split(edges.into)]


def choose_operations(state: SearchState) -> Tensor:
    """Return DARTS's final choice as a mask: per node the best operation of its two best edges, ``[operations]`` bool.

    Args:
        state: The state of the search.
    """
    return select_operations(weigh_operations(state).detach(), state.edges.edge, state.layout.node)


def rank_evenly(state: SearchState) -> SearchState:
    """Return the state in which a filter's importance is its place in its axis, so all axes lose the same fraction.

    Args:
        state: The state of the search.
    """

    def rank(like: Tensor) -> Tensor:
        n = len(like)
        return torch.logit((torch.arange(n, 0, -1, device=like.device) - 0.5) / n)

    return replace(state, kappa={key: replace(one, values=rank(one.values)) for key, one in state.kappa.items()})


def differentiate_weights(rules: Rules, state: SearchState, context: Context, batch: Examples) -> Tensor:
    """Return ∂ loss / ∂ the masked weights, ``[weights]``; the network is left in evaluation mode.

    In that mode nothing is recomputed, so an eighth of the examples is used at a time.

    Args:
        rules: The choices of the method, which give the masks.
        state: The state of the search.
        context: The network.
        batch: The examples on which the loss is computed.
    """
    values = mask_parameters(rules, state, replace(context, answered=context.number)).values
    levels = state.layout.levels
    learned = {name: values[name].detach().requires_grad_() for name in levels.weights}
    total = torch.zeros(len(levels.reads), device=levels.reads.device)
    context.model.eval()
    for piece in torch.arange(len(batch)).split(max(1, len(batch) // 8)):
        with parametrize(context.model, {**values, **learned}):
            loss = _share_of_loss(context, batch.take(piece), len(batch))
            gradients = torch.autograd.grad(loss, [*learned.values()], allow_unused=True, materialize_grads=True)
        total = total + levels.flat(dict(zip(learned, gradients, strict=True)))
    return total


def _share_of_loss(context: Context, piece: Examples, n: int) -> Tensor:
    """Return what some of ``n`` examples contribute to the mean loss, a scalar."""
    if context.objective is CLASSIFICATION:
        return F.cross_entropy(context.logits(piece.inputs), piece.labels, reduction="sum") / n
    return task_loss(None, context, Step(0, piece)).value * (len(piece) / n)


def score_cut_filters(
    rules: Rules, state: SearchState, context: Context, cut: Mapping[str, Sequence[int]], batch: Examples
) -> list[tuple[float, str, int]]:
    """Score cut filters by how much the loss would change if they came back: |∂ loss / ∂ g| at g = 0.

    g scales what reads the filter. All of them are restored at this scale in a copy of the network, so that its outputs
    are those of the network at the start of a stage, with thresholds at 0.

    Args:
        rules: The choices of the method, which give the masks.
        state: The state of the search.
        context: The network, and the store of what was removed.
        cut: Axis key → the ids of the filters that can be restored.
        batch: The examples on which the loss is computed.

    Returns:
        Per filter its score, its axis key and its unit id.
    """
    plan = Plan.restoring(context.axes, cut)
    with run_whole(context.model):
        copied = clone_model(context.model)
    model, axes = apply(copied, context.axes, plan, undo=copy.copy(context.undo))
    there = replace(context, model=model, axes=axes)
    probe = copy_state(follow_plan(state, context.axes, plan))
    clear_thresholds(probe)
    probe = update_layout(rules, probe, there)
    places = {key: [axes[key].ids.index(one) for one in ids] for key, ids in cut.items()}
    for key, own in places.items():
        probe.kappa[key].values[own] = -50.0
    levels = probe.layout.levels
    each = differentiate_weights(rules, probe, there, batch) * levels.flat(there.parameters()).detach()
    score = each.new_zeros(levels.filters + 1).index_add(0, levels.reads, each).abs().tolist()
    first = {key: base for key, (base, _, _) in iterate_spans(probe.layout)}
    return [
        (score[first[key] + i], key, one) for key, ids in cut.items() for i, one in zip(places[key], ids, strict=True)
    ]


def copy_state(state: SearchState) -> SearchState:
    """Return the state with copies of its tensors, which can be changed in place.

    Args:
        state: The state of the search.
    """
    tensors = axis_tensors(state).items()
    return with_axis_tensors(state, {name: replace(one, values=one.values.detach().clone()) for name, one in tensors})


def find_edges(context: Context, shared: bool, cells: bool) -> Edges:
    """Return which edge of a cell each operation lies on, and which operations share α.

    Args:
        context: The network.
        shared: Whether cells of one kind share α and β.
        cells: Whether a network that is not made of cells is an error.

    Raises:
        ValueError: If the network is not made of cells (under ``cells``), or has no candidates.
    """
    if cells and not isinstance(context.model, Cells):
        raise ValueError("shared and partial need a network of cells, and this is none; use a space cells:…")
    edges = Edges.of(context.model, context.model.alike() if shared and isinstance(context.model, Cells) else {})
    return move_tensors(edges, device_of(context.model))


def draw_importance(context: Context, n: int, lr: float, purpose: int) -> AxisTensor:
    """Return small random importances, so that at first all operations of an edge have about the same weight.

    Args:
        context: Gives the seed.
        n: The number of importances.
        lr: Their learning rate.
        purpose: A number that tells random streams apart.
    """
    return AxisTensor(
        (1e-3 * torch.randn(n, generator=context.generator(purpose))).to(device_of(context.model)), (n,), lr
    )


def scale_by_softmax(state: SearchState, context: Context) -> dict[str, Tensor]:
    """Return the scale of each candidate by name, and store the edges' weights for channels that bypass operations.

    Args:
        state: The state of the search; its ``edge_weights`` are changed in place.
        context: The network.
    """
    share = weigh_operations(state) * state.layout.alive
    state.edge_weights[:] = weigh_edges(state, share)
    return scale_candidates(context, share, keep=False)


@torch.no_grad()
def replace_scales(state: SearchState, context: Context) -> Replacements:
    """Return the candidates' scales without gradients for α, for the examples that train the weights.

    Args:
        state: The state of the search.
        context: The network.
    """
    return Replacements(scale_by_softmax(state, context))


def set_importance_gradients(state: SearchState, context: Context, loss: Callable[[], Tensor], decay: float) -> None:
    """Set the gradients of α and β to those of a loss; parameters and running statistics do not change.

    Args:
        state: The state of the search.
        context: The network.
        loss: Runs the network and returns a scalar.
        decay: Weight decay of α and β.
    """
    learned = [one.values for one in (state.alpha, state.beta) if one is not None]
    buffers = [*context.model.buffers()]
    before = [one.clone() for one in buffers]
    with parametrize(context.model, scale_by_softmax(state, context)):
        gradients = torch.autograd.grad(loss(), learned)
    for one, value in zip(buffers, before, strict=True):
        one.copy_(value)
    for one, gradient in zip(learned, gradients, strict=True):
        one.grad = gradient + decay * one.detach()


def measure_skips(state: SearchState, masks: GateMasks) -> dict[str, float]:
    """Return the kept fractions, and the fraction of skips among the chosen operations; near 1 DARTS has collapsed.

    Args:
        state: The state of the search.
        masks: The masks.
    """
    chosen = [path for path, here in zip(state.layout.ops, choose_operations(state), strict=True) if here]
    skips = sum(path.rpartition(".")[2].startswith("skip") for path in chosen)
    return measure_shares(state, masks) | {"skips": skips / max(1, len(chosen))}


def start_drift(state: SearchState) -> SearchState:
    """Return the state with a moving average of the gradient of α, 0 at first.

    Args:
        state: The state of the search.
    """
    return replace(state, drift=AxisTensor(torch.zeros_like(state.alpha.values), state.alpha.dims))


def smooth_gradient(state: SearchState) -> None:
    """Update the moving average of the gradient of α, s ← 0.9 s + gradient, after a training step, in place.

    Args:
        state: The state of the search.
    """
    if (gradient := state.alpha.values.grad) is not None and state.drift is not None:
        state.drift.values.mul_(0.9).add_(gradient)
