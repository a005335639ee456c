"""The Fisher information of unit masks: how much the loss changes if a unit is removed, to second order.

A mask multiplies a unit wherever a weight reads it. The gradient of the loss with respect to it is Σ x · ∂L/∂x over the
unit's channels x, and is taken per token (per example where convolutions read the unit, summed over positions). The
labels are drawn from the network's own predictions, which makes the mean of its square the Fisher information. It takes
one forward and one backward pass, and no gradients of weights.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.axes import Axis, AxisGraph
from regrow.core.objectives import CLASSIFICATION, IGNORED, MULTI_LABEL, NEXT_TOKEN, REGRESSION, Objective
from regrow.core.scores import Scores, Statistics
from regrow.core.sources import Batch, logits_in
from regrow.scoring.combine import to_units
from regrow.scoring.watch import Feed, rows_of
from regrow.scoring.weights import CachedColumns, Reader, check_scores, readers, scorable

ENTRIES = 1 << 22
"""Entries of the logits whose probabilities are in memory at a time, in float32."""


def fisher(
    weights: Mapping[str, Tensor],
    axes: AxisGraph,
    statistics: Statistics | None,
    *,
    units: Sequence[Axis] | None = None,
) -> Scores:
    """Score units by the Fisher information of their masks, ½ · mean over tokens of (Σ x · ∂L/∂x)².

    That is the increase of the loss per token, to second order, if the unit's output were 0.

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        statistics: Sums of one or more sources; ``None`` scores by the weights alone, ‖W_j‖₂².
        units: The axes to score; ``axes.units()`` if none are named.

    Raises:
        ValueError: If the sources never reached an axis.

    Source: Theis et al., Fisher pruning (arXiv 1801.05787); masks of Transformers: Kwon et al. (arXiv 2204.09656).
    """
    chosen = scorable(axes, units)
    if statistics is None:
        cached, reads = CachedColumns(weights), readers(axes, chosen)
        channels = {reader.weight: cached.columns(reader.weight, reader.slot.dim) for reader in reads}
        widths = {reader.weight: cached.width(reader.weight, reader.slot.dim) for reader in reads}
        return check_scores(Scores(to_units(channels, widths, reads), "fisher/weight-only"))
    if missing := next((axis.key for axis in chosen if axis.key not in statistics.fisher), ""):
        raise ValueError(
            f"source {statistics.source!r} never reached the units of {missing!r}; give more batches, or leave them "
            f"out (--exclude {missing.partition(':')[0]})"
        )
    values = {axis.key: statistics.fisher[axis.key] / (2 * max(statistics.tokens, 1)) for axis in chosen}
    sources = tuple(dict.fromkeys(statistics.source.split("+")))
    return check_scores(Scores(values, "fisher", sources, statistics.tokens))


class MaskGradients(Feed):
    """A torch-function mode that sums the squared gradients of unit masks, as the loss is differentiated.

    Only what depends on the first watched input is differentiated; the weights need no gradients. Inside a recurrent
    layer the gradient is that of the whole batch, whose square has the same mean where labels are drawn.

    Args:
        watched: ``id`` of a weight → its name.
        reads: Name of a weight → the axes that it reads, and where.
        widths: Name of a weight → its size in the contracted dimension.
        sequences: How many sequences the batch has.
    """

    def __init__(
        self,
        watched: Mapping[int, str],
        reads: Mapping[str, Sequence[Reader]],
        widths: Mapping[str, int],
        sequences: int,
    ) -> None:
        super().__init__(watched)
        self.reads, self.widths, self.sequences = reads, widths, sequences
        self.squares: dict[str, Tensor] = {}
        self.partial: dict[str, Tensor] = {}
        self.waiting: Counter[str] = Counter()

    def fed(self, name: str, value: Tensor, dim: int) -> Tensor:
        """Return the same input, as a tensor whose gradient is that of this use alone."""
        if not torch.is_grad_enabled() or not value.is_floating_point():
            return value
        own = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        self._expect(name, own)
        own.register_hook(partial(self._add, name, value.detach(), dim))
        return own

    def weighed(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight times a mask of its inputs, whose gradient is that of the whole batch."""
        if not torch.is_grad_enabled():
            return weight
        mask = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
        self._expect(name, mask)
        mask.register_hook(partial(self._add, name, mask.detach(), -1))
        return weight * mask

    def finish(self) -> dict[str, Tensor]:
        """Return axis key → Σ of squared gradients, ``[size]`` float64, once the loss is differentiated."""
        for axis in list(self.partial):
            self._square(axis)
        return self.squares

    def _expect(self, name: str, value: Tensor) -> None:
        for reader in self.reads[name]:
            self.waiting[reader.axis] += 1
            home = "cpu" if value.device.type == "mps" else value.device
            self.squares.setdefault(reader.axis, torch.zeros(reader.size, dtype=torch.float64, device=home))

    @torch.no_grad()
    def _add(self, name: str, value: Tensor, dim: int, gradient: Tensor) -> None:
        sequences = 1 if value.dim() == 1 else self.sequences
        (rows, channels), (slopes, _) = (rows_of(one, dim, sequences) for one in (value, gradient))
        wide = torch.promote_types(value.dtype, torch.float32)
        products = rows.to(wide) * slopes.to(wide)
        if channels == 1:
            products = products.sum(2)[:, None]
        for reader in self.reads[name]:
            own = _to_units(products, reader.positions(products.shape[-1], self.widths[name]))
            self.partial[reader.axis] = _added(self.partial[reader.axis], own) if reader.axis in self.partial else own
            self.waiting[reader.axis] -= 1
            if not self.waiting[reader.axis]:
                self._square(reader.axis)

    def _square(self, axis: str) -> None:
        total = self.partial.pop(axis).square().sum((0, 1))
        self.squares[axis] += total.to(self.squares[axis].device, torch.float64)


