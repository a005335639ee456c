"""Whether a network fits into memory, found out before its weights are made."""

from collections.abc import Callable

import torch
from torch import nn

from regrow.limits import check_memory


def check_fits(make: Callable[[], nn.Module], what: str, copies: int = 1) -> None:
    """Assert that there is memory for the weights of a network, by building it without any.

    Args:
        make: Builds it.
        what: What messages call it.
        copies: How many times its weights are held at once (learning: weights, gradients, moments).

    Raises:
        ResourceError: If there is not; says how much it needs and how much there is.
    """
    with torch.device("meta"):
        net = make()
    tensors = {id(one): one for one in (*net.parameters(), *net.buffers())}.values()
    needed = sum(one.numel() * one.element_size() for one in tensors)
    check_memory(copies * needed, what, "take a smaller network")
