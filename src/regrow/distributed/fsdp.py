"""Networks whose parameters, gradients and optimizer state are sharded among the ranks (FSDP2).

Imported where it is used: what it needs of torch takes two seconds to import.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from regrow.core.process_memory import set_mmap_threshold
from regrow.distributed.parallel import whole


def return_freed_memory() -> None:
    """Let memory of large tensors go back to the system as soon as it is freed, where the C library is that of Linux.

    Otherwise shards would be scattered over the memory of the whole networks that were loaded before, which stays.
    """
    set_mmap_threshold(2**18)


@contextmanager
def sharded(models: Sequence[nn.Module], blocks: Sequence[str]) -> Iterator[list[nn.Module]]:
    """Shard networks among all ranks inside the ``with`` block; yields modules like them, with sharded parameters.

    The networks themselves hold no numbers inside the block, and the trained ones after it.

    Args:
        models: The networks, the same on all ranks.
        blocks: The paths of the modules that are gathered one at a time.
    """
    device = next(models[0].parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))  # otherwise that of a GPU, if there is one
    copies = [_shard(model, blocks, mesh) for model in models]
    yield copies
    for model, copy in zip(models, copies, strict=True):
        for name, parameter in model.named_parameters():
            parameter.data = whole(copy.get_parameter(name).detach())


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the shard of a whole tensor that this rank holds of a parameter."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _shard(model: nn.Module, blocks: Sequence[str], mesh: DeviceMesh) -> nn.Module:
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copy = deepcopy(model, shared)
    for path in (*blocks, ""):
        fully_shard(copy.get_submodule(path), mesh=mesh, reshard_after_forward=True)
        for parameter in model.get_submodule(path).parameters():
            parameter.data = parameter.data.new_empty(0)
    return copy
