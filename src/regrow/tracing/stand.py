"""What stands in a network where a branch was dropped: a module that computes nothing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regrow.branches import Stand


class Dropped(nn.Module):
    """Stands for a module that is gone, so that the code around it runs on: it gives zeros, its own input, or nothing.

    The zeros are new ones at every call, since code may write into them.

    Args:
        stand: What it takes and gives.
        of: The module that it stands for; its plain attributes stay, since code around it may ask for them.

    >>> Dropped(Stand("zero", 0))(torch.ones(3))
    tensor([0., 0., 0.])
    """

    def __init__(self, stand: Stand, of: nn.Module | None = None) -> None:
        super().__init__()
        self.stand = stand
        for name, value in vars(of).items() if of is not None else ():
            if type(value) in (bool, int, float, str) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the form of the argument, or the argument, in the form of the answer that was; or ``None``."""
        stand = self.stand
        if stand.gives == "nothing":
            return None
        given = args[stand.takes] if isinstance(stand.takes, int) else kwargs[stand.takes]
        value = torch.zeros_like(given) if stand.gives == "zero" else given
        return tuple(value if i == stand.at else None for i in range(stand.of)) if stand.of else value

    def extra_repr(self) -> str:
        """What it gives."""
        return self.stand.gives


def exchange(model: nn.Module, stands: Mapping[str, Stand]) -> dict[str, nn.Module]:
    """Put stands where modules were, in place; what was there.

    Args:
        model: The network.
        stands: Path of a module → what stands for it.

    Raises:
        AttributeError: If there is no such module.
    """
    gone = {path: model.get_submodule(path) for path in stands}
    put(model, {path: Dropped(stand, gone[path]) for path, stand in stands.items()})
    return gone


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules at their paths, in place."""
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def stands_in(model: nn.Module) -> dict[str, Stand]:
    """Path → what stands there, for every dropped module of a network."""
    return {path: module.stand for path, module in model.named_modules() if isinstance(module, Dropped)}
