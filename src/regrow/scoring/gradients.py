"""Importance scores from loss gradients: the first-order Taylor importance of LLM-Pruner."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph
from regrow.core.objectives import CLASSIFICATION, Objective
from regrow.core.scores import Scores, Statistics
from regrow.core.sources import Batch
from regrow.scoring.weights import check_scores, scorable, tensors


def taylor(
    weights: Mapping[str, Tensor],
    axes: AxisGraph,
    statistics: Statistics | None,
    *,
    units: Sequence[Axis] | None = None,
    form: str = "element1",
) -> Scores:
    """Score units by first-order Taylor importance: the estimated change of the loss if the unit were removed.

    ``element1``: Σ over the parameters the unit runs through of Σ abs(w · g). ``vector``: Σ over the parameters and
    over the unit's channels in each of abs(Σ w · g). g is the gradient of the mean loss.

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        statistics: Gradient sums of one or more sources; ``None`` scores by the weights alone, Σ w².
        units: The axes to score; ``axes.units()`` if none are named.
        form: ``"element1"`` (absolute values per weight entry) or ``"vector"`` (absolute values per channel).

    Source: Ma et al., LLM-Pruner (arXiv 2305.11627), code (``param_first`` and ``vectorize``).
    """
    if form not in ("element1", "vector"):
        raise ValueError(f"taylor has the forms 'element1' and 'vector'; got {form!r}")
    values: dict[str, Tensor] = {}
    for axis in scorable(axes, units):
        total = torch.zeros(axis.size, dtype=torch.float64)
        for name, slot, where in tensors(axes, axis, weights):
            weight = weights[name].detach().double()
            if statistics is None:
                product = weight.square()
            elif name in statistics.gradients:
                product = weight * statistics.gradients[name].to(weight) / max(statistics.tokens, 1)
            else:
                raise ValueError(f"source {statistics.source!r} gave no gradient for the parameter {name!r}")
            rest = [d for d in range(weight.dim()) if d != slot.dim]
            product = product.abs() if form == "element1" else product
            channels = (product.sum(rest) if rest else product).abs().cpu()
            total += channels[where].sum(1)
        values[axis.key] = total
    if statistics is None:
        return check_scores(Scores(values, f"taylor/{form}/weight-only"))
    sources = tuple(dict.fromkeys(statistics.source.split("+")))
    return check_scores(Scores(values, f"taylor/{form}", sources, statistics.tokens))


def add_gradients(
    model: nn.Module,
    batch: Batch,
    names: Sequence[str],
    sums: dict[str, Tensor],
    objective: Objective = CLASSIFICATION,
    *,
    count: int | None = None,
) -> Tensor:
    """Run the network on a batch and add the gradient of its *summed* loss to ``sums`` (float32).

    Summed, so that batches of different sizes can be merged. The backward pass itself runs on the mean, which half
    precision can hold. Each gradient is added as soon as it is there, and then given back: one parameter's is in memory
    at a time, beside the sums.

    Args:
        model: The network.
        batch: Inputs with labels.
        names: The parameters whose gradients are wanted.
        sums: Parameter name → sum so far; changed in place.
        objective: What the network is trained for.
        count: The number of labelled positions; ``None``: it is counted, for which the host waits for the device.

    Returns:
        The mean loss, ``[]``, which may not be finite.

    Raises:
        ValueError: If the batch has no labels and the network returns no loss.
    """
    parameters = dict(model.named_parameters())
    chosen, many = {name: parameters[name] for name in names}, batch.size if count is None else count
    earlier = {name: parameter.grad for name, parameter in chosen.items()}
    # Before the activations are there, so that no gap is left between the sums.
    fresh = {name: torch.empty_like(one, dtype=torch.float32) for name, one in chosen.items() if name not in sums}
    unread = {*fresh}

    def add(name: str, parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        gradient, parameter.grad = parameter.grad.float(), None
        if name in unread:
            torch.mul(gradient, many, out=fresh[name])
            unread.remove(name)
        else:
            sums[name].add_(gradient * many)

    loss = objective.compute_loss(batch.run(model), batch)
    hooks = [one.register_post_accumulate_grad_hook(partial(add, name)) for name, one in chosen.items()]
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
    """Put the network in eval mode, with gradients for the named parameters alone; restore it afterwards.

    Args:
        model: The network.
        differentiated: The parameters that get gradients; ``None``: all are left as they are.
    """
    modes = {module: module.training for module in model.modules()}
    asks = {parameter: parameter.requires_grad for parameter in model.parameters()}
    wanted = set(differentiated or ())
    model.eval()
    if differentiated is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, ask in asks.items():
            parameter.requires_grad_(ask)
