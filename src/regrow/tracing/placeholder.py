"""The module that replaces a dropped branch: it computes nothing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from regrow.core.branches import Placeholder


class PlaceholderModule(nn.Module):
    """Replaces a dropped module so that the code around it still runs: it returns zeros, its own input, or ``None``.

    The zeros are new at every call, since code may write into them.

    Args:
        placeholder: Which argument it takes, and what it returns.
        of: The module that it replaces; its plain attributes are copied, since code around it may read them.

    >>> PlaceholderModule(Placeholder("zero", 0))(torch.ones(3))
    tensor([0., 0., 0.])
    """

    def __init__(self, placeholder: Placeholder, of: nn.Module | None = None) -> None:
        super().__init__()
        self.placeholder = placeholder
        for name, value in vars(of).items() if of is not None else ():
            if type(value) in (bool, int, float, str) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> object:
        """Return zeros like the argument, or the argument, in the form of the dropped module's output; or ``None``."""
        placeholder = self.placeholder
        if placeholder.gives == "nothing":
            return None
        given = args[placeholder.takes] if isinstance(placeholder.takes, int) else kwargs[placeholder.takes]
        value = torch.zeros_like(given) if placeholder.gives == "zero" else given
        return tuple(value if i == placeholder.at else None for i in range(placeholder.of)) if placeholder.of else value

    def extra_repr(self) -> str:
        """Return what the placeholder gives: ``zero``, ``input`` or ``nothing``."""
        return self.placeholder.gives


def insert_placeholders(model: nn.Module, placeholders: Mapping[str, Placeholder]) -> dict[str, nn.Module]:
    """Replace modules by placeholders, in place; return path → the replaced module.

    Args:
        model: The network.
        placeholders: Path of a module → the placeholder that replaces it.

    Raises:
        AttributeError: If there is no such module.
    """
    gone = {path: model.get_submodule(path) for path in placeholders}
    set_modules(model, {path: PlaceholderModule(placeholder, gone[path]) for path, placeholder in placeholders.items()})
    return gone


def set_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Set modules at their paths, in place.

    Args:
        model: The network.
        modules: Path → module.
    """
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def find_placeholders(model: nn.Module) -> dict[str, Placeholder]:
    """Return path → placeholder of every dropped module of a network.

    Args:
        model: The network.
    """
    return {path: module.placeholder for path, module in model.named_modules() if isinstance(module, PlaceholderModule)}
