"""regrow changes the shape of trained networks, exactly: it prunes them, grows them and searches them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.axis_tensor import AxisTensor
    from regrow.candidates import Candidates
    from regrow.commands.pruning import prune
    from regrow.export.formats import export_model
    from regrow.plan import Fill, Plan
    from regrow.store import load
    from regrow.surgery import UndoStore, align_new_units, apply, declare, fit_new_units, verify
    from regrow.tracing import trace, with_branches

__all__ = [
    "AxisTensor",
    "Candidates",
    "Fill",
    "Plan",
    "UndoStore",
    "align_new_units",
    "apply",
    "declare",
    "export_model",
    "fit_new_units",
    "load",
    "prune",
    "trace",
    "verify",
    "with_branches",
]

_MODULES = {
    "AxisTensor": "regrow.axis_tensor",
    "Candidates": "regrow.candidates",
    "export_model": "regrow.export.formats",
    **dict.fromkeys(("Fill", "Plan"), "regrow.plan"),
    "load": "regrow.store",
    "prune": "regrow.commands.pruning",
    **dict.fromkeys(("UndoStore", "align_new_units", "apply", "declare", "fit_new_units", "verify"), "regrow.surgery"),
    **dict.fromkeys(("trace", "with_branches"), "regrow.tracing"),
}
"""Public name → the module that has it; imported when it is first used, since that imports torch."""


def __getattr__(name: str) -> Any:
    """Return a public name, or a submodule of regrow by its name; both are imported on first use."""
    if name in _MODULES:
        found = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        try:
            found = importlib.import_module(f"regrow.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"regrow.{name}":
                raise
            raise AttributeError(f"module 'regrow' has no attribute {name!r}") from None
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
