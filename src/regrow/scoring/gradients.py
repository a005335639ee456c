"""Gradients of a network's loss, in its parameters and in masks of its units, summed over batches."""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.objectives import (
    CLASSIFICATION,
    IGNORED,
    MULTI_LABEL,
    NEXT_TOKEN,
    REGRESSION,
    Objective,
    check_classes,
)
from regrow.core.sources import Batch, logits_in
from regrow.scoring.watch import InputHook, to_rows
from regrow.scoring.weights import Reader

MAX_PROBABILITIES = 1 << 22  # entries of the logits whose probabilities are in memory at a time, in float32


def add_gradients(
    model: nn.Module,
    batch: Batch,
    names: Sequence[str],
    sums: dict[str, Tensor],
    objective: Objective = CLASSIFICATION,
    *,
    count: int | None = None,
) -> Tensor:
    """Run the network on a batch, add the gradient of its *summed* loss to ``sums``; return the mean loss, ``[]``.

    ``names``: the parameters; ``sums``: name → float32 gradient so far, added to in place, names that it lacks
    included; ``count``: how many positions the loss is the mean of, ``batch.size`` unless given. The ``.grad`` of the
    parameters is as before afterwards. The backward pass runs on the mean, which half precision can hold. Each gradient
    is added as soon as it is there, and then given back: one parameter's is in memory at a time, beside the sums.
    """
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in names}
    count = batch.size if count is None else count
    earlier = {name: parameter.grad for name, parameter in chosen.items()}
    # Before the activations are there, so that no gap is left between the sums.
    fresh = {name: torch.empty_like(p, dtype=torch.float32) for name, p in chosen.items() if name not in sums}
    unread = {*fresh}

    def add(name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        gradient, parameter.grad = parameter.grad.float(), None
        if name in unread:
            torch.mul(gradient, count, out=fresh[name])
            unread.remove(name)
        else:
            sums[name].add_(gradient * count)

    loss = objective.compute_loss(batch.run(model), batch)
    hooks = [p.register_post_accumulate_grad_hook(partial(add, name)) for name, p in chosen.items()]
    try:
        for parameter in chosen.values():
            parameter.grad = None
        loss.backward(inputs=[*chosen.values()])
    finally:
        for hook in hooks:
            hook.remove()
        for name, parameter in chosen.items():
            parameter.grad = earlier[name]
    for name in unread:
        fresh[name].zero_()
    sums |= fresh
    return loss.detach()


@contextmanager
def evaluation_mode(model: nn.Module, differentiated: Sequence[str] | None = None) -> Iterator[None]:
    """Context manager of eval mode, which is undone afterwards, as is what ``differentiated`` changes.

    ``differentiated``: names of parameters, which alone require gradients; ``None``: those that already do.
    """
    modes = {module: module.training for module in model.modules()}
    requirements = {parameter: parameter.requires_grad for parameter in model.parameters()}
    recurrent = any(isinstance(module, nn.RNNBase) for module in modes)
    model.eval()
    if differentiated is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in differentiated)
    try:
        # cuDNN has no backward pass of recurrent layers in eval mode.
        with torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, required in requirements.items():
            parameter.requires_grad_(required)


def find_trunk(model: nn.Module, batch: Batch, names: Sequence[str]) -> nn.Module:
    """Return the module to run for the weights ``names``: without the head, if none of them lies in it; or the model.

    That is transformers' ``base_model``, if it takes the inputs of ``batch``; it may leave out weights (an encoder).
    """
    base = getattr(model, "base_model", None)
    prefix = next((name for name, module in model.named_modules() if module is base), "")
    if not isinstance(base, nn.Module) or not prefix or not all(name.startswith(f"{prefix}.") for name in names):
        return model
    try:
        inspect.signature(base.forward).bind(*batch.args, **batch.kwargs)
    except TypeError:
        return model
    return base