def _to_units(values: Tensor, where: Tensor) -> Tensor:
    """Return the sums over each unit's channels, ``[..., size]``.

    Args:
        values: One number per channel, ``[..., channels]``.
        where: The channels of each unit, ``[size, k]``.
    """
    in_order = where.numel() == values.shape[-1] and torch.equal(where.flatten(), torch.arange(where.numel()))
    own = values.unflatten(-1, where.shape) if in_order else values[..., where.to(values.device)]
    return own[..., 0] if where.shape[1] == 1 else own.sum(-1)


def _added(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of the gradients of two uses of a unit, summed over positions where these differ, then all."""
    for dim in (1, 0):
        if one.shape != other.shape:
            one, other = one.sum(dim, keepdim=True), other.sum(dim, keepdim=True)
    return one + other


def add_fisher(
    model: nn.Module,
    batch: Batch,
    masks: MaskGradients,
    sums: dict[str, Tensor],
    objective: Objective,
    around: AbstractContextManager[object],
    origin: Batch | None = None,
) -> None:
    """Run the network on a batch and add the squared gradients of the masks to ``sums``.

    Args:
        model: The network; its parameters need no gradients.
        batch: Inputs; of the labels only the positions count, except for losses of one's own.
        masks: The masks.
        sums: Axis key → sum so far; changed in place.
        objective: What the network is trained for: it says how labels are drawn.
        around: The context in which the forward pass runs.
        origin: The batch before it was moved to the network's device, so that labels are drawn without waiting for it.

    Raises:
        ValueError: If the output does not depend on the units by gradients.
    """
    with torch.enable_grad():
        with masks, around:
            output = batch.run(model)
        drawn = draw_labels(output, batch, objective, origin)
        loss = objective.compute_loss(output, batch) * batch.size if drawn is None else None
    end = drawn[0] if drawn is not None else loss
    if end is not None and end.requires_grad:
        end.backward(None if drawn is None else drawn[1])
    elif masks.waiting:
        raise ValueError(
            "what the network returns has no gradient, since its forward pass detaches it; return it attached, or "
            "choose a method without gradients, such as flap"
        )
    for key, squares in masks.finish().items():
        sums[key] = sums[key] + squares if key in sums else squares


def draw_labels(
    output: object, batch: Batch, objective: Objective, origin: Batch | None = None
) -> tuple[Tensor, Tensor] | None:
    """Draw labels from a network's predictions; return the logits and the gradient of the summed loss in them.

    The random numbers of an example depend on its inputs alone, not on the batch that it is in; where the first
    dimension of no input is that of the labels, on all inputs and its index.

    Args:
        output: What the network returned.
        batch: The batch; nothing is drawn for positions labelled −100.
        objective: How labels are drawn: classes, 0 or 1 for multi-label, normal numbers for regression.
        origin: The batch on the device where it came from; ``None``: this one.

    Returns:
        ``None`` for other losses, from which no labels can be drawn.
    """
    seeds = batch if origin is None else origin
    if objective.name in (CLASSIFICATION.name, NEXT_TOKEN.name):
        logits, labels = logits_in(output), batch.labels
        if isinstance(labels, Tensor) and logits.dim() > 1 and logits.shape[:-1] != labels.shape:
            logits = logits.movedim(1, -1)
        if not isinstance(labels, Tensor) or logits.shape[:-1] != labels.shape:
            objective.compute_loss(output, batch)  # says what does not fit
            return None
        return logits, _draw_classes(logits.detach(), labels != IGNORED, seeds)
    if objective.name == MULTI_LABEL.name:
        logits = logits_in(output)
        chances = logits.detach().float().sigmoid()
        ones = _uniform(seeds, chances) < chances
        return logits, (chances - ones.float()).to(logits)
    if objective.name == REGRESSION.name:
        values = logits_in(output)
        return values, torch.special.ndtri(_uniform(seeds, values).clamp(1e-6, 1 - 1e-6)).to(values)
    return None


def _draw_classes(logits: Tensor, counted: Tensor, batch: Batch) -> Tensor:
    """Return probabilities minus one-hot labels, in the dtype of the logits ``[..., classes]``."""
    random = _uniform(batch, counted).flatten()
    rows, valid = logits.reshape(-1, logits.shape[-1]), counted.flatten().to(logits.device)
    gradient = torch.empty_like(rows)
    step = max(1, ENTRIES // rows.shape[1])
    wide = torch.promote_types(rows.dtype, torch.float32)
    for own, into, u, seen in zip(*(one.split(step) for one in (rows, gradient, random, valid)), strict=True):
        chances = own.to(wide).softmax(-1)
        edges = chances.cumsum(-1)
        classes = torch.searchsorted(edges, u[:, None].to(edges) * edges[:, -1:], right=True)
        classes.clamp_max_(rows.shape[1] - 1)
        into.copy_(chances.scatter_add_(1, classes, chances.new_full((), -1).expand_as(classes)) * seen[:, None])
    return gradient.view(logits.shape)


def _uniform(batch: Batch, like: Tensor) -> Tensor:
    """Return uniform random numbers in [0, 1) of the shape of ``like``, seeded by the inputs of each example."""
    if not like.dim():
        return torch.rand((), generator=_generator(_tensors(batch))).to(like.device)
    every = _tensors(batch)
    inputs = [one for one in every if one.dim() and len(one) == len(like)]
    seeds = [[one[i] for one in inputs] if inputs else [*every, torch.tensor(i)] for i in range(len(like))]
    rows = [torch.rand(like.shape[1:], generator=_generator(one)) for one in seeds]
    return torch.stack(rows).to(like.device)


def _tensors(batch: Batch) -> list[Tensor]:
    return [one for one in tree_leaves((batch.args, dict(batch.kwargs))) if isinstance(one, Tensor)]


def _generator(inputs: Sequence[Tensor]) -> torch.Generator:
    digest = sha256()
    for one in inputs:
        digest.update(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7]))
