"""The placeholder of a dropped branch: a module that computes nothing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regrow.branches import Placeholder


class PlaceholderModule(nn.Module):
    """Stands for a module that is gone, so that the code around it runs on: it gives zeros, its own input, or nothing.

    The zeros are new ones at every call, since code may write into them.

    Args:
        placeholder: What it takes and gives.
        of: The module that it replaces; its plain attributes stay, since code around it may ask for them.

    >>> PlaceholderModule(Placeholder("zero", 0))(torch.ones(3))
    tensor([0., 0., 0.])
    """

    def __init__(self, placeholder: Placeholder, of: nn.Module | None = None) -> None:
        super().__init__()
        self.placeholder = placeholder
        for name, value in vars(of).items() if of is not None else ():
            if type(value) in (bool, int, float, str) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the form of the argument, or the argument, in the form of the answer that was; or ``None``."""
        placeholder = self.placeholder
        if placeholder.gives == "nothing":
            return None
        given = args[placeholder.takes] if isinstance(placeholder.takes, int) else kwargs[placeholder.takes]
        value = torch.zeros_like(given) if placeholder.gives == "zero" else given
        return tuple(value if i == placeholder.at else None for i in range(placeholder.of)) if placeholder.of else value

    def extra_repr(self) -> str:
        """What it gives."""
        return self.placeholder.gives


def insert_placeholders(model: nn.Module, placeholders: Mapping[str, Placeholder]) -> dict[str, nn.Module]:
    """Replace modules by placeholders, in place; returns the modules.

    Args:
        model: The network.
        placeholders: Path of a module → what takes its place.

    Raises:
        AttributeError: If there is no such module.
    """
    gone = {path: model.get_submodule(path) for path in placeholders}
    set_modules(model, {path: PlaceholderModule(placeholder, gone[path]) for path, placeholder in placeholders.items()})
    return gone


def set_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules at their paths, in place."""
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def find_placeholders(model: nn.Module) -> dict[str, Placeholder]:
    """Path → placeholder, for every dropped module of a network."""
    return {path: module.placeholder for path, module in model.named_modules() if isinstance(module, PlaceholderModule)}
