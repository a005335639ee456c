"""What search spaces share: networks that run in stages, recomputed parts, and checks of descriptions and memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from regrow.core.candidates import candidate_paths
from regrow.core.limits import check_memory
from regrow.nets.loaded import ModelError

MAX_SIZE = 2**14  # of widths and other sizes in a description
COPIES = 3  # numbers that a search holds per weight: the weight, its gradient and its momentum
# Of the Python modules of one operation, without weights (measured on networks of 784 to 19,712 operations).
OPERATION_BYTES = 15_000


class StagedNetwork(nn.Module):
    """A network of a stem, parts (cells or blocks), and classifiers behind the last part and the end of each stage.

    A search in stages runs more parts in each, up to a classifier. If ``recomputed`` is set, parts are computed again
    in the backward pass (gradient checkpointing), to save memory. Subclasses build the stem, the parts, in a
    ``ModuleList`` that is their attribute ``parts_name``, and the heads.
    """

    parts_name: str  # "cells" or "blocks"
    stem: nn.Module
    heads: nn.ModuleDict  # index of a part, as text → the classifier that follows it

    def __init__(self) -> None:
        super().__init__()
        self.recomputed = False
        self.active: int | None = None  # the part whose classifier ``forward`` returns; ``None``: all of them

    def run_part(self, part: Callable[..., Tensor], first: Tensor, second: Tensor) -> Tensor:
        """Return the output of a part for the outputs of the last two parts, of which ``first`` is the older one."""
        return part(first, second)

    def classify(self, head: nn.Module, x: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of a classifier for the output of the part that it follows."""
        return head(x)

    def logits_at(self, x: Tensor, last: int) -> Tensor:
        """Return the logits, ``[N, classes]``, of the classifier behind part ``last``; later parts do not run."""
        return self._logits(x, [last])[0]

    def uses_parameter(self, name: str, last: int) -> bool:
        """Whether :meth:`logits_at` uses the parameter ``name`` for part ``last``."""
        part, _, rest = name.partition(".")
        number = int(rest.partition(".")[0]) if part != "stem" else 0
        return part == "stem" or (number <= last if part == self.parts_name else number == last)

    def required_groups(self) -> list[tuple[str, ...]]:
        """Return groups of operations (paths), of each of which one must stay: those of each :class:`Candidates`."""
        return [*candidate_paths(self).values()]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the logits ``[N, classes]`` behind part ``active``; ``None``: those of every classifier, in order."""
        logits = self._logits(x, sorted(map(int, self.heads)) if self.active is None else [self.active])
        return logits[0] if len(logits) == 1 else tuple(logits)

    def _logits(self, x: Tensor, heads: Sequence[int]) -> list[Tensor]:
        """Return the logits behind the parts ``heads`` (their indices, ascending); parts after the last do not run."""
        result, parts = [], getattr(self, self.parts_name)
        # Depthwise convolutions are faster in this layout on a CPU, most of all those of few channels.
        first = second = self.stem(x.contiguous(memory_format=torch.channels_last))
        for i in range(heads[-1] + 1):
            run = partial(run_recomputed, parts[i]) if self.recomputed and self.training else parts[i]
            first, second = second, self.run_part(run, first, second)
            if i in heads:
                result.append(self.classify(self.heads[str(i)], second))
        return result


def run_recomputed(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Run ``module(*inputs)`` with gradient checkpointing: activations are recomputed in the backward pass.

    Outputs and gradients are the same, bit for bit, at the time of one more forward pass. BatchNorm's running
    statistics are updated once.

    >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.ones(2, 4)
    >>> outputs = net(x), run_recomputed(net, x)
    >>> first, second = (torch.autograd.grad(output.sum(), net[0].bias)[0] for output in outputs)
    >>> torch.equal(first, second)
    True

    Source: Chen et al., Training deep nets with sublinear memory cost (arXiv 1604.06174); ``torch.utils.checkpoint``.
    """
    if not torch.is_grad_enabled():
        return module(*inputs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _freeze_norm_statistics(module)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _freeze_norm_statistics(module: nn.Module) -> Iterator[None]:
    """Context manager in which BatchNorm normalises by the batch, but leaves its running statistics unchanged."""
    norms = [
        (norm, norm.momentum, norm.num_batches_tracked) for norm in module.modules() if isinstance(norm, _BatchNorm)
    ]
    for norm, _, tracked in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None if tracked is None else tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, tracked in norms:
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def build_stem(config: Mapping[str, Any], width: int) -> nn.Sequential:
    """Build a 3 × 3 convolution to ``width`` channels, with BatchNorm; ``config`` has ``shape`` and ``stride``."""
    conv = nn.Conv2d(config["shape"][0], width, 3, config["stride"], 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


def is_spread(k: int, share: float) -> bool:
    """Whether item ``k``, from 0, is in an evenly spread fraction ``share`` of items; their number is rounded up.

    >>> [k for k in range(30) if is_spread(k, 0.1)]
    [0, 10, 20]
    """
    return ceil(round((k + 1) * share, 9)) > ceil(round(k * share, 9))  # 0.1 × 30 is 3.0000000000000004


def norm_widths(module: nn.Module) -> list[int]:
    """Return the number of channels of each ``BatchNorm2d`` in a module, in the order of its modules."""
    return [norm.num_features for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]


@contextmanager
def explain_description(what: str) -> Iterator[None]:
    """Context manager that turns errors of reading a configuration into ModelErrors; ``what``: "cells" or "blocks"."""
    try:
        yield
    except ModelError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"not the description of a network of {what}: {error!r:.80}") from None


def check_sizes(what: str, sizes: Sequence[object]) -> None:
    """Raise ModelError unless all sizes are ints from 1 to ``MAX_SIZE``; ``what`` (cells, blocks): for its message."""
    if invalid := [size for size in sizes if type(size) is not int or not 0 < size <= MAX_SIZE]:
        raise ModelError(f"a network of {what} has sizes from 1 to {MAX_SIZE}; got {invalid[0]!r:.40}")


def heads_fit(config: Mapping[str, Any], parts: int) -> bool:
    """Whether ``shape`` in ``config`` has three sizes, and ``heads`` are indices of ``parts`` parts, with the last."""
    heads = config["heads"]
    exist = all(type(head) is int and 0 <= head < parts for head in heads)
    return len(config["shape"]) == 3 and exist and parts - 1 in heads


def check_space_fits(network: Callable[[Mapping[str, Any]], nn.Module], config: Mapping[str, Any], what: str) -> None:
    """Raise ResourceError unless a super-network fits into memory with gradients and momenta, but without activations.

    First the modules of its operations are counted, by ``config``; then its weights, built by ``network(config)`` on
    the meta device. ``what``: the network in the message.
    """
    parts = config.get("cells") or config["blocks"]
    nodes = [node for part in parts for node in part.get("nodes", [part])]
    remedy = "take a smaller width, or fewer cells, nodes or blocks"
    needed = OPERATION_BYTES * sum(len(node["ops"]) for node in nodes)
    check_memory(needed, what, remedy)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in network(config).parameters())
    check_memory(needed + 4 * COPIES * weights, what, remedy)
