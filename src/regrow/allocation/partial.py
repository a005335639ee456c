"""Partial channel connections of PC-DARTS: while operations are weighed, they process only some channels.

Xu et al.: PC-DARTS, Partial Channel Connections for Memory-Efficient Architecture Search (arXiv 1907.05737), section
3.2.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regrow.core.candidates import Candidates, candidates_in


def partial_channels(model: nn.Module, many: int, weights: Callable[[], list[Tensor]]) -> list[RemovableHandle]:
    """Hook nodes so that operations process 1 / ``many`` of the channels and the others bypass them (PC-DARTS).

    Each node then outputs  shuffle([operations on the first C / many channels ; Σ w_e · the other channels of edge e]).

    The operation itself keeps all channels, but its convolutions see 0 in the others: it computes what a narrower one
    would, at the memory and time of the whole. The other channels are max-pooled where the node halves the resolution.

    Args:
        model: A network whose operations map C channels to C.
        many: 1 / this fraction of the channels is processed; 4 in the paper.
        weights: Function that returns the weights w of the edges into each node, node by node, ``[edges]`` each; called
            in every forward pass.

    Returns:
        The handles of the hooks; call ``remove`` on each to undo them.

    Raises:
        ValueError: If the channels of a node are not a multiple of ``many``.

    >>> net = nn.Sequential(Candidates({"mixed": nn.Conv2d(2, 2, 1, bias=False)}))
    >>> _ = nn.init.constant_(net[0].ops["mixed"].weight, 5.0)
    >>> handles = partial_channels(net, 2, lambda: [torch.ones(1)])
    >>> net(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)).flatten().tolist()
    [5.0, 3.0]
    """
    handles = []
    for number, path in enumerate(candidates_in(model)):
        node = model.get_submodule(path)
        assert isinstance(node, Candidates)
        for module in node.modules():
            if isinstance(module, nn.Conv2d):
                if module.out_channels % many:
                    raise ValueError(
                        f"one channel of {many} is worked on, and {path} has {module.out_channels}: take a divisor"
                    )
                handles.append(module.register_forward_pre_hook(lambda _, given: (_first(given[0], many),)))

        def beside(node: Any, given: tuple[Tensor, ...], total: Tensor, number: int = number) -> Tensor:
            out = _first(total, many)
            for source, weight in zip(dict.fromkeys(node.sources), weights()[number], strict=True):
                rest = given[source]
                if rest.shape[2:] != total.shape[2:]:
                    rest = F.max_pool2d(rest, 2, ceil_mode=True)
                out = out + weight * (rest - _first(rest, many))
            return F.channel_shuffle(out, many)

        handles.append(node.register_forward_hook(beside))
    return handles


def _first(x: Tensor, many: int) -> Tensor:
    """Return the first 1 / ``many`` of the channels, and 0 in place of the others."""
    return x * (torch.arange(x.shape[1], device=x.device) < x.shape[1] // many).to(x.dtype)[:, None, None]
