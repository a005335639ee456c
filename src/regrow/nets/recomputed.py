"""Gradient checkpointing: modules whose activations are recomputed in the backward pass, to save memory."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def again(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Run ``module(*inputs)`` with gradient checkpointing: activations are recomputed in the backward pass.

    Outputs and gradients are the same, bit for bit, at the time of one more forward pass. BatchNorm's running
    statistics are updated once.

    Args:
        module: A module that returns one tensor.
        *inputs: Its inputs.

    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.ones(2, 4)
    >>> one, other = (torch.autograd.grad(run(x).sum(), net[0].bias)[0] for run in (net, lambda x: again(net, x)))
    >>> torch.equal(one, other)
    True

    Source: Chen et al., Training deep nets with sublinear memory cost (arXiv 1604.06174); ``torch.utils.checkpoint``.
    """
    if not torch.is_grad_enabled():
        return module(*inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _still(module)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of BatchNorm unchanged in the block, though it normalises by the batch."""
    norms = [(one, one.momentum, one.num_batches_tracked) for one in module.modules() if isinstance(one, _BatchNorm)]
    for norm, _, seen in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None if seen is None else seen.clone()
    try:
        yield
    finally:
        for norm, momentum, seen in norms:
            norm.momentum, norm.num_batches_tracked = momentum, seen
