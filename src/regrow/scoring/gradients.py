"""Run a part of a network in evaluation mode, and sum the gradients of its loss."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from regrow.core.objectives import CLASSIFICATION, Objective
from regrow.core.sources import Batch


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
    """Put the network in eval mode, with gradients for the named parameters alone if given; restore it afterwards."""
    modes = {module: module.training for module in model.modules()}
    asks = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    if differentiated is not None:
        wanted = set(differentiated)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in wanted)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, ask in asks.items():
            parameter.requires_grad_(ask)


def trunk_of(model: nn.Module, batch: Batch, names: Sequence[str]) -> nn.Module:
    """Return the smallest part of a network to run: without the head, if none of the named weights lies in it.

    That part is transformers' ``base_model``: a submodule that takes the same inputs. It may leave out weights that the
    whole network uses (an encoder, a head).
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
