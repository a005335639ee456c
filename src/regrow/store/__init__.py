"""Files on disk: atomic writes, validated records, and model folders for networks of any shape.

What needs torch is imported when it is first used, so that folders can be checked without it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from regrow.store.errors import StoreError

if TYPE_CHECKING:
    from regrow.store.models import CARRIED, load, read_shapes, save, write_model
    from regrow.store.shapes import SHAPES

__all__ = ["CARRIED", "SHAPES", "StoreError", "load", "read_shapes", "save", "write_model"]


def __getattr__(name: str) -> Any:
    """Return a public name; its module is imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'regrow.store' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module("regrow.store.models"), name)
    return value
