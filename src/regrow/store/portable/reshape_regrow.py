"""Reshape a newly built network to the one whose weights were saved: tensor shapes, numbers, dropped modules.

Written by regrow beside the weights. Needs torch alone. Licence: Apache-2.0.

A record of differences, in ``config.json`` or ``network.json``, has: ``tensors`` (name → shape), ``dropped`` (names of
tensors that the network lacks), ``attributes`` (``module:attribute`` → number), ``stands`` (path of a dropped module →
what replaces it) and ``derived`` (name of a buffer outside the state dict → dtype, shape and numbers).
"""

import copy
from typing import Any

import torch
from torch import nn


class Dropped(nn.Module):
    """Replaces a dropped module: it returns zeros or its own input, in the form of the module's output.

    Args:
        stand: What it returns. ``gives``: ``"zero"`` (zeros in the shape of an argument) or ``"input"`` (the argument);
            ``takes``: position or name of that argument; ``of``: length of the output tuple, 0 for a tensor; ``at``:
            index in the tuple, whose other entries are ``None``.
        of: The module that is replaced; its attributes that are numbers, strings or bools are copied.
    """

    def __init__(self, stand: dict[str, Any], of: nn.Module) -> None:
        super().__init__()
        self.stand = stand
        for name, value in vars(of).items():
            if type(value) in (bool, int, float, str) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros or the input."""
        takes, of = self.stand["takes"], self.stand["of"]
        given = args[takes] if isinstance(takes, int) else kwargs[takes]
        value = torch.zeros_like(given) if self.stand["gives"] == "zero" else given
        return tuple(value if i == self.stand["at"] else None for i in range(of)) if of else value


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor or module, and the attribute's name in it.

    Args:
        model: The network.
        name: The dotted name of the tensor or module.
    """
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def reshape(model: nn.Module, record: dict[str, Any]) -> None:
    """Give every tensor its recorded shape (weights are loaded later), drop modules and tensors, set numbers.

    Args:
        model: The newly built network; changed in place.
        record: The recorded differences, as described at the top of this file.
    """
    for path, stand in record["stands"].items():
        module, leaf = place(model, path)
        setattr(module, leaf, Dropped(stand, model.get_submodule(path)))
    some = next(model.parameters())
    for name, shape in record["tensors"].items():
        module, leaf = place(model, name)
        old = getattr(module, leaf, None)
        like = some if old is None else old
        new = torch.empty(shape, dtype=like.dtype, device=like.device)
        setattr(module, leaf, new if leaf in module._buffers else nn.Parameter(new))
    for name in record["dropped"]:
        module, leaf = place(model, name)
        setattr(module, leaf, None)
    for where, number in record["attributes"].items():
        path, _, name = where.partition(":")
        module, (owner, _, leaf) = model.get_submodule(path), name.rpartition(".")
        if owner:  # a configuration that other layers share
            setattr(module, owner, copy.copy(getattr(module, owner)))
        holder: Any = getattr(module, owner) if owner else module
        old = getattr(holder, leaf, None)
        setattr(holder, leaf, type(old)(number) if isinstance(old, tuple | list) else number)


def finish(model: nn.Module, record: dict[str, Any]) -> None:
    """Raise ValueError unless every tensor has its recorded shape, then set the derived buffers, in place.

    Args:
        model: The network after :func:`reshape`, with its weights loaded.
        record: The recorded differences, as for :func:`reshape`.
    """
    there = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, shape in record["tensors"].items():
        if tuple(there[name].shape) != tuple(shape):
            raise ValueError(f"{name} has the shape {tuple(there[name].shape)}, planned is {tuple(shape)}")
    for name, value in record["derived"].items():
        module, leaf = place(model, name)
        numbers = torch.tensor(value["numbers"], dtype=getattr(torch, value["dtype"]), device=there[name].device)
        setattr(module, leaf, numbers.reshape(value["shape"]))
