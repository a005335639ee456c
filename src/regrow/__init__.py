"""regrow changes the shape of trained networks, exactly: it prunes them, grows them and searches them."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.api.evaluate import evaluate
    from regrow.api.export import export
    from regrow.api.grow import grow
    from regrow.api.learn import Learned, learn
    from regrow.api.prune import prune
    from regrow.api.recover import finetune, recover
    from regrow.api.search import search
    from regrow.core.axes import Example
    from regrow.core.axes.axis import AxisTensor
    from regrow.core.candidates import Candidates
    from regrow.core.plan import Fill, Plan
    from regrow.core.sources import Batch, Source
    from regrow.jobs.search import SearchResult
    from regrow.store import load, save
    from regrow.surgery import UndoStore, apply, fit_new_units, verify
    from regrow.tracing import trace, with_branches

__all__ = [
    "AxisTensor",
    "Batch",
    "Candidates",
    "Example",
    "Fill",
    "Learned",
    "Plan",
    "SearchResult",
    "Source",
    "UndoStore",
    "apply",
    "evaluate",
    "export",
    "finetune",
    "fit_new_units",
    "grow",
    "learn",
    "load",
    "prune",
    "recover",
    "save",
    "search",
    "trace",
    "verify",
    "with_branches",
]

_MODULES = {
    **{name: f"regrow.api.{name}" for name in ("evaluate", "export", "grow", "learn", "prune", "recover")},
    "finetune": "regrow.api.recover",
    "search": "regrow.api.search",
    "AxisTensor": "regrow.core.axes.axis",
    "Candidates": "regrow.core.candidates",
    "Example": "regrow.core.axes",
    "Learned": "regrow.api.learn",
    "SearchResult": "regrow.jobs.search",
    **dict.fromkeys(("Batch", "Source"), "regrow.core.sources"),
    **dict.fromkeys(("Fill", "Plan"), "regrow.core.plan"),
    **dict.fromkeys(("load", "save"), "regrow.store"),
    **dict.fromkeys(("UndoStore", "apply", "fit_new_units", "verify"), "regrow.surgery"),
    **dict.fromkeys(("trace", "with_branches"), "regrow.tracing"),
}
"""Public name → the module that has it; imported when it is first used, since that imports torch."""


def __getattr__(name: str) -> Any:
    """Return a public name, or a submodule of regrow by its name; both are imported on first use."""
    if name == "__version__":
        value: Any = importlib.metadata.version("regrow")
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        try:
            value = importlib.import_module(f"regrow.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"regrow.{name}":
                raise
            raise AttributeError(f"module 'regrow' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
