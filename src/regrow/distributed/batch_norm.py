"""BatchNorm over the examples of all ranks, on any device; torch's own ``SyncBatchNorm`` runs on GPUs alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SynchronisedBatchNorm(TorchFunctionMode):
    """Context manager in which BatchNorm in training mode normalises by the statistics of all ranks' examples.

    It must last until the backward pass is over, since activation checkpointing runs modules again.

    Args:
        active: Whether statistics are those of all ranks; it may change inside.
    """

    def __init__(self, active: bool = True) -> None:
        super().__init__()
        self.active = active

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm and self.active:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    values: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """(x − mean) / √(variance + eps) · weight + bias per channel, with mean and variance over the rows of all ranks."""
    if not training:
        return F.batch_norm(values, running_mean, running_var, weight, bias, training, momentum, eps)
    dims, shape = [0, *range(2, values.dim())], (1, -1, *[1] * (values.dim() - 2))
    wide = values if values.dtype == torch.float64 else values.float()
    sums = _sum(torch.cat([wide.sum(dims), wide.new_tensor([wide.numel() / wide.shape[1]])]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    variance = _sum(centred.square().sum(dims)) / count
    result = centred * torch.rsqrt(variance + eps).view(shape)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var), momentum)
    result = result if weight is None else result * weight.view(shape)
    return (result if bias is None else result + bias.view(shape)).to(values.dtype)


def _sum(tensor: Tensor) -> Tensor:
    total: Tensor = _RankSum.apply(tensor)
    return total


class _RankSum(torch.autograd.Function):
    """The sum of a tensor over ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
