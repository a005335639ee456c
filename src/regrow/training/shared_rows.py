"""Forward passes that ranks share by the examples of a batch: each runs the network on some, and gets all logits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regrow.core.errors import InputError
from regrow.core.sources import device_of, logits_in
from regrow.core.tasks import first_tensor
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import view_bytes


class SynchronisedBatchNorm(TorchFunctionMode):
    """Context manager in which BatchNorm in training mode normalises by the statistics of all ranks' examples.

    It must last until the backward pass is over, since activation checkpointing runs modules again. While ``active`` is
    false, BatchNorm is as usual.
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
    """``F.batch_norm`` with mean and variance over the rows of all ranks; updates the running statistics in place."""
    if not training:
        return F.batch_norm(values, running_mean, running_var, weight, bias, training, momentum, eps)
    dims, shape = [0, *range(2, values.dim())], (1, -1, *[1] * (values.dim() - 2))
    wide = values if values.dtype == torch.float64 else values.float()
    # The last entry is the number of values per channel, which differs between ranks.
    sums = _sum_over_ranks(torch.cat([wide.sum(dims), wide.new_tensor([wide.numel() / wide.shape[1]])]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    variance = _sum_over_ranks(centred.square().sum(dims)) / count
    result = centred * torch.rsqrt(variance + eps).view(shape)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_((variance * count / (count - 1)).to(running_var), momentum)  # unbiased, as in torch
    result = result if weight is None else result * weight.view(shape)
    return (result if bias is None else result + bias.view(shape)).to(values.dtype)


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks, on each of them, in a new tensor with a gradient."""
    total: Tensor = _RankSum.apply(tensor)
    return total


class _RankSum(torch.autograd.Function):
    """The sum of a tensor over ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the sum of the ranks' gradients."""
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


@contextmanager
def share_rows(model: nn.Module, ranks: ProcessRank) -> Iterator[None]:
    """Context manager in which each rank runs the network on its examples of a batch, and gets the logits of all.

    A loss of these logits is that of a single process, whatever it adds to them: the mean over ranks of its gradients
    is the gradient. Batches of fewer examples than there are ranks run whole on each. BatchNorm takes its statistics
    from all examples; Dropout draws anew on each rank, and random draws outside the network are the same on all.

    Args:
        model: The network; all ranks run it equally often, on the same batches.
        ranks: The processes.
    """
    if not ranks.several:
        yield
        return
    norms = SynchronisedBatchNorm(active=False)
    shared = _SharedForward(ranks, norms)
    handles = (
        model.register_forward_pre_hook(shared.select, with_kwargs=True),
        model.register_forward_hook(shared.gather),
    )
    try:
        with norms:
            yield
    finally:
        for handle in handles:
            handle.remove()


class _SharedForward:
    """The hooks before and after a forward pass: ``select`` takes a rank's rows, ``gather`` joins the logits of all."""

    def __init__(self, ranks: ProcessRank, norms: SynchronisedBatchNorm) -> None:
        self.ranks, self.norms = ranks, norms
        self.bounds: list[int] = []  # the first row of each rank, and the number of rows
        self.random: _RankRandomness | None = None  # in training mode

    def select(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments with this rank's rows of the batch; ``None`` (all) if it has fewer rows than ranks."""
        count, size = len(first_tensor([*args, *kwargs.values()])), self.ranks.size
        self.norms.active = count >= size
        if not self.norms.active:
            return None
        self.bounds = [count * rank // size for rank in range(size + 1)]
        rows = slice(*self.bounds[self.ranks.rank : self.ranks.rank + 2])
        self.random = _RankRandomness(self.ranks.rank, device_of(model)) if model.training else None
        selected = {name: _select_rows(value, count, rows) for name, value in kwargs.items()}
        return tuple(_select_rows(value, count, rows) for value in args), selected

    def gather(self, model: nn.Module, args: Any, output: Any) -> Any:
        """Return the logits of all ranks, in the order of the batch; InputError if there is not one row per example."""
        if not self.norms.active:
            return output
        if self.random:
            self.random.restore()
        logits = logits_in(output)
        rows = self.bounds[self.ranks.rank + 1] - self.bounds[self.ranks.rank]
        if logits.shape[:1] != (rows,):
            raise InputError(
                f"the network returned outputs of shape {list(logits.shape)} for {rows} examples, which several "
                "processes cannot put together; start it without torchrun"
            )
        return _GatheredRows.apply(logits, self.bounds, self.ranks)


class _RankRandomness:
    """Random draws of a rank's own in a forward pass; after :meth:`restore` all ranks' generators have the same state.

    Made before the pass: it seeds the global generators of the CPU and of the device differently on each rank.
    """

    def __init__(self, rank: int, device: torch.device) -> None:
        self.generators = [torch.default_generator]
        if device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[device.index or 0])
        self.before = self._states()
        seed = int(torch.randint(2**62, ())) + rank
        self.after = self._states()
        for generator in self.generators:
            generator.manual_seed(seed)
        self.seeded = self._states()

    def restore(self) -> None:
        """Give all ranks the same states of the generators after the pass.

        Those before it if it drew nothing, as in a single process; else those after the draw of the ranks' seed.
        """
        unused = all(map(torch.equal, self._states(), self.seeded))
        for generator, state in zip(self.generators, self.before if unused else self.after, strict=True):
            generator.set_state(state)

    def _states(self) -> list[Tensor]:
        """Return copies of the present states of the generators."""
        return [generator.get_state() for generator in self.generators]


class _GatheredRows(torch.autograd.Function):
    """The rows of all ranks; the gradient of own rows is times ``size``, so that the mean over ranks is right."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bounds: Sequence[int], ranks: ProcessRank) -> Tensor:
        """Return the rows of all ranks, in order; ``bounds``: the first row of each rank, then the number of rows."""
        ctx.bounds, ctx.ranks = bounds, ranks
        sizes = [end - start for start, end in pairwise(bounds)]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))  # all_gather needs equal shapes
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather([view_bytes(rank_rows) for rank_rows in parts], view_bytes(padded))
        return torch.cat([part[:count] for part, count in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the rank's own rows, times the number of ranks."""
        start, end = ctx.bounds[ctx.ranks.rank : ctx.ranks.rank + 2]
        return gradient[start:end] * ctx.ranks.size, None, None


def _select_rows(value: Any, count: int, rows: slice) -> Any:
    """Return ``value[rows]`` of a tensor with ``count`` rows; anything else as it is."""
    return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value