class MaskGradients(InputHook):
    """A torch-function mode that sums the squared gradients of unit masks, as the loss is differentiated.

    A mask multiplies a unit wherever a weight reads it. The gradient of the loss with respect to it is Σ x · ∂L/∂x over
    the unit's channels x, and is taken per token (per example where convolutions read the unit, summed over positions).
    With labels that are drawn from the network's own predictions, the mean of its square is the Fisher information. It
    takes one forward and one backward pass, and no gradients of weights.

    Only what depends on the first watched input is differentiated. Inside a recurrent layer the gradient is that of the
    whole batch, whose square has the same mean where labels are drawn.

    Args:
        watched: ``id`` of a weight → its name.
        reads: Name of a weight → the axes that it reads, and where.
        sequences: How many sequences the batch has.
    """

    def __init__(self, watched: Mapping[int, str], reads: Mapping[str, Sequence[Reader]], sequences: int) -> None:
        super().__init__(watched)
        self.reads, self.sequences = reads, sequences
        self.squares: dict[str, Tensor] = {}
        self.partial: dict[str, Tensor] = {}
        self.waiting: Counter[str] = Counter()

    def replace_input(self, name: str, value: Tensor, dim: int) -> Tensor:
        """Return ``value`` as a new tensor whose gradient is that of this use alone; a hook sums Σ x · ∂L/∂x."""
        if not torch.is_grad_enabled() or not value.is_floating_point():
            return value
        use = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        self._expect(name, use)
        use.register_hook(partial(self._add_gradient, name, value.detach(), dim))
        return use

    def replace_weight(self, name: str, weight: Tensor) -> Tensor:
        """Return the weight times a mask of ones for its inputs, whose gradient (of the whole batch) a hook sums."""
        if not torch.is_grad_enabled():
            return weight
        mask = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device, requires_grad=True)
        self._expect(name, mask)
        mask.register_hook(partial(self._add_gradient, name, mask.detach(), -1))
        return weight * mask

    def finish(self) -> dict[str, Tensor]:
        """Return axis key → Σ of squared gradients, ``[size]`` float64; call it after the backward pass."""
        for axis in list(self.partial):
            self._square(axis)
        return self.squares

    def _expect(self, name: str, value: Tensor) -> None:
        """Count a gradient to come for each axis that the weight ``name`` reads, and begin the axis's sum."""
        for reader in self.reads[name]:
            self.waiting[reader.axis] += 1
            home = "cpu" if value.device.type == "mps" else value.device
            self.squares.setdefault(reader.axis, torch.zeros(reader.size, dtype=torch.float64, device=home))

    @torch.no_grad()
    def _add_gradient(self, name: str, value: Tensor, dim: int, gradient: Tensor) -> None:
        """Add Σ x · ∂L/∂x of one use of the weight ``name`` to its axes; square what is then complete.

        ``value``: the input x, ``dim``: its contracted dimension, ``gradient``: ∂L/∂x.
        """
        sequences = 1 if value.dim() == 1 else self.sequences
        (rows, channels), (slopes, _) = (to_rows(tensor, dim, sequences) for tensor in (value, gradient))
        wide = torch.promote_types(value.dtype, torch.float32)
        products = rows.to(wide) * slopes.to(wide)
        if channels == 1:
            products = products.sum(2)[:, None]
        for reader in self.reads[name]:
            gradients = _sum_by_unit(products, reader.positions(products.shape[-1]))
            if reader.axis in self.partial:
                gradients = _add_uses(self.partial[reader.axis], gradients)
            self.partial[reader.axis] = gradients
            self.waiting[reader.axis] -= 1
            if not self.waiting[reader.axis]:
                self._square(reader.axis)

    def _square(self, axis: str) -> None:
        """Add the squares of an axis's complete gradients to its sum in ``squares``, and delete the gradients."""
        total = self.partial.pop(axis).square().sum((0, 1))
        self.squares[axis] += total.to(self.squares[axis].device, torch.float64)


def _sum_by_unit(values: Tensor, where: Tensor) -> Tensor:
    """Return the sums of ``values``, ``[..., channels]``, over the channels ``where``, ``[size, k]``, of each unit."""
    in_order = where.numel() == values.shape[-1] and torch.equal(where.flatten(), torch.arange(where.numel()))
    parts = values.unflatten(-1, where.shape) if in_order else values[..., where.to(values.device)]
    return parts[..., 0] if where.shape[1] == 1 else parts.sum(-1)


def _add_uses(first: Tensor, other: Tensor) -> Tensor:
    """Return the sum of two uses' gradients, ``[sequences, positions, size]``; unequal dimensions are summed first."""
    for dim in (1, 0):
        if first.shape != other.shape:
            first, other = first.sum(dim, keepdim=True), other.sum(dim, keepdim=True)
    return first + other


def add_fisher(
    model: nn.Module,
    batch: Batch,
    masks: MaskGradients,
    sums: dict[str, Tensor],
    objective: Objective,
    around: AbstractContextManager[object],
    origin: Batch,
) -> None:
    """Run the network on a batch, and back; add squared mask gradients to ``sums``, axis key → ``[size]``, in place.

    ``masks``: new ones for this batch; ``around``: a context manager for the forward pass alone. ``origin`` is the
    batch before it was moved to the network's device, so that labels are drawn without waiting for it. ``ValueError``
    if the output has no gradient.
    """
    with torch.enable_grad():
        with masks, around:
            output = batch.run(model)
        end, gradient = draw_labels(output, batch, objective, origin) or (None, None)
        if end is None:
            end = objective.compute_loss(output, batch) * batch.size
    if end.requires_grad:
        end.backward(gradient)
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
    """Draw labels from a network's predictions; return the logits, and the summed loss's gradient with respect to them.

    ``None`` for losses of one's own, or labels that do not fit. The random numbers of an example depend on its inputs
    alone; where the first dimension of no input is that of the labels, on all inputs and its index. At positions
    labelled −100 the gradient is 0. ``origin`` is the batch on the device where it came from.
    """
    origin = batch if origin is None else origin
    if objective.name in (CLASSIFICATION.name, NEXT_TOKEN.name):
        logits, labels = logits_in(output), batch.labels
        if isinstance(labels, Tensor) and logits.dim() > 1 and logits.shape[:-1] != labels.shape:
            logits = logits.movedim(1, -1)
        if not isinstance(labels, Tensor) or logits.shape[:-1] != labels.shape:
            return None
        check_classes(logits, labels)
        return logits, _draw_classes(logits.detach(), labels != IGNORED, origin)
    if objective.name == MULTI_LABEL.name:
        logits = logits_in(output)
        chances = logits.detach().float().sigmoid()
        ones = _draw_uniform(origin, chances) < chances
        return logits, (chances - ones.float()).to(logits)
    if objective.name == REGRESSION.name:
        values = logits_in(output)
        return values, torch.special.ndtri(_draw_uniform(origin, values).clamp(1e-6, 1 - 1e-6)).to(values)
    return None


def _draw_classes(logits: Tensor, counted: Tensor, batch: Batch) -> Tensor:
    """Return probabilities − one-hot drawn labels, ``[..., classes]``; 0 where not ``counted``, ``[...]`` bool."""
    random = _draw_uniform(batch, counted).flatten()
    rows, valid = logits.reshape(-1, logits.shape[-1]), counted.flatten().to(logits.device)
    gradient = torch.empty_like(rows)
    step = max(1, MAX_PROBABILITIES // rows.shape[1])
    wide = torch.promote_types(rows.dtype, torch.float32)
    chunks = zip(*(tensor.split(step) for tensor in (rows, gradient, random, valid)), strict=True)
    for logits_part, gradient_part, u, valid_part in chunks:
        chances = logits_part.to(wide).softmax(-1)
        edges = chances.cumsum(-1)
        # u times the last edge, since rounding may leave it a little off 1
        classes = torch.searchsorted(edges, u[:, None].to(edges) * edges[:, -1:], right=True)
        classes.clamp_max_(rows.shape[1] - 1)
        chances.scatter_add_(1, classes, chances.new_full((), -1).expand_as(classes))
        gradient_part.copy_(chances * valid_part[:, None])
    return gradient.view(logits.shape)


def _draw_uniform(batch: Batch, like: Tensor) -> Tensor:
    """Return uniform random numbers in [0, 1) of the shape of ``like``, seeded by the inputs of each example."""
    leaves = tree_leaves((batch.args, dict(batch.kwargs)))
    tensors = [leaf.detach().cpu() for leaf in leaves if isinstance(leaf, Tensor)]
    if not like.dim():
        return torch.rand((), generator=_seed_generator(tensors)).to(like.device)
    inputs = [tensor for tensor in tensors if tensor.dim() and len(tensor) == len(like)]
    rows = []
    for i in range(len(like)):
        seeds = [tensor[i] for tensor in inputs] if inputs else [*tensors, torch.tensor(i)]
        rows.append(torch.rand(like.shape[1:], generator=_seed_generator(seeds)))
    return torch.stack(rows).to(like.device)


def _seed_generator(inputs: Sequence[Tensor]) -> torch.Generator:
    """Return a CPU generator seeded by a digest of the bytes of tensors."""
    digest = sha256()
    for tensor in inputs:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.Generator().manual_seed(int.from_bytes(digest.digest()[:7]))
